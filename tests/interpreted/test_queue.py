"""What the measuring queue does on a GPU, on small maps and interpreted: the way from a job to its rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inception_fast.kernels.cuda import choices
from inception_fast.kernels.cuda.choices import Row, Shape
from inception_fast.kernels.spec import ConvSpec, PairSpec, PoolSpec
from inception_fast.kernels.triton import configs
from torch import Tensor, nn

import inception_fast as fast
from hopper_library import stub
from inception_fast.backends import hopper_gpu
from inception_fast.engine import gpu_tune
from inception_fast.engine.gpu_tune import Wanted
from inception_fast.engine.session import Session
from queue_modules import loaded

from .maps import DEVICE

LAYERS = {
    "pointwise": (5, 16, 24, (1, 1), 1, (0, 0, 0, 0)),
    "row": (4, 16, 16, (1, 3), 1, (0, 0, 1, 1)),
}


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The modules, with calls run once in place of being timed by events of a GPU."""

    def once(calls: Mapping[str, Callable[[], Any]], *rounds: int, **options: int) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [1e-3, 2e-3, 3e-3] for name in calls}

    names = ("catalogue", "measure", "training_layers", "networks", "hopper", "cuts", "tiles", "ship", "alone")
    with loaded(*names) as modules:
        for module in modules.values():
            if hasattr(module, "LAYERS"):
                monkeypatch.setattr(module, "LAYERS", LAYERS)
            if hasattr(module, "DEVICE"):
                monkeypatch.setattr(module, "DEVICE", DEVICE)
            if hasattr(module, "device_seconds"):
                monkeypatch.setattr(module, "device_seconds", once)
            if hasattr(module, "PAIR_SIZES"):
                monkeypatch.setattr(module, "PAIR_SIZES", {"small_pair": (32, 32, 32)})
        monkeypatch.setattr(modules["measure"], "host_seconds", once)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        yield modules


def test_layers_are_timed_where_they_are_right(queue: dict[str, Any]) -> None:
    monkeyed = queue["measure"]
    *_, rows = monkeyed.layer_rows(2, "float16")
    found = {(row["layer"], row["runtime"]): row for row in rows}
    for layer in LAYERS:
        ours, eager = found[layer, "ours"], found[layer, "eager"]
        assert ours["status"] == eager["status"] == "ok", (ours, eager)
        assert ours["median_ms"] == 2.0 and ours["tflops"] > 0 and ours["back_to_back_ms"] > 0
        assert 0 < ours["rel_error"] < 2.5e-3
        assert found[layer, "xla"]["status"] in ("ok", "unavailable")


