"""Plans whose steps run as one walk at batch 1, over plain loops that take jobs in the worst order that needs allow."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from inception_fast.kernels.cuda import loader, walk
from inception_fast.kernels.cuda.choices import Row
from inception_fast.kernels.plan import ConvStep, PairStep, PoolStep, Step
from torch import Tensor, nn
from torch.nn import functional as F

import engine_nets
import numerics
from hopper_library import emulated, launched, stub, stub_file, walking_in_order
from inception_fast.backends.triton_gpu import spec_reasons
from inception_fast.engine import gpu_hopper, gpu_plan, gpu_walk, optimize
from inception_fast.engine.gpu_hopper import Hopper
from inception_fast.engine.gpu_plan import GpuPlan, Packs
from inception_fast.engine.gpu_runner import GpuCompiled
from inception_fast.engine.plan import lower
from inception_fast.engine.report import make_report
from inception_fast.engine.session import Session
from inception_fast.measure import gpu_profiler

from .maps import DEVICE
from .test_gpu_plan import big

# Twenty layers in a row, each rounded once, and twice that for sums that cancel.
DEEP = 2 * 20**0.5 * numerics.FP16_REL_L2

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stub's pointers are host memory")


def conv(c: int, oc: int, kernel: Any, stride: int = 1, padding: Any = None) -> nn.Sequential:
    sizes = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    around = tuple(size // 2 for size in sizes) if padding is None else padding
    return nn.Sequential(nn.Conv2d(c, oc, sizes, stride, around, bias=False), nn.BatchNorm2d(oc, eps=1e-3), nn.ReLU())


class Net(nn.Module):
    """What v3 is made of, small: a stem, a block of branches, a reduction, a pair, splits, a head. `middle`: layers in
    the middle.
    """

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 3, 2, 0), conv(16, 24, 3), nn.MaxPool2d(3, 2))
        self.one, self.five = conv(24, 16, 1), nn.Sequential(conv(24, 16, 1), conv(16, 24, 5))
        self.three = nn.Sequential(conv(24, 16, 1), conv(16, 16, 3), conv(16, 16, 3), conv(16, 24, 3))
        self.pooled = conv(24, 8, 1)
        self.down = nn.Sequential(conv(72, 16, 1), conv(16, 24, 3, 2, 0))
        self.pair = nn.Sequential(conv(96, 16, 1), conv(16, 16, (1, 7)), conv(16, 32, (7, 1)))
        self.middle = nn.Identity() if middle is None else middle
        self.left, self.right, self.up = conv(32, 16, (1, 3)), conv(32, 16, (3, 1)), nn.Conv2d(64, 96, 1)
        self.head = nn.Linear(96, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled = self.pooled(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        x = torch.cat((self.one(x), self.five(x), self.three(x), pooled), 1)
        x = torch.cat((self.down(x), F.max_pool2d(x, 3, 2)), 1)
        y = self.middle(self.pair(x))
        y = torch.cat((self.left(y), self.right(y), y), 1)
        x = F.relu(x + 0.17 * self.up(y))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


@cache
def made(middle: str = "") -> nn.Module:
    """ "lrn" has no kernel here, nor have channels that are no multiple of 8."""
    layers = {"": None, "lrn": nn.LocalResponseNorm(5), "odd": nn.Sequential(conv(32, 12, 1), conv(12, 32, 1))}
    return engine_nets.randomised(Net(layers[middle])).eval()


def compiled(
    module: nn.Module, n: int = 1, hopper: Hopper | None = None, size: tuple[int, int] = (39, 35)
) -> tuple[Tensor, GpuCompiled, Tensor]:
    """The module in float16 on both kinds of kernels, and what float64 gives."""
    x = numerics.random(n, 3, *size)
    captured = next(iter(optimize(module, x)._session._captured.values()))
    program = lower(captured.graph, [x], spec_reasons, "float16")
    hopper = hopper or Hopper(stub(), DEVICE, always=True)
    made = GpuCompiled(program, Packs(DEVICE), big, hopper=hopper)
    return x, made, engine_nets.eager(module, x)


def walks(plan: GpuPlan) -> list[int]:
    """How many jobs each walk has."""
    return [len(task.walk.members) for task in plan.tasks if task.walk is not None]


def parts(plan: GpuPlan) -> list[Step]:
    """All steps, pairs as two."""
    steps: list[Step] = []
    for step in plan.plan.steps:
        steps += [step.first, step.second] if isinstance(step, PairStep) else [step]
    return steps


def in_order(executable: GpuCompiled, x: Tensor, seed: int) -> Tensor:
    """The result by an order of jobs, in fresh memory, so that nobody finds what the run before left."""
    executable._static = None
    with walking_in_order(seed):
        return executable.run([x])[0]


def in_any_order(executable: GpuCompiled, x: Tensor, seeds: int = 4) -> list[Tensor]:
    """The results by the last job that may run, then by any."""
    return [in_order(executable, x, seed) for seed in range(seeds)]


def test_a_network_is_a_walk_behind_its_first_layer() -> None:
    x, executable, wanted = compiled(made())
    plan = executable.plan
    launched()
    first, *others = in_any_order(executable, x)
    assert numerics.rel_l2(first, wanted) <= DEEP
    assert all(torch.equal(first, other) for other in others)
    (jobs,) = walks(plan)
    assert [task.walk is None for task in plan.tasks] == [True, False]
    assert jobs == len(parts(plan)) - 2, "all but the import and the first convolution"
    assert launched() == [(jobs, "walk", False, 1)] * 4
    assert plan.tasks[1].needs == (0,)
    assert plan.tasks[1].name.startswith(f"walk of {jobs} steps from ") and len(plan.tasks[1].steps) == jobs
    assert all(len(mine) <= 4 for mine in plan.tasks[1].walk.needs)  # type: ignore[union-attr]


def test_split_sums_have_memory_of_the_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "SPLIT_SECONDS", 0.0)
    monkeypatch.setattr(walk, "LEAST_STEPS", 1)
    x, executable, wanted = compiled(made())
    launched()
    y = executable.run([x])[0]
    assert numerics.rel_l2(y, wanted) <= DEEP and torch.equal(y, executable.run([x])[0])
    assert launched()[0][3] > 1
    sizes = executable.plan.workspace_bytes
    (task,) = (task for task in executable.plan.tasks if task.walk is not None)
    launch: Any = executable._static.segments[0].launches[1][0]  # type: ignore[union-attr]
    _, table, workspace = launch.kept
    assert task.walk is not None and sizes == table.numel() + workspace.numel()
    arena = executable.plan.arena_bytes
    assert arena + sizes < executable.held_bytes <= executable.needed_bytes


def test_separate_launches_beyond_batch_1_and_where_walks_are_disabled() -> None:
    module = made()
    x, two, wanted = compiled(module, 2)
    assert not walks(two.plan) and numerics.rel_l2(two.run([x])[0], wanted) <= DEEP
    with gpu_walk.disabled():
        x, one, wanted = compiled(module)
    assert not walks(one.plan) and max(len(task.steps) for task in one.plan.tasks) > 1
    assert numerics.rel_l2(one.run([x])[0], wanted) <= DEEP
    assert walks(compiled(module)[1].plan), "only inside"


def test_fewer_steps_than_are_worth_it_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made()
    with gpu_walk.disabled():
        _, plain, _ = compiled(module)
    monkeypatch.setattr(gpu_walk, "WALK_LEAST", 1000)
    _, few, _ = compiled(module)
    assert [(task.name, task.needs, task.level) for task in few.plan.tasks] == [
        (task.name, task.needs, task.level) for task in plain.plan.tasks
    ]


@pytest.mark.parametrize("middle", ("lrn", "odd"))
def test_a_step_that_no_walk_takes_ends_one(middle: str) -> None:
    x, executable, wanted = compiled(made(middle))
    plan = executable.plan
    first, *others = in_any_order(executable, x)
    assert numerics.rel_l2(first, wanted) <= DEEP and all(torch.equal(first, other) for other in others)
    assert len(walks(plan)) == 1, "the part behind it is too short"
    assert [task.walk is None for task in plan.tasks].count(True) > 3


def test_two_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_walk, "WALK_LEAST", 3)
    x, executable, wanted = compiled(made("lrn"))
    plan = executable.plan
    first, *others = in_any_order(executable, x)
    assert numerics.rel_l2(first, wanted) <= DEEP and all(torch.equal(first, other) for other in others)
    assert len(walks(plan)) == 2 and sum(walks(plan)) == len(parts(plan)) - 3
    behind = [j for j, task in enumerate(plan.tasks) if task.walk is not None][1]
    assert set(plan.tasks[behind].needs) >= {behind - 1}, "it needs the step between"


@pytest.mark.parametrize("middle", ("lrn", "odd"))
def test_tasks_around_walks_wait_for_all_that_is_inside(monkeypatch: pytest.MonkeyPatch, middle: str) -> None:
    """Of two tasks that meet in channels or in memory one waits for the other, through others or itself."""
    monkeypatch.setattr(gpu_walk, "WALK_LEAST", 3)
    plan = compiled(made(middle))[1].plan
    assert len(walks(plan)) == 2 and len(plan.tasks) > 3
    behind: list[set[int]] = []
    for j, task in enumerate(plan.tasks):
        behind.append(set(task.needs).union(*(behind[i] for i in task.needs)))
        meets = {
            i
            for i, earlier in enumerate(plan.tasks[:j])
            if gpu_plan._conflict(earlier, task) or gpu_plan._overlap(plan._bytes_of(earlier), plan._bytes_of(task))
        }
        assert meets <= behind[j] and max(task.needs, default=-1) < j
        assert set(task.waits) <= set(task.needs)


def test_a_walk_ends_ahead_of_a_job_that_needs_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = walks(compiled(made())[1].plan)
    monkeypatch.setattr(gpu_walk, "WALK_NEEDS", 1)
    x, executable, wanted = compiled(made())
    assert len(walks(executable.plan)) > 1 and sum(walks(executable.plan)) == sum(whole)
    assert all(len(needs) <= 1 for t in executable.plan.tasks if t.walk is not None for needs in t.walk.needs)
    first, *others = in_any_order(executable, x)
    assert numerics.rel_l2(first, wanted) <= DEEP and all(torch.equal(first, other) for other in others)


def late(executable: GpuCompiled, x: Tensor, wanted: Tensor, job: int) -> bool:
    """Whether the result is right where a job runs as late as it may."""
    return numerics.rel_l2(in_order(executable, x, -1 - job), wanted) <= DEEP


def test_memory_that_is_taken_over_orders_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant: with needs for data alone a job overwrites what another has yet to read."""
    x, executable, wanted = compiled(made())
    (jobs,) = walks(executable.plan)
    assert all(late(executable, x, wanted, job) for job in range(jobs))
    monkeypatch.setattr(gpu_plan, "_overlap", lambda a, b: False)
    x, executable, wanted = compiled(made())
    assert not all(late(executable, x, wanted, job) for job in range(jobs))


