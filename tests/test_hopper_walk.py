"""The host side of the walk, over a library of plain loops that runs jobs in the order a missing need would spoil."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from inception_fast.kernels import reference
from inception_fast.kernels.cuda import abi, check, convolve, loader, walk
from inception_fast.kernels.cuda.convolve import Problem, Target
from inception_fast.kernels.cuda.walk import Cut, Job, Pooling
from inception_fast.kernels.maps import Map, dense
from inception_fast.kernels.plan import Buffer
from inception_fast.kernels.spec import ConvSpec, PoolSpec
from torch import Tensor

import numerics
from checkout import ROOT
from hopper_library import launched, stub, stub_file, walking_in_order
from inception_fast.engine import gpu_hopper, gpu_walk

HALF, CPU = torch.float16, torch.device("cpu")
SMALL = ConvSpec(1, 8, 8, 2048, 320, 1, 1, dtype="bfloat16")
WIDTHS = (32, 64)


@pytest.fixture
def here() -> Iterator[loader.Library]:
    launched()
    yield stub()


def test_the_kinds_are_those_of_the_header() -> None:
    text = (ROOT / "kernels/cuda/walk_api.h").read_text()
    kinds = {name: int(value) for name, value in re.findall(r"\b(HOPPER_(?:JOB|POOL)_\w+) = (\d+)", text)}
    assert kinds == {
        "HOPPER_JOB_CONV": abi.CONV_JOB, "HOPPER_JOB_POOL": abi.POOL_JOB, "HOPPER_POOL_MAX": abi.MAX_POOL,
        "HOPPER_POOL_AVERAGE": abi.AVERAGE_POOL, "HOPPER_POOL_AVERAGE_PADDED": abi.AVERAGE_PADDED_POOL,
    }  # fmt: skip


def test_a_library_may_have_no_walk(here: loader.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert here.walk_columns == WIDTHS
    functions = {**abi.WALK_FUNCTIONS, "hopper_walk_absent": (ctypes.c_int32, ())}
    monkeypatch.setattr(abi, "WALK_FUNCTIONS", functions)
    assert loader.Library(stub_file()).walk_columns == ()


def seconds(spec: ConvSpec, columns: int, splits: int = 1, blocks: int = 132) -> float:
    return walk.modelled(spec, Cut(columns, splits), blocks)


def test_the_model_orders_cuts() -> None:
    """What takes longer for sure takes longer by it: more rounds of tiles, more steps, a split that saves no round."""
    assert seconds(SMALL, 32, blocks=10) < seconds(SMALL, 32, blocks=9), "10 tiles in a round, or in two"
    assert seconds(SMALL, 32, blocks=132) == seconds(SMALL, 32, blocks=10), "blocks without a tile change nothing"
    assert seconds(replace(SMALL, c=1024), 32) < seconds(SMALL, 32)
    assert seconds(SMALL, 32) < seconds(SMALL, 64), "both one round, whose steps are shorter where tiles are narrower"
    assert seconds(SMALL, 32, 2, 10) > seconds(SMALL, 32, 1, 10), "two rounds of half the steps, and the parts"
    assert seconds(SMALL, 64, 8) > seconds(SMALL, 32, 8), "wider parts are more to add"


def test_fewer_rounds_win() -> None:
    """32 columns are the quicker tile, and lose where those of 64 go into one round less."""
    deep = replace(SMALL, h=16, w=16, c=64, kh=3, kw=3, padding=(1,) * 4)  # 9 steps, too few to split in three
    for oc, blocks in ((320, 40), (320, 39), (320, 20), (640, 40)):
        spec = replace(deep, oc=oc)
        rounds = {n: math.ceil(4 * math.ceil(oc / n) / blocks) for n in WIDTHS}
        cut = walk.cut(spec, WIDTHS, blocks)
        assert cut.splits == 1 and cut.columns == (32 if rounds[32] == rounds[64] else 64), (oc, blocks)


def test_k_is_split_only_where_steps_outweigh_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile and more and more steps: whole at first, from somewhere on in parts, and never longer than whole."""
    tile, splits = replace(SMALL, oc=32), []
    for c in range(64, 64 * 400, 64 * 3):
        spec = replace(tile, c=c)
        cut = walk.cut(spec, WIDTHS, 132)
        assert cut.columns == 32 and walk.modelled(spec, cut, 132) <= seconds(spec, 32)
        splits.append(cut.splits > 1)
    assert not splits[0] and splits == sorted(splits) and splits[-1]
    full = replace(tile, c=64 * 400, oc=32 * 132)
    assert walk.cut(full, (32,), 132).splits == 1, "every block has a tile of its own already"
    monkeypatch.setattr(walk, "SPLIT_SECONDS", 1.0)
    assert walk.cut(replace(tile, c=64 * 400), WIDTHS, 132).splits == 1, "a mutant of the model: no split pays"


