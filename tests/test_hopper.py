"""The Python side of the Hopper kernels, over a library of plain loops behind the same C interface."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inception_fast.kernels.cuda import abi, check, choices, convolve, driver, loader, pair, tune
from inception_fast.kernels.cuda.choices import Row, Shape
from inception_fast.kernels.cuda.convolve import Cut, Problem, Target
from inception_fast.kernels.maps import dense
from inception_fast.kernels.spec import ConvSpec, PairSpec, PoolSpec
from torch import Tensor

import inception_fast as fast
import numerics
import op_calls
from checkout import ROOT
from hopper_library import launched, stub_file
from inception_fast import _fused, dispatch
from inception_fast.backends import hopper_gpu, truth
from inception_fast.engine import gpu_tune

HALF, BRAIN = torch.float16, torch.bfloat16
SPEC = ConvSpec(2, 5, 6, 16, 24, 1, 3, padding=(0, 0, 1, 1), dtype="float16")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[loader.Library]:
    """The stub in place of the built loader."""
    monkeypatch.setattr(loader, "FILE", stub_file())
    launched()
    yield loader.library()


def test_structures_match_the_header() -> None:
    library, theirs = ctypes.CDLL(str(stub_file())), list[int]()
    for layout in (library.stub_layout, library.stub_walk_layout):
        values = (ctypes.c_int64 * 200)()
        theirs += values[: layout(values, len(values))]
    mine = []
    for structure in abi.STRUCTURES.values():
        mine.append(ctypes.sizeof(structure))
        mine += [getattr(structure, field[0]).offset for field in structure._fields_]
    assert mine == theirs


def test_the_header_declares_what_is_bound() -> None:
    """Every function of the headers is bound with as many arguments, and the constants agree."""
    headers = [(ROOT / "kernels/cuda" / name).read_text() for name in ("api.h", "pair_api.h", "walk_api.h")]
    text = re.sub(r"//.*", "", "".join(headers))
    found = {name: args for name, args in re.findall(r"\b(hopper_\w+)\(([^)]*)\);", text)}
    counts = {name: 0 if args == "void" else args.count(",") + 1 for name, args in found.items()}
    bound = abi.FUNCTIONS | abi.PAIR_FUNCTIONS | abi.WALK_FUNCTIONS | abi.TRACE_FUNCTIONS
    assert counts == {name: len(given) for name, (_, given) in bound.items()}
    constants = dict(re.findall(r"#define (HOPPER_\w+) (\d+)", text))
    sizes = {"HOPPER_ABI": abi.ABI, "HOPPER_GROUP": abi.GROUP, "HOPPER_OUTPUTS": abi.OUTPUTS, "HOPPER_NEEDS": abi.NEEDS,
             "HOPPER_WALK_MARKS": abi.WALK_MARKS, "HOPPER_FLOAT32": abi.FLOAT32}  # fmt: skip
    assert constants == {name: str(value) for name, value in sizes.items()}


def test_what_the_headers_declare_is_exported(tmp_path: Path) -> None:
    """The library is compiled with everything hidden; a pair or a walk that is not found counts as not built."""
    folder, file = ROOT / "kernels" / "cuda", tmp_path / "part.so"
    sources = [folder / f"{name}.cpp" for name in ("conv_api", "conv_reasons", "pair_reasons", "walk_api")]
    command = ["c++", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", *sources, "-o", file]
    subprocess.run(list(map(str, command)), check=True)
    library = ctypes.CDLL(str(file))
    assert library.hopper_conv_configs(None, 0) > 0 and library.hopper_pair_configs(None, 0) > 0
    assert library.hopper_walk_columns(None, 0) > 0
    for name in ("api.h", "pair_api.h", "walk_api.h"):
        opened, inside = (folder / name).read_text().split("#pragma GCC visibility push(default)")
        assert "hopper_" not in re.sub(r"//.*", "", opened + inside.split("#pragma GCC visibility pop")[1])


def test_importing_and_asking_starts_nothing() -> None:
    program = (
        "import sys, torch, inception_fast as fast\n"
        "from inception_fast.kernels import cuda\n"
        "maps = lambda: open('/proc/self/maps').read()\n"
        "assert '_hopper' not in maps()\n"
        "cuda.missing(), fast.backend_status()\n"
        "assert not torch.cuda.is_initialized() and 'triton' not in sys.modules and 'libcuda.so' not in maps()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_missing_or_foreign_library_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "FILE", tmp_path / "_hopper.so")
    assert "were not built" in loader.missing() and "nvcc" in loader.missing()
    with pytest.raises(RuntimeError, match="were not built"):
        loader.library()
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    monkeypatch.setattr(loader, "FILE", other)
    assert "cannot be loaded" in loader.missing()
    monkeypatch.setattr(loader, "FILE", stub_file())
    assert loader.missing() == ""
    built = abi.ABI
    monkeypatch.setattr(abi, "ABI", 99)
    with pytest.raises(OSError, match=f"interface {built}; allowed: 99"):
        loader.Library(stub_file())


def test_the_driver_is_asked_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "nvml.c"
    source.write_text(
        "int nvmlInit_v2(void) { return 0; }\nint nvmlShutdown(void) { return 0; }\n"
        "int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }\n"
        "int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) { *d = (void *)(unsigned long)(i + 1); return 0; }\n"
        "int nvmlDeviceGetCudaComputeCapability(void *d, int *a, int *b)\n"
        "{ *a = d == (void *)1 ? 8 : 9; *b = 0; return 0; }\n"
    )
    file = tmp_path / "nvml.so"
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(file)], check=True)
    for name, expected in ((str(file), ((8, 0), (9, 0))), (str(tmp_path / "none.so"), None)):
        monkeypatch.setattr(driver, "NVML", name)
        driver.capabilities.cache_clear()
        assert driver.capabilities() == expected
    driver.capabilities.cache_clear()
    assert driver.refusal(((8, 0), (9, 0))) == driver.refusal(None) == ""
    assert "8.0, 8.6; allowed: 9.0" in driver.refusal(((8, 6), (8, 0)))


def test_status_tells_built_driver_and_architecture(
    here: loader.Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "DRIVER_FILES", (__file__,))
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def status(gpus: Any, file: Path) -> dispatch.Status:
        monkeypatch.setattr(loader, "FILE", file)
        monkeypatch.setattr(driver, "capabilities", lambda: gpus)
        dispatch._probe.cache_clear()
        return fast.backend_status()["cuda"]

    try:
        assert status(((9, 0),), stub_file()) == fast.Available("sm_90a")
        assert status(None, stub_file()) == fast.Available("sm_90a")
        assert "8.9; allowed: 9.0" in str(status(((8, 9),), stub_file()))
        assert "not built" in str(status(((9, 0),), tmp_path / "_hopper.so"))
        assert status(((9, 0),), stub_file())
        monkeypatch.setitem(loader.verdicts, 0, "the first convolution gave wrong numbers with 1x1")
        assert fast.backend_status()["cuda"] == fast.Unavailable("the first convolution gave wrong numbers with 1x1")
    finally:
        dispatch._probe.cache_clear()


def test_the_first_convolution_is_proved(here: loader.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right numbers pass for every configuration, whole and split; another weight order is noticed."""
    device = torch.device("cpu")
    assert check.wrong(here, device) == check.wrong_behind(here, device) == check.wrong_pooled(here, device) == ""
    seen = {(name, splits) for _, name, _, splits in launched()}
    expected = {(config.name, splits) for config in here.configs for splits in (1, 2) if splits == 1 or not config.halo}
    assert seen == expected | {(config.name, 1) for config in here.pair_configs}
    monkeypatch.setattr(convolve, "pack", lambda w, *rest, right=convolve.pack: right(w.flip(3), *rest))
    said = check.wrong(here, device)
    assert "gave wrong numbers with 128x64x64 s4, 128x64x64 s4 in 2" in said and "pair 192, pair 256 c2" in said
    assert "128x128x64 s4 in 2 in float16" in said and "behind" not in said and "pooled" not in said
    assert check.wrong_pooled(here, device).endswith("256x64x32 pooled in float16")