def test_tiles_are_tried(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = queue["measure"]
    monkeypatch.setattr(measure, "BATCHES", (1, 2))
    monkeypatch.setattr(measure.tune, "TRIED", 2)
    monkeypatch.setattr(measure.tune.tried, "__kwdefaults__", {**measure.tune.tried.__kwdefaults__, "count": 2})
    parts = [list(rows) for rows in measure.tuned_rows("row", "float16")]
    assert [len(rows) for rows in parts] == [1, 2]
    assert parts[-1][1]["row"][:5] == ["sm_80", "half", 32, 16, 48] and parts[-1][1]["tried"] == 3


@pytest.mark.parametrize("form", ["separate", "fused"])
def test_a_pair_runs_under_the_profiler(form: str, queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    measure, marks = queue["measure"], list[str]()

    class Runtime:
        def __getattr__(self, name: str) -> Any:
            return lambda: marks.append(name)

    monkeypatch.setattr(measure, "PAIR_BATCH", 1)
    monkeypatch.setattr(measure, "PAIR_SIZES", {"small": (16, 16, 16)})
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    measure.pair_once("small", form)
    assert marks == ["cudaProfilerStart", "cudaProfilerStop"]


def test_training_steps_are_compared_and_timed(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    training = queue["training_layers"]
    monkeypatch.setattr(training, "BATCH", 2)
    monkeypatch.setattr(training, "NAMES", tuple(LAYERS))
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    *_, rows = training.training_rows("float16")
    assert {row["runtime"] for row in rows} == {"ours", "eager", "compile"} and len(rows) == 6
    for row in rows:
        assert row["status"] == "ok" and row["median_ms"] == 2.0 and row["rel_error"] > 0, row


class Small(nn.Module):
    """What the job asks of a network: siblings, a pair, the size of its images."""

    data_config = SimpleNamespace(input_size=(3, 9, 9))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = fast.ConvBNReLU(3, 16, 3), fast.ConvBNReLU(16, 16, 1)
        self.two, self.pair = fast.ConvBNReLU(16, 16, 1), fast.AsymmetricPair(16, 16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat((self.one(x), self.pair(self.two(x))), 1).mean((2, 3))


def test_a_networks_tiles_are_measured_and_then_known(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the network's own plan to rows in a file of results, and from these to what a plan looks up."""
    tiles, half = queue["tiles"], torch.float16

    def optimized(net: nn.Module, x: Tensor, *, dtype: torch.dtype, backend: str) -> Any:
        assert dtype is half
        return SimpleNamespace(_session=Session(net, (x,), {}, backend, "float16"))

    monkeypatch.setattr(tiles.fast, "optimize", optimized)
    monkeypatch.setattr(queue["networks"].fast, "create_model", lambda name: Small())
    monkeypatch.setattr(tiles, "compile_beside", lambda specs, arch, shipped: [])
    monkeypatch.setattr(tiles, "TRIED", 2)
    *_, rows = tiles.tile_rows("small", 2, "float16")
    assert [row["status"] for row in rows] == ["ok"] * 4, rows
    assert [row["row"][3:5] for row in rows] == [[16, 27], [32, 16], [16, 48], [16, 48]] and rows[1]["tried"] == 3
    assert [row["columns"] for row in rows] == [[16], [16, 16], [16], [16]]
    assert [row["row"][5][0] for row in rows] == ["stem", *["pointer"] * 3] and rows[0]["tried"] > 2
    assert all(row["best_ms"] <= row["first_ms"] for row in rows)
    file = tmp_path / "result.json"
    assert tiles.measured(file) == []
    file.write_text(json.dumps({"results": {"tiles/small/2/float16": {"status": "failed", "rows": rows}}}))
    known = tiles.measured(file)
    assert [list(row[:5]) for row in known] == [row["row"][:5] for row in rows]
    shipped = configs.tuned("a GPU")
    with tiles.known(known):
        assert configs.tuned("a GPU") == (*shipped, *known)
    assert configs.tuned("a GPU") == shipped


def test_triton_alone_is_tuned_and_timed_in_one_process(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it writes is what the queue and `ship.py` read; one runtime that is wrong makes its part red."""
    alone, about, right = queue["alone"], {"name": "NVIDIA H200", "date": "2026-11-27T01:02:03+00:00"}, [True]
    row = {"status": "ok", "row": ["sm_90", "half", 64, 32, 64, ["turned", 64, 64, 64, 1, 4, 3], 1e-6]}
    asked = list[Any]()

    def tile_rows(*given: Any, cuda: bool) -> Iterator[list[dict[str, Any]]]:
        asked.append((*given, cuda))
        yield [row]

    def calls(model: str, n: int, dtype: str) -> tuple[dict[str, Any], Tensor]:
        known = configs.tuned("a GPU")
        asked.append(known[-1].config.form)
        return dict.fromkeys(("ours", "triton", "eager", "graphs"), lambda: lambda: None), torch.zeros(1)

    def checked(makers: dict[str, Any], about: dict[str, Any], *rest: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        status = "ok" if right[0] else "failed"
        return {name: {**about, "runtime": name, "status": status} for name in makers}, makers

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(alone.work, "machine", lambda: {"status": "ok", "machine": about})
    monkeypatch.setattr(queue["tiles"], "tile_rows", tile_rows)
    monkeypatch.setattr(queue["networks"], "network_calls", calls)
    monkeypatch.setattr(queue["networks"], "checked_calls", checked)
    seconds = {"triton": [1e-3] * 3, "graphs": [2e-3] * 3}
    monkeypatch.setattr(sys.modules["timing"], "host_seconds", lambda calls: {name: seconds[name] for name in calls})
    given, left = ["--out", str(tmp_path), "--model", "small", "--batches", "2,4"], list[float]()

    def finished(command: list[str], seconds: float) -> tuple[str, bool]:
        left.append(seconds)
        return str(alone.main(command[2:])), command[-1] == "--inside"

    monkeypatch.setattr(alone.work, "build", lambda cuda: {"status": "ok" if cuda == "OFF" and right[0] else "failed"})
    monkeypatch.setattr(alone, "finished", finished)
    assert alone.main([*given, "--seconds", "90"]) == 0 and 60 < left[0] <= 90 and asked == [
        ("small", 2, "bfloat16", False), "turned", ("small", 4, "bfloat16", False), "turned"
    ]  # fmt: skip
    found = queue["ship"].read(tmp_path / "result.json")
    assert list(found["results"]) == ["build", *alone.parts("small", (2, 4), "bfloat16")]
    assert found["machine"] == about
    assert [row["ratio"] for row in found["results"]["network/small/4/bfloat16/tuned"]["rows"]] == [1.0, 2.0]
    (tile,) = {row.config for row in queue["ship"].tiles_of(found)}
    assert tile.form == "turned"
    earlier = ["--out", str(tmp_path / "next"), "--earlier", str(tmp_path / "result.json"), *given[2:]]
    assert alone.main(earlier) == 0 and len(asked) == 4, "what is there is not measured again"
    right[0] = False
    red = [*given[:1], str(tmp_path / "red"), *given[2:]]
    assert alone.main(red) == 1 and len(asked) == 4, "nothing runs on what does not build"
    assert alone.main([*red, "--inside"]) == 1 and len(asked) == 8
    with pytest.raises(SystemExit):
        alone.main(["--out", str(tmp_path), "--batches", "32,0"])


def test_alone_takes_inductor_without_freezing_where_that_is_wrong(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the queue does, whose makers lack the other then."""
    makers = dict.fromkeys(("ours", "unfrozen", "eager"), lambda: lambda: None)
    monkeypatch.setattr(queue["networks"], "network_calls", lambda *given: (makers, torch.zeros(1)))

    def checked(given: dict[str, Any], about: dict[str, Any], *rest: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {name: {**about, "runtime": name} for name in given}, given

    monkeypatch.setattr(queue["networks"], "checked_calls", checked)
    monkeypatch.setattr(sys.modules["timing"], "host_seconds", lambda calls: {name: [1e-3] * 3 for name in calls})
    found = queue["alone"].beside("inception_resnet_v2", 2, "bfloat16", 0)
    assert [(row["runtime"], row["ratio"]) for row in found] == [("triton", 1.0), ("unfrozen", 1.0)]


def test_tiles_are_compiled_by_other_processes(queue: dict[str, Any]) -> None:
    """They get as far as asking for a GPU; on one, they compile."""
    spec = ConvSpec(1, 4, 4, 16, 16, 1, 1, dtype="float16")
    found = queue["tiles"].compile_beside([Wanted(spec, (spec,))], "sm_80")
    assert found == [] if torch.cuda.is_available() else "NVIDIA" in found[0] or "CUDA" in found[0], found


def test_tiles_that_gain_nothing_leave_the_first(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, (a, b) = queue["tiles"], (configs.Config(), configs.Config(block_n=32))
    spec = ConvSpec(1, 4, 4, 16, 16, 1, 1, dtype="float16")
    monkeypatch.setattr(tiles, "plans_of", lambda *about: [])
    monkeypatch.setattr(tiles, "wanted", lambda tasks: [Wanted(spec, (spec,))])
    monkeypatch.setattr(tiles, "compile_beside", lambda specs, arch, shipped: [])
    for seconds, wanted in ((0.99, a), (0.9, b)):
        monkeypatch.setattr(tiles.tune, "tried", lambda *rest, s=seconds, **options: {a: 1.0, b: s})
        ((row,),) = tiles.tile_rows("small", 1, "float16")
        assert row["config"] == str(wanted), row
    monkeypatch.setattr(tiles.tune, "tried", lambda *rest, **options: (_ for _ in ()).throw(RuntimeError("none runs")))
    assert next(tiles.tile_rows("small", 1, "float16"))[0]["note"] == "none runs"


def walk_rows() -> list[dict[str, Any]]:
    """As `walks.py` reports a network of three jobs."""
    about = {"model": "other", "batch": 1, "dtype": "float16", "status": "ok"}
    timed = [{**about, "runtime": name, "host": {"median_ms": ms}} for name, ms in (("walk", 0.25), ("separate", 0.5))]
    jobs = [{**about, "job": job, "name": "a"} for job in range(3)]
    return [{**about, "runtime": "ours", "walks": 1}, *timed, {**about, "cut": "no splits", "alone_us": 1.0}, *jobs]


def test_measured_cuts_become_what_plans_choose(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the race on a GPU to rows in a file of results, from these to the shipped tables, and to a plan's choice."""
    hopper, ship, gpu = queue["hopper"], queue["ship"], "NVIDIA H200"
    monkeypatch.setattr(hopper.cuda, "library", stub)
    monkeypatch.setattr(
        hopper, "LAYERS", {"17_row": (5, 16, 64, (1, 3), 1, (0, 0, 1, 1)), "odd": (5, 12, 16, (1, 1), 1, (0,) * 4)}
    )
    monkeypatch.setattr(queue["measure"], "LAYERS", hopper.LAYERS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: gpu)
    monkeypatch.setattr(hopper, "median", lambda call, rounds: call() or 1e-3)
    *_, rows = hopper.layer_rows(2, "float16")
    told = {(row["layer"], row["runtime"]): row["status"] for row in rows if "status" in row}
    assert told == {
        **{("17_row", runtime): "ok" for runtime in ("triton", "cudnn", "cuda")},
        **{("small_pair", runtime): "ok" for runtime in ("triton", "cuda", "pair 192", "pair 256 c2")},
        ("odd", "cuda"): "unavailable",
    }, rows
    assert [row["choice"][:2] for row in rows if "choice" in row] == [[gpu, "conv"], [gpu, "pair"]]

    for row in rows:
        if "choice" in row:
            row["choice"][-1] = 1.0  # Triton's seconds: these kernels have won
    tile = {"row": ["sm_90", "half", 64, 32, 64, ["tma", 64, 32, 64, 1, 4, 3], 1e-6]}
    old = next(row for row in choices.shipped() if row.shape.kernel == "conv")  # a shape raced before
    again, other = (
        {"shape": f"kh=1, kw={taps}", "row": ["sm_90", *old.shape[1:5], ["tma", 64, 64, 64, 1, 4, 3], seconds]}
        for taps, seconds in ((old.shape.taps, 2.5e-5), (old.shape.taps + 1, 1e-5))
    )
    walk = {"runtime": "cuda", "choice": [gpu, "walk", "half", 1, 20, 1, 1, "walk", 1, 1e-4, 2e-4]}
    (single,) = (row["choice"] for row in rows if row.get("choice", [0, 0])[1] == "conv")
    own = {"choice": [*single[:-2], 1e-3, 4e-3]}  # by a network, which counts more than by a layer alone
    results = {
        "tiles/small/2/float16": {"status": "ok", "rows": [tile, other, again, own]},
        "hopper/2/float16": {"status": "failed", "rows": rows},
        "hopper/1/float16": {"status": "ok", "red": True, "rows": rows},
        "network/small/1/float16": {"status": "ok", "rows": [{"runtime": "ours"}, walk]},
        "walk/other/1/float16": {"status": "ok", "rows": walk_rows()},
        "walk/wrong/1/float16": {"status": "failed", "rows": walk_rows()[:1]},
        "walk/red/1/float16": {"status": "ok", "red": True, "rows": walk_rows()},
    }
    file, about = tmp_path / "result.json", {"name": gpu, "date": "2026-11-27T01:02:03+00:00"}
    file.write_text(json.dumps({"machine": about, "results": results}))
    real = choices.SHIPPED
    for table, shipped in ((choices, "cuda/choices.json"), (configs, "triton/configs.json")):
        (tmp_path / "kernels" / shipped).parent.mkdir(parents=True)
        (tmp_path / "kernels" / shipped).write_text(table.SHIPPED.read_text())
        monkeypatch.setattr(table, "SHIPPED", tmp_path / "kernels" / shipped)
        table.shipped.cache_clear()
    try:
        before = len(configs.shipped()) + (again["row"][:5] not in [list(row[:5]) for row in configs.shipped()])
        for _ in range(2):  # the second time changes nothing
            assert ship.main([str(file)], tmp_path) == 0
        assert "5 shapes of the CUDA kernels, faster in 5; 3 tiles of Triton" in capsys.readouterr().out
        filed = list((tmp_path / "benchmarks" / "results").glob("*/*"))
        assert [str(path.relative_to(tmp_path)) for path in filed] == [
            "benchmarks/results/nvidia-h200/2026-11-27-gpu.json"
        ]
        choices.shipped.cache_clear(), configs.shipped.cache_clear()
        *others, conv, pair, whole, alone = choices.shipped()
        assert len(others) == len(choices.read(real))
        assert [row.against for row in others if row[:2] == old[:2]] == [2.5e-5]
        unchanged = [row for row in choices.read(real) if row.shape[1:5] != old.shape[1:5]]
        assert [row for row in others if row.shape[1:5] != old.shape[1:5]] == unchanged
        assert (conv.shape.kernel, pair.shape.kernel, conv.seconds) == ("conv", "pair", 1e-3)
        assert whole == choices.row_of(walk["choice"]) and whole in queue["cuts"].measured(file)
        assert alone == Row(gpu, Shape("walk", "half", 1, 3, 1, 1), "walk", 1, 0.25e-3, 0.5e-3)
        assert len(configs.shipped()) == before and configs.choose("sm_90", "half", 64, 32, 64).form == "tma"

        spec = queue["measure"].layer_spec("17_row", 2, "float16")
        monkeypatch.setattr(hopper_gpu, "measured", lambda device: (gpu, choices.tuned(gpu, 0)))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert hopper_gpu.wins(spec) and not hopper_gpu.wins(replace(spec, oc=512))
        row = choices.nearest(hopper_gpu.shape_of(spec), gpu)
        assert row == conv and hopper_gpu.cut_of(stub(), spec, row=row).config.name == conv.config
    finally:
        choices.shipped.cache_clear(), configs.shipped.cache_clear()


def test_a_network_knows_the_cuts_of_its_own_shapes(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Convolutions beside their best tile, pairs beside their two convolutions, one beside it and its pool, and what a
    plan then chooses.
    """
    tiles, cuts, gpu = queue["tiles"], queue["cuts"], "NVIDIA H200"
    wide = replace(queue["measure"].layer_spec("row", 2, "float16"), oc=64, c=64)
    odd, tall = replace(wide, c=12), replace(wide, kh=3, kw=1, padding=(1, 1, 0, 0))
    monkeypatch.setattr(cuts.cuda, "library", stub)
    monkeypatch.setattr(tiles, "cuda_here", lambda: True)
    monkeypatch.setattr(tiles, "plans_of", lambda *about: [SimpleNamespace(tasks=[], plan=SimpleNamespace(steps=[]))])
    pool = PoolSpec(wide.n, wide.oh, wide.ow, wide.oc, 3, 3, (2, 2), dtype="float16")
    behind = [(wide, pool), (wide, replace(pool, kind="avg")), (replace(wide, c=8), pool)]  # the last was not timed
    monkeypatch.setattr(tiles, "pools_of", lambda plans: behind)
    split = Wanted(wide, (replace(wide, oc=32), replace(tall, oc=32)))
    siblings = Wanted(
        replace(wide, h=3, w=3), tuple(replace(wide, h=3, w=3, oc=32, relu=relu) for relu in (True, False))
    )
    every = [*(Wanted(spec, (spec,)) for spec in (wide, odd, tall)), siblings, split]
    monkeypatch.setattr(tiles, "wanted", lambda tasks: every)
    launches = list[list[Any]]()
    real = gpu_tune.hopper.group
    monkeypatch.setattr(
        gpu_tune.hopper,
        "group",
        lambda name, lib, problems, cut, **o: launches.append(problems) or real(name, lib, problems, cut, **o),
    )
    monkeypatch.setattr(tiles, "chains_of", lambda plans: [tiles.PairSpec(wide, tall), tiles.PairSpec(wide, wide)])
    monkeypatch.setattr(tiles, "compile_beside", lambda specs, arch, shipped: [])
    monkeypatch.setattr(tiles, "TRIED", 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: gpu)
    *_, rows = tiles.tile_rows("small", 2, "float16")
    assert [row["status"] for row in rows] == ["ok"] * 9, rows
    kinds = ["conv", 0, "conv", "conv", "conv", "pair", 0, "pooled", 0]
    assert [row.get("choice", [0, 0])[1] for row in rows] == kinds, rows
    seen = {tuple(tuple((t.y.c, t.relu) for t in p.targets) for p in problems) for problems in launches}
    assert seen >= {(((32, True), (32, False)),), (((32, True),), ((32, True),))}, "as siblings and a split run"
    assert "c 12" in rows[1]["cuda"] and rows[0]["triton_ms"] == rows[0]["cuda_ms"] == 2.0
    assert rows[5]["separate_ms"] == 4.0 and "1x3 then 1x3" in rows[6]["cuda"]
    assert (rows[7]["separate_ms"], rows[7]["pool_ms"], rows[7]["cuda"]) == (4.0, 2.0, "256x64x32 pooled")
    assert "avg of 3x3" in rows[8]["cuda"]

    every.append(Wanted(odd, (odd,), True))  # a stem, which these kernels never run
    monkeypatch.setattr(tiles.tune, "tried", lambda *given, **options: pytest.fail("Triton's tiles are raced"))
    *_, alone = tiles.tile_rows("small", 2, "float16", "cuda")
    assert [row.get("choice") for row in alone] == [row.get("choice") for row in rows] and len(alone) == 9
    assert not any("row" in row for row in alone) and alone[5]["separate_ms"] == 4.0
    assert alone[1]["status"] == "ok" and alone[1]["config"], "a tile of Triton's that these do not run, and not timed"
    with pytest.raises(ValueError, match="part 'narrow' of a network; allowed: none, cuda, new"):
        next(tiles.tile_rows("small", 2, "float16", "narrow"))
    there = [choices.row_of([*row["choice"][:-2], 3e-3, 1.5e-3]) for row in (rows[0], rows[5], rows[7])]
    monkeypatch.setattr(choices, "shipped", lambda: (*there[:1], *(row._replace(gpu="another") for row in there[1:])))
    *_, new = tiles.tile_rows("small", 2, "float16", "new")
    left = [rows[i]["shape"] for i in (1, 3, 5, 6, 7, 8)]
    assert [row["shape"] for row in new] == left, "a row of this GPU serves both directions, and a split as wide"
    assert new[2]["separate_ms"] == 1.5 + 1.5, "the times of their row"
    monkeypatch.setattr(choices, "shipped", lambda: tuple(there))
    *_, new = tiles.tile_rows("small", 2, "float16", "new")
    assert [row["shape"] for row in new] == left[:2]

    file = tmp_path / "result.json"
    file.write_text(json.dumps({"results": {"tiles/small/2/float16": {"status": "ok", "rows": rows}}}))
    found = cuts.measured(file)
    assert [row.shape.kernel for row in found] == ["conv"] * 4 + ["pair", "pooled"]
    monkeypatch.setattr(hopper_gpu, "measured", lambda device: (gpu, ()))
    with cuts.known(found):
        assert hopper_gpu.measured(DEVICE) == (gpu, tuple(found))
    assert hopper_gpu.measured(DEVICE) == (gpu, ())


def test_a_cut_that_disagrees_with_triton_is_not_timed(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cuts, right = queue["cuts"], gpu_tune.hopper.pack
    spec = replace(queue["measure"].layer_spec("row", 2, "float16"), oc=64, c=64)
    one = Wanted(spec, (replace(spec, oc=32), replace(spec, oc=32, relu=False)))
    monkeypatch.setattr(cuts.cuda, "library", stub)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    call = gpu_tune.triton_call(one, *one.drawn(queue["measure"].draw), configs.Config(block_m=64))
    assert cuts.conv_row(one, call)["cuda_ms"] == 2.0
    added = Wanted(spec, (spec,), residual=True)
    plain, sums = (
        gpu_tune.triton_call(which, *added.drawn(queue["measure"].draw), configs.Config(block_m=64))
        for which in (Wanted(spec, (spec,)), added)
    )
    row = cuts.conv_row(added, sums)
    assert row["residual"] and row["cuda_ms"] == 2.0 and len(row["cuts_ms"]) == 2
    with pytest.raises(RuntimeError, match="is off Triton's result"):
        cuts.conv_row(added, plain)
    monkeypatch.setattr(gpu_tune.hopper, "pack", lambda weight, *rest: right(weight.flip(0), *rest))
    with pytest.raises(RuntimeError, match="is off Triton's result"):
        cuts.conv_row(one, call)


def test_a_wrong_form_of_a_pair_fails_its_row_and_the_right_one_counts(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts, first = queue["cuts"], ConvSpec(1, 5, 5, 32, 32, 1, 3, padding=(0, 0, 1, 1), dtype="float16")
    spec = PairSpec(first, replace(first, kh=3, kw=1, padding=(1, 1, 0, 0)))
    monkeypatch.setattr(cuts.cuda, "library", stub)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    right = cuts.pair_row(spec, 1.0)
    assert "status" not in right and right["choice"][1] == "pair"
    real = cuts.fused_call

    def broken(spec: Any, x: Any, params: Any, config: Any) -> Any:
        call = real(spec, x, params, config)
        return call if config.name == right["cuda"] else lambda: 2 * call()

    monkeypatch.setattr(cuts, "fused_call", broken)
    row = cuts.pair_row(spec, 1.0)
    assert row["status"] == "failed" and "'status': 'wrong'" in row["note"] and row["choice"] == right["choice"]


def test_a_failed_race_costs_its_row_and_a_lost_gpu_the_job(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def race() -> dict[str, Any]:
        raise RuntimeError("no configuration runs")

    assert queue["cuts"].guarded(race)["note"] == "RuntimeError: no configuration runs"
    monkeypatch.setattr(queue["cuts"], "broken_context", lambda: "the GPU context is lost")
    with pytest.raises(RuntimeError, match="context is lost"):
        queue["cuts"].guarded(race)


def test_what_is_no_result_is_not_shipped(queue: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    for text, said in (
        ("{", "result.json"),
        ('{"results": {}}', "names no GPU"),
        ('{"machine": {"name": "x"}, "results": {}}', "no date"),
        (
            '{"machine": {"name": "x", "date": "2026-11-27"}, "results": {"tiles/a": {"rows": []}}}',
            "no result as tiles/a",
        ),
        ('{"machine": {"name": "x", "date": "2026-11-27"}, "results": {}, "done": NaN}', "not JSON compliant"),
        ('{"machine": "x", "results": {}}', "names no GPU"),
        ('{"machine": {"name": "x", "date": "2026-11-27"}, "results": []}', "names no GPU"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            queue["ship"].read(file)


def test_a_lost_gpu_ends_the_job_and_another_failure_does_not(
    queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper, head = queue["hopper"], {"layer": "l"}

    def broken(spec: Any, head: Any) -> list[dict[str, Any]]:
        raise RuntimeError("no configuration runs")

    (row,) = hopper.unless_lost(broken, None, head)
    assert row["status"] == "failed" and "no configuration runs" in row["note"]
    monkeypatch.setattr(hopper, "broken_context", lambda: "the GPU context is lost: CUDA error")
    with pytest.raises(RuntimeError, match="l: the GPU context is lost"):
        hopper.unless_lost(broken, None, head)