def test_no_part_of_k_is_shorter_than_four_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "SPLIT_SECONDS", 0.0)
    monkeypatch.setattr(walk, "PART_SECONDS", 0.0)
    for c, most in ((64 * 7, 1), (64 * 8, 2), (64 * 31, 6), (64 * 32, 8)):
        assert walk.cut(replace(SMALL, c=c), (32,), 1000).splits == most
    with pytest.raises(ValueError, match="no widths of tiles; allowed: those of a library with a walk"):
        walk.cut(SMALL, (), 132)


@dataclass
class Bench:
    """Maps and jobs of a test. x [1, 9, 11, 16]; `maps` are channels of wider pixels, NaN beside them."""

    dtype: torch.dtype
    kind: str

    def map(self, h: int, w: int, c: int, values: Tensor | None = None) -> Map:
        whole = torch.full((1, h, w, c + 16), float("nan"), dtype=self.dtype)
        if values is not None:
            whole[..., 8 : 8 + c] = values.permute(0, 2, 3, 1)
        return dense(whole).channels(8, c)

    def conv(self, x: Map, y: Map, kernel: int = 1, seed: int = 0, residual: Map | None = None) -> tuple[Problem, Any]:
        spec = ConvSpec(
            1, x.h, x.w, x.c, y.c, kernel, kernel, padding=(kernel // 2,) * 4, residual=residual is not None,
            dtype=self.kind,
        )  # fmt: skip
        params = (
            numerics.random(y.c, x.c, kernel, kernel, seed=seed, dtype=self.dtype) / 4,
            numerics.random(y.c, seed=seed + 1, low=0.5),
            numerics.random(y.c, seed=seed + 2),
        )
        packed = convolve.pack(*params, self.dtype, "cpu")
        return Problem(spec, x, packed, (Target(y, True),), residual, 0.5 if residual else 1.0), params


def values_of(place: Map) -> Tensor:
    """[n, c, h, w] of a map, float64."""
    strides = (place.h * place.w * place.pitch, place.w * place.pitch, place.pitch, 1)
    view = place.data.as_strided((place.n, place.h, place.w, place.c), strides)
    return view.permute(0, 3, 1, 2).double()


POOLS = (
    PoolSpec(1, 9, 11, 16, 3, 2, (2, 1), (2, 1, 1, 0)),
    PoolSpec(1, 9, 11, 16, 3, 2, (2, 1), (1, 2, 0, 1), "avg"),
    PoolSpec(1, 9, 11, 16, 3, 2, (2, 1), (1, 2, 0, 1), "avg", count_include_pad=True),
    PoolSpec(1, 9, 11, 16, 2, 3, (2, 2), (0, 0, 0, 0), "avg", overhang=(1, 0)),
    PoolSpec(1, 9, 11, 16, 2, 3, (2, 2), (1, 0, 0, 0), "avg", count_include_pad=True, overhang=(1, 0)),
    PoolSpec(1, 9, 11, 16, 9, 11, kind="avg"),
)


@pytest.mark.parametrize("spec", POOLS, ids=lambda spec: f"{spec.kind}{int(spec.count_include_pad)}{spec.overhang}")
@pytest.mark.parametrize("plain", (True, False))
def test_a_pool(here: loader.Library, spec: PoolSpec, plain: bool) -> None:
    """Windows, strides and paddings that differ by side: a swapped field gives other numbers. Sums are exact."""
    bench = Bench(HALF, "float16")
    spec = replace(spec, dtype="float16")
    x = bench.map(9, 11, 16, numerics.integers(1, 16, 9, 11, dtype=HALF, limit=9))
    y = bench.map(spec.oh, spec.ow, 16)
    shift = None if plain else numerics.integers(16, seed=4, limit=3)
    assert walk.pool_reasons(here, spec) == []
    walk.launch("pool", here, [Job(Pooling(spec, x, y, shift, not plain))], CPU).run()
    wanted = reference.pool(
        values_of(x), (spec.kh, spec.kw), spec.stride, spec.padding, kind=spec.kind, overhang=spec.overhang,
        count_include_pad=spec.count_include_pad, shift=None if shift is None else shift.double(), relu=not plain,
    )  # fmt: skip
    numerics.assert_exact(values_of(y).to(HALF), wanted.to(HALF))
    whole = torch.empty(0, dtype=HALF).set_(y.data.untyped_storage()).view(-1, 32)
    assert whole[:, :8].isnan().all() and whole[:, 24:].isnan().all(), "channels beside it were written to"


@pytest.mark.parametrize("dtype", (torch.bfloat16, HALF))
def test_a_chain_with_a_residual_and_split_sums(here: loader.Library, dtype: torch.dtype) -> None:
    """In any order that needs allow, and the counters of split tiles are left zero for the next launch."""
    bench = Bench(dtype, str(dtype).removeprefix("torch."))
    x = bench.map(9, 11, 16, numerics.random(1, 16, 9, 11, dtype=dtype))
    a, b, c = bench.map(9, 11, 24), bench.map(9, 11, 24), bench.map(9, 11, 24)
    first, _ = bench.conv(x, a, 3, 1)
    pool = Pooling(PoolSpec(1, 9, 11, 24, 3, 3, padding=(1, 1, 1, 1), dtype=bench.kind), a, b)
    last, params = bench.conv(b, c, 1, 5, residual=a)
    jobs = [Job(first, Cut(32, 3)), Job(pool, None, (0,)), Job(last, Cut(64, 2), (1,))]
    made = walk.launch("chain", here, jobs, CPU)
    seen = []
    for seed in range(3):
        with walking_in_order(seed):
            made.run()
        seen.append(values_of(c))
    weight, scale, shift = (t.double() for t in params)
    wanted = reference.conv(values_of(b), weight, scale, shift, residual=values_of(a), residual_scale=0.5)
    numerics.assert_close_budget(values_of(c).to(dtype), wanted)
    assert all(torch.equal(seen[0], other) for other in seen) and launched() == [(3, "walk", False, 3)] * 3


def test_a_need_left_out_shows(here: loader.Library) -> None:
    bench = Bench(HALF, "float16")
    x = bench.map(9, 11, 16, numerics.random(1, 16, 9, 11, dtype=HALF))
    a, b = bench.map(9, 11, 16), bench.map(9, 11, 16)
    jobs = [Job(bench.conv(x, a)[0], Cut(32)), Job(bench.conv(a, b)[0], Cut(32))]
    walk.launch("two", here, jobs, CPU).run()
    assert values_of(b).isnan().all(), "the second ran first"
    walk.launch("two", here, [jobs[0], jobs[1]._replace(needs=(0,))], CPU).run()
    assert values_of(b).isfinite().all()


def test_memory_is_aligned_zeroed_and_filled(here: loader.Library) -> None:
    bench = Bench(HALF, "float16")
    x, y = bench.map(9, 11, 16, numerics.random(1, 16, 9, 11, dtype=HALF)), bench.map(9, 11, 16)
    made = walk.launch("one", here, [Job(bench.conv(x, y)[0], Cut(64, 2))], CPU)
    _, table, workspace = made.kept
    sizes = here.walk_sizes([walk.described(Job(bench.conv(x, y)[0], Cut(64, 2)))], 4)
    assert (table.numel(), workspace.numel()) == (sizes.table, sizes.workspace) and sizes.counters == 256
    assert table.data_ptr() % 128 == workspace.data_ptr() % 256 == 0
    assert table.any() and not workspace.any()
    made.run()
    assert not workspace[: sizes.counters].any() and workspace.any()
    workspace[8] = 1
    with pytest.raises(RuntimeError, match="a counter of the workspace is not zero"):
        made.run()


def test_what_cannot_run_is_explained(here: loader.Library) -> None:
    bench = Bench(HALF, "float16")
    x, y = bench.map(9, 11, 16), bench.map(9, 11, 16)
    problem = bench.conv(x, y)[0]
    pool = Pooling(PoolSpec(1, 9, 11, 16, 3, 3, dtype="float32"), x, y)
    cases: dict[str, list[Job]] = {
        "w: job 0: columns 48; allowed: 32, 64": [Job(problem, Cut(48))],
        "w: job 0: needs job 0; allowed: earlier ones": [Job(problem, Cut(32), (0,))],
        "a convolution without a cut; allowed: columns and splits": [Job(problem)],
        "a job that needs 17 others; allowed: up to 16": [Job(problem, Cut(32), tuple(range(17)))],
        "w: jobs of dtypes float16, float32; allowed: jobs of one dtype": [Job(problem, Cut(32)), Job(pool)],
        "w: jobs of dtypes none; allowed": [],
    }
    for why, jobs in cases.items():
        with pytest.raises(ValueError, match=re.escape(why)):
            walk.launch("w", here, jobs, CPU)
    spec, cut = problem.spec, Cut(32)
    assert walk.conv_reasons(here, spec, (8, 8), cut) == []
    assert walk.conv_reasons(here, replace(spec, groups=2), (16,), cut) == ["groups 2; allowed: 1"]
    assert walk.conv_reasons(here, replace(spec, c=12), (16,), cut)[0] == "job 0: c 12; allowed: multiples of 8"
    assert walk.pool_reasons(here, pool.spec) == ["dtype float32; allowed: bfloat16, float16"]
    assert walk.pool_reasons(here, replace(pool.spec, c=12, dtype="float16")) != []
    with pytest.raises(RuntimeError, match="blocks 0; allowed: 1 or more"):
        here.walk_sizes([], 0)


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (((), (0,), (0, 1)), ((), (0,), (1,))),  # the second waits for the first
        (((), (), (0, 1)), ((), (), (0, 1))),
        (((), (0,), (0,), (0, 1, 2)), ((), (0,), (0,), (1, 2))),
        (((), (0,), (1,), (0, 2)), ((), (0,), (1,), (2,))),  # through one that is not named
    ],
)
def test_needs_that_others_imply_are_left_out(needs: Any, expected: Any) -> None:
    assert gpu_walk.reduced(needs) == expected