def test_reasons_name_what_is_seen(here: loader.Library) -> None:
    assert hopper_gpu.spec_reasons(here, SPEC) == []
    cases = {
        "dtype float32; allowed: bfloat16, float16": replace(SPEC, dtype="float32"),
        "c 12; allowed: multiples of 8": replace(SPEC, c=12),
        "oc 20; allowed: multiples of 8": replace(SPEC, oc=20),
        "groups 2; allowed: 1": replace(SPEC, groups=2),
    }
    for why, spec in cases.items():
        assert why in hopper_gpu.spec_reasons(here, spec)
    assert "a pool; allowed: convolutions and pairs" in hopper_gpu.spec_reasons(here, PoolSpec(1, 8, 8, 8, 2, 2))
    assert "9 destinations; allowed: up to 8" in convolve.spec_reasons(here, replace(SPEC, oc=72), (8,) * 9)


@pytest.mark.parametrize("oc", (32, 64, 80))
def test_the_stem_behind_the_first_convolution_is_taken(here: loader.Library, oc: int) -> None:
    for c, kernel in ((32, 3), (64, 1)):
        assert hopper_gpu.spec_reasons(here, ConvSpec(1, 20, 20, c, oc, kernel, kernel, dtype="bfloat16")) == []


def both(spec: Any, x: Tensor, params: Any, old: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What the backend gives through the stub, and the reference in float64."""
    prepared = hopper_gpu.prepare(spec, params, x, old, scale)
    y = hopper_gpu.run(prepared, x, old, torch.channels_last)
    wide = tuple(tuple(t.double() for t in triple) for triple in params)
    there = None if old is None else old.double()
    wanted = truth.run(truth.prepare(spec, wide, x.double(), there, scale), x.double(), there, torch.channels_last)
    assert y.stride() == wanted.stride() and y.dtype is x.dtype
    return y, wanted


def draws(spec: ConvSpec, seed: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    dtype = getattr(torch, spec.dtype)
    x = numerics.random(spec.n, spec.c, spec.h, spec.w, seed=seed, dtype=dtype)
    weight = numerics.random(spec.oc, spec.c, spec.kh, spec.kw, seed=seed + 1, dtype=dtype)
    return x, (weight, numerics.random(spec.oc, seed=seed + 2, low=0.5), numerics.random(spec.oc, seed=seed + 3))


# Asymmetric kernel, stride and padding: a swapped field gives other numbers.
AWKWARD = ConvSpec(2, 9, 11, 16, 24, 3, 2, (2, 1), (2, 1, 1, 0))


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("relu", (False, True))
def test_conv(here: loader.Library, dtype: str, residual: bool, relu: bool) -> None:
    spec = replace(AWKWARD, dtype=dtype, residual=residual, relu=relu)
    x, params = draws(spec)
    old = numerics.random(spec.n, spec.oc, spec.oh, spec.ow, seed=9, dtype=x.dtype) if residual else None
    numerics.assert_close_budget(*both(spec, x, (params,), old, 0.17 if residual else 1.0))
    assert len(launched()) == 1


@pytest.mark.parametrize("kind", ("chain", "split"))
def test_pair(here: loader.Library, kind: str) -> None:
    x, *params = op_calls.pair_arguments(kind, HALF)
    spec = _fused.pair_call(kind, x, *params).spec()
    if hopper_gpu.spec_reasons(here, spec):
        x = numerics.random(2, 16, 7, 9, dtype=HALF)
        first = (numerics.random(24, 16, 1, 3, seed=1, dtype=HALF), torch.ones(24), numerics.random(24, seed=2))
        c = 24 if kind == "chain" else 16
        second = (numerics.random(32, c, 3, 1, seed=3, dtype=HALF), torch.ones(32), numerics.random(32, seed=4))
        params, spec = [*first, *second], _fused.pair_call(kind, x, *first, *second).spec()
    y, wanted = both(spec, x, (tuple(params[:3]), tuple(params[3:])))
    numerics.assert_close_budget(y, wanted, roundings=2 if kind == "chain" else 1)
    assert [count for count, *_ in launched()] == ([1, 1] if kind == "chain" else [2])


@pytest.mark.parametrize("wide_first", (True, False))
@pytest.mark.parametrize("relu", ((True, False), (False, True)))
def test_a_fused_pair(here: loader.Library, wide_first: bool, relu: tuple[bool, bool]) -> None:
    """Sizes, taps and acts that all differ, so that a swapped field gives other numbers; pixels wider than the maps."""
    one, two = ((1, 5), (5, 1)) if wide_first else ((5, 1), (1, 5))
    first = ConvSpec(
        2, 6, 7, 16, 20, *one, padding=(one[0] // 2,) * 2 + (one[1] // 2,) * 2, relu=relu[0], dtype="float16"
    )
    second = ConvSpec(
        2, 6, 7, 20, 24, *two, padding=(two[0] // 2,) * 2 + (two[1] // 2,) * 2, relu=relu[1], dtype="float16"
    )
    spec = PairSpec(first, second)
    (x, left), (_, right) = draws(first), draws(second, 7)
    wide = torch.full((2, 6, 7, 32), float("nan"), dtype=HALF)
    wide[..., 8:24] = x.permute(0, 2, 3, 1)
    whole = torch.full((2, 6, 7, 40), float("nan"), dtype=HALF)
    packed = convolve.pack(*left, HALF, "cpu"), convolve.pack(*right, HALF, "cpu")
    place = dense(whole).channels(16, 24)
    assert [config.name for config in pair.able(here, spec)] == ["pair 192", "pair 256 c2"]
    pair.launch("both", here, spec, dense(wide).channels(8, 16), packed, place, here.pair_configs[0]).run()
    middle = wanted_of(first, x, left).half()
    wanted = wanted_of(second, middle, right)
    numerics.assert_close_budget(whole[..., 16:].permute(0, 3, 1, 2), wanted, roundings=2)
    assert whole[..., :16].isnan().all() and launched() == [(2, "pair 192", False, 1)]


def wanted_of(spec: ConvSpec, x: Tensor, params: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    wide: Any = (tuple(t.double() for t in params),)
    return truth.run(truth.prepare(spec, wide, x.double(), None, 1.0), x.double(), None, torch.channels_last)


def test_pairs_that_are_none_are_refused_by_name(here: loader.Library) -> None:
    first = ConvSpec(1, 6, 6, 16, 16, 1, 5, padding=(0, 0, 2, 2), dtype="float16")
    second = replace(first, kh=5, kw=1, padding=(2, 2, 0, 0))
    assert pair.spec_reasons(here, PairSpec(first, second)) == []
    cases = {
        "kind 'split'; allowed: 'chain'": PairSpec(first, second, "split"),
        "1x5 then 3x1; allowed: 1xn then nx1": PairSpec(first, replace(second, kh=3, padding=(1, 1, 0, 0))),
        "padding (3, 1, 0, 0), groups 1; allowed: SAME": PairSpec(first, replace(second, padding=(3, 1, 0, 0))),
        "dtype float32": PairSpec(replace(first, dtype="float32"), replace(second, dtype="float32")),
        "mid 264": PairSpec(replace(first, oc=264), replace(second, c=264)),
    }
    for why, spec in cases.items():
        assert why in "; ".join(pair.spec_reasons(here, spec))
    with pytest.raises(ValueError, match="configuration 'pair 1'; allowed: pair 192, pair 256 c2"):
        here.pair_config("pair 1")


def test_layouts_and_odd_addresses_give_the_same_numbers(here: loader.Library) -> None:
    x, params = draws(SPEC)
    prepared = hopper_gpu.prepare(SPEC, (params,), x, None, 1.0)
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(2, 5, 6, 16).copy_(x.permute(0, 2, 3, 1))
    assert odd.data_ptr() % 16
    given = [numerics.as_layout(x, layout) for layout in numerics.LAYOUTS] + [odd.permute(0, 3, 1, 2)]
    results = [hopper_gpu.run(prepared, each, None, torch.contiguous_format) for each in given]
    assert all(torch.equal(results[0], y) for y in results[1:]) and results[0].is_contiguous()


def test_weights_are_packed_once_and_again_after_a_change(here: loader.Library) -> None:
    x, params = draws(SPEC)
    first = hopper_gpu.prepare(SPEC, (params,), x, None, 1.0)
    assert hopper_gpu.prepare(replace(SPEC, n=1), (params,), x, None, 1.0).compiled is first.compiled
    params[0].mul_(2)
    assert hopper_gpu.prepare(SPEC, (params,), x, None, 1.0).compiled is not first.compiled


def test_an_empty_batch_gives_an_empty_result(here: loader.Library) -> None:
    spec = replace(SPEC, n=0)
    x, params = draws(spec)
    y = hopper_gpu.run(hopper_gpu.prepare(spec, (params,), x, None, 1.0), x, None, torch.channels_last)
    assert y.shape == (0, 24, 5, 6) and launched() == []


def test_a_group_scatters_and_splits(here: loader.Library) -> None:
    """Two convolutions in one launch, one with two destinations, their walk over K in three parts."""
    x, (weight, scale, shift) = draws(SPEC)
    source = dense(x.permute(0, 2, 3, 1).contiguous())
    packed = convolve.pack(weight, scale, shift, HALF, "cpu")
    outputs = [torch.full((2, 5, 6, 24), float("nan"), dtype=HALF) for _ in range(2)]
    whole, parted = map(dense, outputs)
    problems = [
        Problem(SPEC, source, packed, (Target(whole, True),)),
        Problem(SPEC, source, packed, (Target(parted.channels(16, 8), True), Target(parted.channels(0, 16), False))),
    ]
    convolve.group("both", here, problems, Cut(here.configs[0], 3)).run()
    wanted = truth.run(
        truth.prepare(SPEC, ((weight.double(), scale.double(), shift.double()),), x.double(), None, 1.0),
        x.double(), None, torch.channels_last,
    ).permute(0, 2, 3, 1)  # fmt: skip
    numerics.assert_close_budget(outputs[0], wanted)
    numerics.assert_close_budget(outputs[1][..., 16:], wanted[..., :8])
    assert (outputs[1][..., :16] < 0).any() and torch.equal(outputs[1][..., :16].relu(), outputs[0][..., 8:])
    assert launched() == [(2, here.configs[0].name, False, 3)]


def test_launches_in_turn_share_a_workspace(here: loader.Library) -> None:
    """The counters of all end at one address, so that nobody's sums fall on another's counters."""
    place = convolve.workspace([(1000, 128), (5000, 384), (300, 0)], torch.device("cpu"))
    assert place is not None and place.data.numel() == 384 + 4616 and not place.data.any()
    start = place.data.data_ptr()
    assert [place.placed(*size) - start for size in ((1000, 128), (5000, 384), (300, 0))] == [256, 0, 384]
    with pytest.raises(ValueError, match="a workspace of 5000 bytes, 384 of them counters; needed: 5001, 384"):
        place.placed(5001, 384)
    assert convolve.workspace([(0, 0)], torch.device("cpu")) is None


def test_a_failed_question_raises(here: loader.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library answers -1 where a question fails: taken for a size it would place a workspace before its start."""
    monkeypatch.setattr(here._c, "hopper_conv_workspace_bytes", lambda *words: -1)
    monkeypatch.setattr(here._c, "hopper_error", lambda: b"oc 12; allowed: positive multiples of 8")
    with pytest.raises(RuntimeError, match="oc 12; allowed"):
        here.workspace_bytes([convolve.blank(SPEC, (24,))], here.configs[0])


def test_refused_groups_name_the_reason(here: loader.Library) -> None:
    x, params = draws(SPEC)
    packed, y = convolve.pack(*params, HALF, "cpu"), torch.empty(2, 5, 6, 32, dtype=HALF)
    target = Target(dense(y).channels(4, 24), True)
    problem = Problem(SPEC, dense(x.permute(0, 2, 3, 1).contiguous()), packed, (target,))
    with pytest.raises(ValueError, match="odd with 128x64x64 s4: output 0 is not on 16 bytes"):
        convolve.group("odd", here, [problem], Cut(here.configs[0]))


def test_the_model_splits_where_the_machine_would_idle(here: loader.Library) -> None:
    small = ConvSpec(1, 17, 17, 192, 192, 1, 7, padding=(0, 0, 3, 3), dtype="bfloat16")
    one, many = convolve.predicted(here, small), convolve.predicted(here, replace(small, n=256))
    assert one.splits > 1 and many.splits == 1
    with pytest.raises(ValueError, match="c 3; allowed"):
        convolve.predicted(here, replace(small, c=3))


def test_every_cut_is_tried_and_wrong_ones_are_not_timed(here: loader.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPEC, oc=96, c=128, kw=1, padding=(0, 0, 0, 0))
    x, params = draws(spec)
    timed: list[str] = []
    right = convolve.group

    def group(name: str, kernels: Any, problems: Any, cut: Cut, **options: Any) -> Any:
        if cut.config is here.configs[1]:
            wrong = problems[0]._replace(packed=convolve.pack(params[0] + 1, *params[1:], HALF, "cpu"))
            return right(name, kernels, [wrong], cut, **options)
        return right(name, kernels, problems, cut, **options)

    def timer(call: Any) -> float:
        call()
        timed.append(launched()[-1][1])
        return 1.0 / len(timed)

    monkeypatch.setattr(convolve, "group", group)
    found = tune.tried(here, spec, x, *params, timer)
    assert {cut.config for cut in found} == {here.configs[0], here.configs[2]} and len(found) == len(timed) == 2
    with pytest.raises(RuntimeError, match=r"no configuration of .* runs"):
        tune.tried(here, replace(spec, c=12), x[:, :12], params[0][:, :12], *params[1:], timer)


SHAPE = Shape("conv", "half", 4624, 192, 1344, 7)


def row(gpu: str = "NVIDIA H200", shape: Shape = SHAPE, seconds: float = 1e-5, against: float = 2e-5) -> Row:
    return Row(gpu, shape, "128x64x64 s4", 1, seconds, against)


def test_only_what_was_measured_near_by_is_found() -> None:
    assert choices.nearest(SHAPE, "NVIDIA H200", []) is None
    far, near = row(shape=SHAPE._replace(m=9248)), row(shape=SHAPE._replace(m=5000))
    assert choices.nearest(SHAPE, "NVIDIA H200", [far, near]) == near
    assert choices.nearest(SHAPE._replace(m=40000), "NVIDIA H200", [far, near]) is None
    assert choices.nearest(SHAPE._replace(taps=1), "NVIDIA H200", [far, near]) is None
    assert choices.nearest(SHAPE._replace(kernel="pair"), "NVIDIA H200", [far, near]) is None
    other = row("NVIDIA H100")
    assert choices.nearest(SHAPE, "NVIDIA H200", [other, near]) == near, "this GPU's own rows come first"
    assert choices.nearest(SHAPE, "NVIDIA GH200", [other, near]) == other
    tuned = row("NVIDIA GH200", SHAPE._replace(m=9 * SHAPE.m))
    assert choices.nearest(SHAPE, "NVIDIA GH200", [near, tuned]) == near, "what was measured here is far"
    assert choices.nearest(SHAPE, "NVIDIA H200", [row(seconds=3e-5), row()]) == row(), "a later row wins"


def test_rows_survive_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    file = choices.cache_file("A GPU/1", 1)
    assert choices.tuned("A GPU/1", 1) == choices.shipped()
    for one in (row(seconds=5e-5), row("A GPU/1"), row()):
        choices.keep(file, one)
    assert choices.tuned("A GPU/1", 1) == (*choices.shipped(), row("A GPU/1"), row())
    assert choices.tuned("A GPU/1", 2) == choices.shipped(), "kernels of another version were not measured"
    whole = '{"rows": [["g", "%s", "half", 1, 1, 1, 1, %s, 1, %s, 1.0]]}'
    for values in ((), ("fft", '"c"', "1.0"), ("conv", '"c"', "NaN"), ("conv", '"c"', "0.0"), ("conv", "1", "1.0")):
        file.write_text(whole % values if values else whole[:20])
        with pytest.raises(ValueError, match=f"{file.name} holds no choices of kernels"):
            choices.read(file)


def test_a_race_is_kept_where_the_kernels_run(
    here: loader.Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest cut beside Triton's best, in the cache that plans read; nothing where the backend cannot run."""
    status = {"cuda": fast.Available("sm_90a")}
    found = {Cut(here.configs[0]): 3e-5, Cut(here.configs[1], 2): 1e-5}
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(dispatch, "backend_status", lambda: status)
    monkeypatch.setattr(hopper_gpu, "reasons", lambda spec: [])
    monkeypatch.setattr(tune, "tried", lambda *words, **options: found)
    monkeypatch.setattr(gpu_tune, "_draws", lambda *words: ())
    alone = gpu_tune.Wanted(SPEC, (SPEC,))
    kept = gpu_tune.raced(alone, 2e-5, torch.device("cpu"))
    assert kept == Row("NVIDIA H200", hopper_gpu.shape_of(SPEC), here.configs[1].name, 2, 1e-5, 2e-5)
    tuned = choices.tuned("NVIDIA H200", abi.ABI)
    assert tuned[-1] == kept
    assert choices.nearest(hopper_gpu.shape_of(replace(SPEC, n=3)), "NVIDIA H200", tuned) == kept
    status["cuda"] = fast.Unavailable("not built")  # type: ignore[assignment]
    assert gpu_tune.raced(alone, 2e-5, torch.device("cpu")) is None


def test_the_shipped_rows_are_whole() -> None:
    about = json.loads(choices.SHIPPED.read_text())["about"]
    assert about["origin"] and all(one.seconds > 0 for one in choices.shipped())


def test_a_measured_cut_is_taken_where_it_runs(here: loader.Library) -> None:
    wide = row()._replace(config=here.configs[2].name, splits=2)
    assert hopper_gpu.cut_of(here, replace(SPEC, c=128, oc=192), row=wide) == Cut(here.configs[2], 2)
    assert hopper_gpu.cut_of(here, SPEC, row=wide).config in here.configs[:2], "96 columns do not fit 24"
    unknown = wide._replace(config="1x1")  # of other kernels: by a table of the user's, say
    assert hopper_gpu.cut_of(here, SPEC, row=unknown) == hopper_gpu.cut_of(here, SPEC)


def test_a_measured_cut_has_fewer_parts_where_there_are_too_few_steps(here: loader.Library) -> None:
    """A row within reach may be of a longer K: of 1x1 from 1024 channels for one from 256."""
    spec, longer = (ConvSpec(1, 8, 8, c, 320, 1, 1, dtype="float16") for c in (256, 1024))
    tuned = Row("", hopper_gpu.shape_of(longer), here.configs[0].name, 8, 1e-6, 2e-6)
    assert hopper_gpu.cut_of(here, longer, row=choices.nearest(hopper_gpu.shape_of(spec), "", [tuned])).splits == 8
    assert hopper_gpu.cut_of(here, spec, row=tuned) == Cut(here.configs[0], 2), "four steps of 64 channels"


def test_unnamed_the_backend_is_taken_only_where_it_won(here: loader.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is cuda, triton, torch; without a measurement near by "cuda" is passed over, and named it is taken."""
    yes = dict.fromkeys(dispatch.BACKENDS, fast.Available("here"))
    monkeypatch.setattr(dispatch, "_probe", lambda: yes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(check, "refusal", lambda device: "")
    found: list[Row] = []
    monkeypatch.setattr(hopper_gpu, "measured", lambda device: ("NVIDIA H200", tuple(found)))
    spec = ConvSpec(16, 17, 17, 192, 192, 1, 7, padding=(0, 0, 3, 3), dtype="bfloat16")

    def chosen(name: str | None = None) -> str:
        dispatch.choose.cache_clear()
        return dispatch.choose(spec, "cuda", name)

    try:
        assert chosen() == "triton" and chosen("cuda") == "cuda"
        found.append(row(against=9e-6))
        assert chosen() == "triton"
        found.append(row())
        assert chosen() == "cuda"
        assert dispatch.explain(replace(spec, dtype="float32"), "cuda")["cuda"] == [
            "dtype float32; allowed: bfloat16, float16"
        ]
    finally:
        dispatch.choose.cache_clear()
