"""Whole GPU plans that mix Triton's kernels, interpreted, with the Hopper kernels, which are plain loops behind the
same C interface: the numbers of the module in float64, in any order that the streams and their waits allow.
"""

from __future__ import annotations

import ctypes
import importlib
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from inception_fast.kernels.cuda import check, convolve, loader
from inception_fast.kernels.cuda.choices import Row, Shape
from inception_fast.kernels.plan import ConvStep, PairStep, Step
from inception_fast.kernels.spec import ConvSpec, PairSpec
from torch import Tensor, nn

import engine_nets
import numerics
from checkout import ROOT
from hopper_library import emulated, launched, stub, stub_file
from inception_fast.backends import hopper_gpu
from inception_fast.backends.triton_gpu import spec_reasons
from inception_fast.engine import gpu_hopper, gpu_walk, optimize
from inception_fast.engine.gpu_hopper import Hopper
from inception_fast.engine.gpu_plan import GpuPlan, Packs
from inception_fast.engine.gpu_runner import GpuCompiled
from inception_fast.engine.plan import lower
from inception_fast.engine.report import make_report
from inception_fast.engine.session import Session
from inception_fast.measure import gpu_profiler

from .maps import DEVICE
from .test_gpu_plan import Block as Every
from .test_gpu_plan import big

# Fifteen layers in a row, each rounded once, and twice that for sums that cancel.
DEEP = 2 * 15**0.5 * numerics.FP16_REL_L2

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stub's pointers are host memory")


class Block(Every):
    """Every kind of step, behind convolutions in a row; a pair of channels that the Hopper kernels take."""

    def __init__(self) -> None:
        super().__init__()
        between = nn.Conv2d(16, 24, (1, 7), padding=(0, 3), bias=False), nn.BatchNorm2d(24, eps=1e-3), nn.ReLU()
        behind = nn.Conv2d(24, 24, (7, 1), padding=(3, 0), bias=False), nn.BatchNorm2d(24, eps=1e-3), nn.ReLU()
        self.two = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16, eps=1e-3), nn.ReLU())
        self.pair = nn.Sequential(*between, *behind)
        first, second = nn.Conv2d(3, 64, 3, 2, bias=False), nn.Conv2d(64, 64, 3, 1, 1, bias=False)
        third = nn.Conv2d(64, 16, 1, bias=False)
        self.head = nn.Linear(64, 16)
        norms = (nn.BatchNorm2d(64, eps=1e-3), nn.BatchNorm2d(64, eps=1e-3), nn.BatchNorm2d(16, eps=1e-3))
        parts = zip((first, second, third), norms, strict=True)
        self.stem = nn.Sequential(*(layer for conv, norm in parts for layer in (conv, norm, nn.ReLU())))


def compiled(n: int, hopper: Hopper | None = None) -> tuple[Tensor, GpuCompiled, Tensor]:
    """The block with every kind of step in float16, on both kinds of kernels, and what float64 gives."""
    module = engine_nets.randomised(Block()).eval()
    x = numerics.random(n, 3, 23, 21)
    native = optimize(module, x)
    captured = next(iter(native._session._captured.values()))
    program = lower(captured.graph, [x], spec_reasons, "float16")
    if hopper is None:
        # The second convolution of the stem: long enough to be split, by a measurement that says so.
        split = Row("", Shape("conv", "half", n * 110, 64, 576, 9), stub().configs[0].name, 2, 1e-6, 2e-6)
        hopper = Hopper(stub(), DEVICE, always=True, rows=[split])
    with gpu_walk.disabled():  # test_hopper_walk_plan.py has those that walk
        executable = GpuCompiled(program, Packs(DEVICE), big, hopper=hopper)
    return x, executable, engine_nets.eager(module, x)


@pytest.mark.parametrize("n", (1, 3))
def test_a_mixed_plan_equals_the_module(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_hopper, "OVERLAP_BATCH", 2)
    x, executable, wanted = compiled(n)
    launched()
    first, second = executable.run([x])[0], executable.run([x])[0]
    assert torch.equal(first, second)
    assert numerics.rel_l2(first, wanted) <= DEEP
    rows = launched()
    work = [task.hopper for task in executable.plan.tasks if task.hopper]
    assert len(rows) == 2 * len(work) and {task.hopper is None for task in executable.plan.tasks} == {True, False}
    assert max(count for count, *_ in rows) > 1, "no level was grouped"
    assert max(splits for *_, splits in rows) > 1 and executable.held_bytes > executable.plan.arena_bytes
    assert any(overlap for _, _, overlap, _ in rows) == (n == 1)