def test_the_first_walk_is_proved(here: loader.Library) -> None:
    """By each kind of tile, with rows of x that stay and without, in either format, twice each."""
    assert check.wrong_walks(here, CPU) == ""
    assert launched() == [(5, "walk", False, 4)] * 16
    kinds = [type(step) for step in check.STEPS]
    assert kinds == [ConvSpec, PoolSpec, ConvSpec, PoolSpec, ConvSpec] and len(check.PARTS) == 5


def unordered(needs: tuple[int, ...], *args: Any, **fields: Any) -> abi.Job:
    return FILLED((), *args, **fields)


def in_16_bits(job: Job) -> abi.Job:
    made = DESCRIBED(job)
    made.conv.output[0].relu &= ~abi.FLOAT32
    return made


def once(self: walk.WalkLaunch) -> None:
    if "ran" not in vars(self):
        LAUNCH(self)
    vars(self)["ran"] = True


def other_pool(*args: Any) -> abi.Pool:
    made = POOL(*args)
    made.kind = abi.AVERAGE_POOL
    return made


FILLED, DESCRIBED, POOL, PACK, LAUNCH = walk._filled, walk.described, walk._pool, convolve.pack, walk.WalkLaunch.run
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "nothing runs": (walk.WalkLaunch, "run", lambda self: None),
    "only the first run": (walk.WalkLaunch, "run", once),
    "jobs wait for nothing": (walk, "_filled", unordered),
    "float32 is forgotten": (walk, "described", in_16_bits),
    "maxima are means": (walk, "_pool", other_pool),
    "another order of weights": (convolve, "pack", lambda w, *rest: PACK(w.flip(0), *rest)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_first_walk_is_noticed(here: loader.Library, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(*MUTANTS[name])
    named = ", ".join(
        f"{n} columns{stays} in {kind}"
        for kind in ("bfloat16", "float16")
        for n in WIDTHS
        for stays in ("", " whose rows stay")
    )
    assert check.wrong_walks(here, CPU) == f"the first walk gave wrong numbers with {named}"


def test_a_split_whose_parts_are_lost_is_noticed(here: loader.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the third step alone, by one form of tile in one format: the check names what is wrong and nothing else."""
    right = here.prepare_walk

    def prepare(jobs: Any, dtype: str, *rest: Any) -> Any:
        if dtype == "float16" and jobs[2].columns == 64 and not jobs[0].halo:
            jobs[2].conv.c -= 8  # as if a last part ended early
        return right(jobs, dtype, *rest)

    monkeypatch.setattr(here, "prepare_walk", prepare)
    assert check.wrong_walks(here, CPU).endswith("wrong numbers with 64 columns in float16")


def test_walks_alone_are_refused_where_the_first_was_wrong(
    here: loader.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked once a device, for plans of one image alone; a walk that fails is told as well; launches are trusted."""
    asked: list[torch.device] = []

    def found(kernels: Any, device: torch.device) -> str:
        asked.append(device)
        if len(asked) > 1:
            raise RuntimeError("unspecified launch failure")
        return "the first walk gave wrong numbers with 32 columns in bfloat16"

    gpu, other = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(loader, "walk_verdicts", {})
    monkeypatch.setattr(check, "wrong_walks", found)
    monkeypatch.setattr(check, "refusal", lambda device: "")
    monkeypatch.setattr(check.loader, "library", stub)
    monkeypatch.setattr(gpu_hopper.cuda, "library", stub)
    monkeypatch.setattr(gpu_hopper.hopper_gpu, "measured", lambda device: ("a GPU", ()))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    one, two = ([Buffer(n, 8, 8, 64, "arena", "bfloat16")] for n in (1, 2))
    for _ in range(2):
        asked_before = len(asked)
        hopper = gpu_hopper.of(gpu, "bfloat16", "cuda", True)
        assert hopper is not None and not gpu_walk.possible(hopper, two) and len(asked) == asked_before
        assert not gpu_walk.possible(hopper, one)
        assert gpu_walk.denied(hopper, one) == "the first walk gave wrong numbers with 32 columns in bfloat16"
        assert gpu_walk.denied(hopper, two) == ""
    assert asked == [gpu] and loader.distrusted() == ""
    assert check.walk_refusal(other) == "GPU 1: the first walk failed: unspecified launch failure"
    monkeypatch.setattr(loader, "walk_verdicts", {0: ""})
    hopper = gpu_hopper.of(gpu, "bfloat16", "cuda", True)
    assert hopper is not None and gpu_walk.possible(hopper, one) and gpu_walk.denied(hopper, one) == ""