def test_every_need_that_is_left_is_needed() -> None:
    """Mutants: without any one of a job's needs the result is wrong, where what it needs comes late."""
    x, executable, wanted = compiled(made())
    plan = executable.plan
    (position,) = (j for j, task in enumerate(plan.tasks) if task.walk is not None)
    right = plan.tasks[position].walk
    assert right is not None
    missed = []
    for job, need in [(job, need) for job, mine in enumerate(right.needs) for need in mine]:
        needs = [tuple(i for i in mine if (k, i) != (job, need)) for k, mine in enumerate(right.needs)]
        plan.tasks[position].walk = dataclasses.replace(right, needs=tuple(needs))
        missed += [(right.members[job].step.name, need)] if late(executable, x, wanted, need) else []
    assert not missed


def test_members_are_what_the_library_offers() -> None:
    _, executable, _ = compiled(made())
    (members,) = (task.walk.members for task in executable.plan.tasks if task.walk is not None)
    pools = [member.step for member in members if isinstance(member.step, PoolStep)]
    assert {pool.spec.kind for pool in pools} == {"max", "avg"}
    assert {(pool.shift is not None, pool.relu) for pool in pools} == {(False, False), (True, True)}
    for member in members:
        assert (member.cut is None) == (member.packed is None) == isinstance(member.step, PoolStep)
        assert member.cut is None or member.cut.columns in stub().walk_columns