def test_a_plan_runs_on_the_kernels_own_source() -> None:
    """On the emulated device, where every step of the stem's second convolution and behind is a wgmma product."""
    x, executable, wanted = compiled(1, Hopper(emulated(), DEVICE, always=True))
    y = executable.run([x])[0]
    assert numerics.rel_l2(y, wanted) <= DEEP
    _, plain, _ = compiled(1)
    assert [t.hopper is None for t in executable.plan.tasks].count(False) >= 4
    assert numerics.rel_l2(y, plain.run([x])[0].double()) <= DEEP


@pytest.mark.parametrize("alone", (False, True))
def test_a_split_takes_a_cut_that_runs_both_or_two_launches(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    """What was measured keeps rows of x for a 1x3, and has no room for those of a 3x1 on so wide a map."""
    library, launches, ask = emulated(), list[int](), loader.Library.reasons
    first = ConvSpec(1, 8, 73, 64, 16, 1, 3, padding=(0, 0, 1, 1), dtype="float16")
    spec = PairSpec(first, replace(first, kh=3, kw=1, padding=(1, 1, 0, 0)), "split")
    row = Row("", hopper_gpu.shape_of(first), "512x48x64 halo by 4", 1, 1e-6, 2e-6)
    able = [[config.name for config in convolve.able(library, part)] for part in (spec.first, spec.second)]
    assert row.config in able[0] and row.config not in able[1]

    def refused(self: Any, convs: Any, dtype: str, config: Any) -> list[str]:
        return ["several"] if alone and len(convs) > 1 else ask(self, convs, dtype, config)

    def group(name: str, kernels: Any, problems: Any, cut: Any) -> Any:
        launches.append(len(problems))
        return made(name, kernels, problems, cut)

    made = convolve.group
    monkeypatch.setattr(loader.Library, "reasons", refused)
    monkeypatch.setattr(convolve, "group", group)
    monkeypatch.setattr(hopper_gpu, "measured", lambda device: ("", (row,)))
    x = numerics.integers(1, 64, 8, 73).half()
    ones, zeros = torch.ones(16), torch.zeros(16)
    params = tuple(
        (numerics.integers(16, 64, part.kh, part.kw, seed=part.kh).half(), ones, zeros)
        for part in (spec.first, spec.second)
    )
    y = hopper_gpu._called(library, hopper_gpu.prepare(spec, params, x, None, 1.0), x, None)
    halves = [
        torch.conv2d(x.float(), weight.float(), padding=(part.padding[0], part.padding[2])).relu()
        for part, (weight, *_) in zip((spec.first, spec.second), params, strict=True)
    ]
    assert torch.equal(y.permute(0, 3, 1, 2), torch.cat(halves, 1).half())
    assert launches == ([1, 1] if alone else [2])


def test_the_check_before_the_first_use_asks_no_form_for_what_it_refuses() -> None:
    """On the kernels' own source, every form of them: a GPU runs it before it is given any network."""
    assert {config.form for config in convolve.able(emulated(), check.SPEC)} >= {
        "halo64",
        "halo4x32",
        "turns64c2",
        "behind32c2",
    }
    assert check.wrong(emulated(), DEVICE) == check.wrong_behind(emulated(), DEVICE) == ""
    assert check.wrong_walks(emulated(), DEVICE) == ""


def test_the_check_of_tiles_that_are_stored_behind_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    able = [config for config in convolve.able(emulated(), check.SPEC) if config.behind]
    monkeypatch.setattr(loader.Library, "launch", lambda *ignored: None)
    said = check.wrong_behind(emulated(), DEVICE)
    assert able and said.startswith("the first behind tile gave wrong numbers with ")
    assert all(f"{config.name}{how}" in said for config in able for how in (",", " with a residual,"))
    assert "behind in float16" in said and "halves" not in said


def test_the_probe_of_shifted_operands_expects_the_right_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue asks a GPU what the emulated device believes: every start of a row in both layouts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    rows_of = importlib.import_module("hopper").shift_rows
    library = ctypes.CDLL(str(emulated().file))
    library.emulated_adopt(ctypes.c_void_p(4096), ctypes.c_uint64(1 << 62))
    rows = list(rows_of(library.probe_shift, make=lambda tensor: tensor.clone()))
    assert len(rows) == 114 and {row["status"] for row in rows} == {"ok"}

    def off_by_a_row(a: Any, b: Any, d: Any, shift: int, swizzled: int) -> int:
        return library.probe_shift(a, b, d, (shift + 1) % 57, swizzled)

    assert {row["status"] for row in rows_of(off_by_a_row, make=lambda tensor: tensor.clone())} == {"wrong"}


def test_the_devices_own_tests_run_and_fail_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else runs them before they meet a GPU: on the kernels' own source, and on kernels that do nothing."""
    device = importlib.import_module(".test_hopper_device", __package__)
    small = ConvSpec(2, 5, 5, 24, 48, 1, 3, padding=(0, 0, 1, 1), dtype="bfloat16")
    monkeypatch.setattr(device, "SPECS", {"1x7": small})
    monkeypatch.setattr(device.cuda, "library", emulated)
    assert {config.form for config in emulated().configs} == {*device.FORMS, *device.POOLED_FORMS}
    assert {config.form for config in stub().pair_configs} <= set(device.PAIR_FORMS)
    device.test_integers_are_exact_by_every_configuration("turns32c2", "1x7", "float16")
    device.test_random_numbers_stay_in_the_budget("halves64c1", "1x7")
    monkeypatch.setattr(device, "MANY", ConvSpec(3, 9, 9, 24, 200, 1, 1, dtype="bfloat16"))
    device.test_residuals_come_to_where_results_are_still_stored("behind32c1")
    small_pool = {"many": (ConvSpec(3, 7, 6, 16, 96, 3, 3, padding=(1, 1, 1, 1)), (1, 1))}
    monkeypatch.setattr(device, "POOLED", small_pool)
    device.test_a_maximum_behind_a_convolution_is_exact("pooled32", "many", "float16")
    with monkeypatch.context() as plain:
        plain.setattr(device.cuda, "library", stub)
        device.test_fused_pairs_are_exact("pair3c1", (32, 32, 32), wide_first=False)
        plain.setattr(loader.Library, "launch_pair", lambda *ignored: None)
        with pytest.raises(AssertionError, match=r"1 of 1 wrong: pair 192\n"):
            device.test_fused_pairs_are_exact("pair3c1", (32, 32, 32), wide_first=True)
        device.test_a_network_as_a_walk("walk")
        plain.setattr(loader.Library, "launch_walk", lambda *ignored: None)
        with pytest.raises(AssertionError):
            device.test_a_network_as_a_walk("walk")
    monkeypatch.setattr(loader.Library, "launch", lambda *ignored: None)
    with pytest.raises(AssertionError) as raised:
        device.test_integers_are_exact_by_every_configuration("halves64c2", "1x7", "bfloat16")
    told = str(raised.value)
    assert "8 of 8 wrong: 128x32x64 s10 c2 in 1, " in told and "2400 of 2400 differ, 2400 are NaN" in told
    assert "(0, 0, 0, 0) is nan for " in told


def test_any_order_that_streams_allow_gives_the_same_bits() -> None:
    x, executable, _ = compiled(1)
    plan = executable.plan

    def run(order: list[int]) -> Tensor:
        arena = torch.full((plan.arena_bytes + 64,), 255, dtype=torch.uint8)
        outputs = [torch.empty(b.n, b.h, b.w, b.c, dtype=getattr(torch, b.dtype)) for b in plan.plan.outputs]
        launches = plan.launches([x], outputs, arena[-arena.data_ptr() % 64 :])
        for j in order:
            for one in launches[j]:
                one.run()
        return outputs[0]

    first = run(list(range(len(plan.tasks))))
    for seed in range(2):
        generator, done, order = random.Random(seed), set[int](), list[int]()
        while len(done) < len(plan.tasks):
            ready = [
                j
                for j, task in enumerate(plan.tasks)
                if j not in done
                and set(task.waits) <= done
                and all(i in done for i in range(j) if plan.tasks[i].stream == task.stream)
            ]
            order.append(generator.choice(ready))
            done.add(order[-1])
        assert torch.isfinite(first).all() and torch.equal(run(order), first)


def test_a_launch_starts_early_only_behind_its_like_with_nothing_to_wait_for() -> None:
    """And a group waits for all that its parts need."""
    plan = compiled(1)[1].plan
    early = gpu_hopper.overlapping(plan.tasks)
    assert early
    for j in early:
        before = [task for task in plan.tasks[:j] if task.stream == plan.tasks[j].stream][-1]
        assert before.hopper and plan.tasks[j].hopper and not plan.tasks[j].waits
    for j, task in enumerate(plan.tasks):
        ordered = {i for i in range(j) if plan.tasks[i].stream == task.stream}
        for i in sorted(ordered | set(task.waits), reverse=True):
            ordered |= {i} | {k for k in range(i) if plan.tasks[k].stream == plan.tasks[i].stream}
        assert set(task.needs) <= ordered


def test_a_profile_counts_all_work_of_a_group() -> None:
    plan = compiled(1)[1].plan
    parts = [part for step in plan.plan.steps for part in _parts(step)]
    wanted = sum(part.spec.flops() for part in parts if isinstance(part, ConvStep))
    convs = [task for task in plan.tasks if isinstance(task.step, (ConvStep, PairStep))]
    assert max(len(task.steps) for task in convs) > 1
    assert sum(gpu_profiler.task_work(plan, task).flops for task in convs) == wanted


def _parts(step: Step) -> list[Step]:
    return [step.first, step.second] if isinstance(step, PairStep) else [step]


def test_only_measured_steps_leave_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a row nothing does; with one for a single shape only what is near it does, and a lost race stays."""
    none = Hopper(stub(), DEVICE, always=False)
    plan: GpuPlan = compiled(1, none)[1].plan
    assert not any(task.hopper for task in plan.tasks)
    assert {task.note for task in plan.tasks if task.config} >= {"not measured"}
    always = compiled(1)[1].plan
    step = next(task.hopper.parts[0][0] for task in always.tasks if task.hopper and len(task.hopper.parts) == 1)
    shape = hopper_gpu.shape_of(step.spec)
    won = Row("NVIDIA H200", shape, stub().configs[1].name, 2, 1e-5, 2e-5)
    some = compiled(1, Hopper(stub(), DEVICE, always=False, gpu="NVIDIA H200", rows=[won]))[1].plan
    mine = [task.hopper for task in some.tasks if task.hopper]
    assert mine and len(mine) < sum(task.hopper is not None for task in always.tasks)
    assert all(work.measured and work.cut.config == stub().configs[1] and work.cut.splits == 2 for work in mine)
    lost = won._replace(against=7e-6)
    plan = compiled(1, Hopper(stub(), DEVICE, always=False, gpu="NVIDIA H200", rows=[lost]))[1].plan
    assert not any(task.hopper for task in plan.tasks)
    assert any(task.note == "measured slower: 10.0 us, 7.0 by Triton" for task in plan.tasks)
    near = won._replace(against=9e-6)  # a step that loses by little stays with its neighbours
    plan = compiled(1, Hopper(stub(), DEVICE, always=False, gpu="NVIDIA H200", rows=[near]))[1].plan
    assert any(task.hopper for task in plan.tasks)
    monkeypatch.setattr(gpu_hopper, "OVERLAP_BATCH", 2)
    for n, taken in ((1, True), (3, False)):  # where launches overlap, which the measured seconds leave out
        close = won._replace(against=7.5e-6, shape=shape._replace(m=shape.m * n))
        plan = compiled(n, Hopper(stub(), DEVICE, always=False, gpu="NVIDIA H200", rows=[close]))[1].plan
        assert any(task.hopper for task in plan.tasks) == taken


def test_a_pair_is_fused_only_where_that_won() -> None:
    """One launch whose intermediate is in no memory of the plan; a pair that lost, was not measured, or whose
    configuration is in no library stays two.
    """
    x, plain, wanted = compiled(1)
    chain = next(step for step in plain.plan.plan.steps if isinstance(step, PairStep) and step.kind == "chain")
    shape = hopper_gpu.shape_of(chain.second.spec, "pair")
    row = Row("", shape, stub().pair_configs[0].name, 1, 1e-6, 2e-6)
    for one, launches in ((row, 1), (row._replace(against=9e-7), 0), (row._replace(config="pair 1"), 0)):
        hopper = Hopper(stub(), DEVICE, always=True, rows=[one])
        executable = compiled(1, hopper)[1]
        launched()
        assert numerics.rel_l2(executable.run([x])[0], wanted) <= DEEP
        fused = [config for _, config, _, _ in launched() if config.startswith("pair")]
        assert len(fused) == launches
        tasks = [task for task in executable.plan.tasks if task.step.name == chain.name and len(task.steps) == 2]
        assert len([t for t in tasks if t.step.kind == "chain"]) == launches  # type: ignore[union-attr]
        mine = next(step for step in executable.plan.plan.steps if step.name == chain.name)
        assert executable.plan.ran_by(mine) == ("cuda", "")
    assert not any(len(t.steps) == 2 and t.step is chain for t in plain.plan.tasks)


def test_siblings_are_one_launch_by_a_cut_that_runs_both() -> None:
    """What was measured for the first of a split, tiles of 96 columns, does not run the second of 24."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.one = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 96, (1, 3), padding=(0, 1))
            self.two, self.after = nn.Conv2d(16, 24, (3, 1), padding=(1, 0)), nn.Conv2d(120, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.before(x).relu()
            return self.after(torch.cat([self.one(y).relu(), self.two(y).relu()], 1))

    module, x = Split().eval(), numerics.random(1, 3, 9, 11)
    captured = next(iter(optimize(module, x)._session._captured.values()))
    program = lower(captured.graph, [x], spec_reasons, "float16")
    row = Row("", Shape("conv", "half", 99, 96, 48, 3), stub().configs[2].name, 1, 1e-6, 2e-6)
    executable = GpuCompiled(program, Packs(DEVICE), big, hopper=Hopper(stub(), DEVICE, always=True, rows=[row]))
    assert numerics.rel_l2(executable.run([x])[0], engine_nets.eager(module, x)) <= DEEP
    (work,) = [task.hopper for task in executable.plan.tasks if task.hopper]
    assert len(work.parts) == 2 and isinstance(work.cut, convolve.Cut) and work.cut.config.columns == 64


def test_a_named_backend_that_runs_no_step_says_why() -> None:
    module = nn.Sequential(nn.Conv2d(16, 12, 1), nn.ReLU()).eval()
    x = numerics.random(1, 16, 5, 5)
    native = optimize(module, x)
    captured = next(iter(native._session._captured.values()))
    program = lower(captured.graph, [x], spec_reasons, "float16")
    with pytest.raises(ValueError, match=r"backend 'cuda' runs no step of this network \(oc 12; allowed"):
        GpuCompiled(program, Packs(DEVICE), big, hopper=Hopper(stub(), DEVICE, always=True))


def test_a_session_reports_which_kernels_run_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "FILE", stub_file())
    module = engine_nets.randomised(Block()).eval()
    x = numerics.random(1, 3, 23, 21)
    session = Session(module, (x,), {}, "cuda", "float16")
    with gpu_walk.disabled():
        session.plan([x])
    assert numerics.rel_l2(session((x,), {}), engine_nets.eager(module, x)) <= DEEP
    executable, captured = session.executable([x])
    report = make_report("Block", "cuda", executable, captured, [x])
    found = {step.name: (step.kind, step.backend, step.note) for step in report.steps}
    assert {backend for _, backend, _ in found.values()} >= {"cuda", "triton"} and not report.fallbacks
    assert all(note for kind, backend, note in found.values() if kind == "conv" and backend == "triton")
    assert "not on the CUDA kernels:" in str(report)
    assert "a convolution from the caller's image" in str(report)
    assert found["head"] == ("conv", "triton", "float32 beside float16; allowed: one format"), "the result is float32"
    assert {kind for kind, backend, _ in found.values() if backend == "cuda"} == {"conv", "pair"}


def test_unnamed_without_measurements_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "FILE", stub_file())
    assert gpu_hopper.of(DEVICE, "float16", "triton", False) is None
    assert gpu_hopper.of(DEVICE, "float16", "triton", True) is None
    assert gpu_hopper.of(DEVICE, "float32", "cuda", True) is None
    made = gpu_hopper.of(DEVICE, "float16", "cuda", True)
    assert made is not None and made.always