def test_unnamed_a_walk_is_taken_where_it_won_on_this_gpu() -> None:
    """The network of the nearest number of jobs decides, of those within a factor of two measured at this batch or
    beyond.
    """
    jobs = walks(compiled(made())[1].plan)[0]
    won = Row("a GPU", gpu_walk.shape_of("float16", 1, jobs), "walk", 1, 1e-4, 2e-4)
    lost, other = won._replace(seconds=3e-4), won._replace(gpu="another")
    near = won._replace(shape=gpu_walk.shape_of("float16", 1, 2 * jobs))
    later = won._replace(shape=gpu_walk.shape_of("float16", 8, 2 * jobs))
    for rows, taken in (
        ([won], True), ([lost], False), ([other], False), ([], False), ([near], True), ([later], True),
        ([near._replace(seconds=3e-4), won], True), ([near, lost], False),
        ([won._replace(shape=gpu_walk.shape_of("float16", 1, 2 * jobs + 1))], False),
    ):  # fmt: skip
        plan = compiled(made(), 1, Hopper(stub(), DEVICE, always=False, gpu="a GPU", rows=rows))[1].plan
        assert bool(walks(plan)) == taken, rows
        assert taken or not any(task.hopper for task in plan.tasks)


def test_a_library_without_a_walk_changes_nothing() -> None:
    plain: Any = loader.Library(stub_file())
    plain.walk_columns = ()
    assert not walks(compiled(made(), 1, Hopper(plain, DEVICE, always=True))[1].plan)


def test_where_the_first_walk_was_wrong_plans_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is a launch and its result right; the report says why, for what a walk would have taken and no more."""
    why = "the first walk gave wrong numbers with 32 columns in float16"
    refused = Hopper(stub(), DEVICE, always=True)
    monkeypatch.setattr(refused, "unwalked", why)
    x, executable, wanted = compiled(made(), 1, refused)
    assert not walks(executable.plan) and numerics.rel_l2(executable.run([x])[0], wanted) <= DEEP
    notes = {task.name: task.note for task in executable.plan.tasks if task.hopper is not None}
    assert len(notes) > 3 and set(notes.values()) == {why}
    _, two, _ = compiled(made(), 2, refused)
    assert {task.note for task in two.plan.tasks if task.hopper is not None} == {""}, "no walk is asked for there"
    monkeypatch.setattr(gpu_hopper, "of", lambda *session: refused)
    session = Session(made(), (x,), {}, "cuda", "float16")
    session.plan([x])
    executable, captured = session.executable([x])
    report = make_report("Net", "cuda", executable, captured, [x])
    assert why in str(report) and {step.backend for step in report.steps} == {"cuda", "triton"}


def test_a_session_reports_the_steps_of_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "FILE", stub_file())
    x = numerics.random(1, 3, 39, 35)
    session = Session(made(), (x,), {}, "cuda", "float16")
    session.plan([x])
    assert numerics.rel_l2(session((x,), {}), engine_nets.eager(made(), x)) <= DEEP
    executable, captured = session.executable([x])
    report = make_report("Net", "cuda", executable, captured, [x])
    found = {step.name: (step.kind, step.backend) for step in report.steps}
    assert not report.fallbacks and report.counts["packed_bytes"] > 0
    assert {backend for kind, backend in found.values() if kind == "pool"} == {"cuda"}
    on_triton = [name for name, (kind, backend) in found.items() if backend == "triton" and kind != "import"]
    assert on_triton == ["stem.0.0"], "the first convolution reads the caller's image"


def test_a_profile_counts_all_work_of_a_walk() -> None:
    plan = compiled(made())[1].plan
    work = [gpu_profiler.task_work(plan, task) for task in plan.tasks]
    assert [one.kind for one in work] == ["conv", "walk"] and work[1].shape == (1, 16, 1, 1)
    wanted = sum(s.spec.flops() for s in parts(plan) if isinstance(s, (ConvStep, PoolStep)))
    assert sum(one.flops for one in work) == wanted


def test_a_whole_network() -> None:
    """All of v3 behind the first convolution is one walk, in any order of its jobs."""
    module = engine_nets.built("inception_v3")
    x, executable, wanted = compiled(module, size=(75, 75))
    first, *others = in_any_order(executable, x, 2)
    assert all(torch.equal(first, other) for other in others)
    assert numerics.rel_l2(first, wanted) <= 2 * 94**0.5 * numerics.FP16_REL_L2
    assert walks(executable.plan) == [80]


def test_a_walk_runs_on_the_kernels_own_source() -> None:
    x, executable, wanted = compiled(made(), 1, Hopper(emulated(), DEVICE, always=True))
    assert walks(executable.plan)
    assert numerics.rel_l2(executable.run([x])[0], wanted) <= DEEP


def test_a_map_that_is_the_result_is_float32_on_the_kernels_own_source() -> None:
    """Of the convolutions before it rows of x stay in shared memory, where such tiles store 16 bits."""
    module = engine_nets.randomised(nn.Sequential(*(conv(16, 16, 3) for _ in range(9)))).eval()
    x = numerics.random(1, 16, 9, 9)
    captured = next(iter(optimize(module, x)._session._captured.values()))
    program = lower(captured.graph, [x], spec_reasons, "float16")
    executable = GpuCompiled(program, Packs(DEVICE), big, hopper=Hopper(emulated(), DEVICE, always=True))
    (members,) = (task.walk.members for task in executable.plan.tasks if task.walk is not None)
    assert [member.cut.halo for member in members if member.cut is not None] == [True] * 8 + [False]
    assert numerics.rel_l2(executable.run([x])[0], engine_nets.eager(module, x)) <= DEEP
