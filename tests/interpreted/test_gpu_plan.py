"""Whole plans as GPU launches: what the interpreter computes equals the native CPU runner, in any order that the
streams and their waits allow.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from inception_fast.kernels.plan import Buffer, ConvStep, ImportStep, Plan, View
from inception_fast.kernels.spec import ConvSpec
from inception_fast.kernels.triton.configs import Config
from torch import Tensor, nn
from torch.nn import functional as F

import engine_nets
import numerics
from inception_fast.backends.triton_gpu import spec_reasons
from inception_fast.engine import gpu_segment, gpu_session, gpu_tune, interpret, optimize
from inception_fast.engine import graph as ir
from inception_fast.engine.gpu_memory import Keeper
from inception_fast.engine.gpu_plan import GpuPlan, Packs
from inception_fast.engine.gpu_runner import GpuCompiled, on_device
from inception_fast.engine.plan import Program, lower
from inception_fast.engine.report import make_report
from inception_fast.engine.segment import NativeItem
from inception_fast.engine.session import Session

from .maps import DEVICE


def big(spec: ConvSpec) -> Config:
    """Large tiles, which the interpreter likes, and a split where the map is small."""
    return Config(block_m=128, block_n=64, block_k=64, split=2 if spec.n * spec.oh * spec.ow < 64 else 1)


class Block(nn.Module):
    """Every kind of step: stem, siblings, pair, split, pools of all kinds, residual, concatenation, head."""

    def __init__(self) -> None:
        super().__init__()

        def conv(c: int, oc: int, kernel: Any, stride: int = 1, padding: Any = 0) -> nn.Sequential:
            made = nn.Conv2d(c, oc, kernel, stride, padding, bias=False)
            return nn.Sequential(made, nn.BatchNorm2d(oc, eps=1e-3), nn.ReLU())

        self.stem, self.one, self.two = conv(3, 16, 3, 2), conv(16, 24, 1), conv(16, 12, 1)
        self.pair = nn.Sequential(conv(12, 20, (1, 7), padding=(0, 3)), conv(20, 24, (7, 1), padding=(3, 0)))
        self.left, self.right = conv(24, 16, (1, 3), padding=(0, 1)), conv(24, 16, (3, 1), padding=(1, 0))
        self.pooled, self.up, self.head = conv(16, 8, 1), nn.Conv2d(64, 64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        one, pair = self.one(x), self.pair(self.two(x))
        split = torch.cat((self.left(one), self.right(one)), 1)
        pool = self.pooled(F.avg_pool2d(x, 3, 1, 1))
        x = torch.cat((pair, split, pool), 1)
        x = F.relu(x + 0.17 * self.up(x))
        x = F.max_pool2d(x, 3, 2)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def lowered(module: nn.Module, x: Tensor, dtype: str) -> tuple[Program, Any]:
    native = optimize(module, x)
    (captured,) = {id(c): c for c in native._session._captured.values()}.values()
    return lower(captured.graph, [x], spec_reasons, dtype), native


@cache
def block(batch: int, dtype: str = "float32") -> tuple[Tensor, Program, Any]:
    """Images, the program for them and the native module, made once."""
    x = numerics.random(batch, 3, 23, 21)
    if dtype != "float32":
        _, _, native = block(batch)
        return x, lower(next(iter(native._session._captured.values())).graph, [x], spec_reasons, dtype), native
    return x, *lowered(engine_nets.randomised(Block()).eval(), x, dtype)


class Mixed(nn.Module):
    """A mirrored map, which has no kernel, in the middle: its input is read again behind it, by a convolution and in
    a concatenation, and both it and its result are results too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(32, 8, 3)
        self.beside, self.head = nn.Conv2d(16, 16, 1), nn.Linear(8, 5)
        self.register_buffer("offset", torch.linspace(0, 1, 11))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.first(x))
        mirrored = torch.flip(x, (3,)) / 8 + self.offset
        y = F.relu(self.second(torch.cat((self.beside(x), mirrored), 1)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)), mirrored, x


@cache
def mixed(dtype: str, batch: int = 2) -> tuple[Tensor, Program, nn.Module]:
    """Images, the program with torch in it, and the module."""
    torch.manual_seed(3)
    module = Mixed().eval()
    x = numerics.random(batch, 3, 9, 11)
    return x, lowered(module, x, dtype)[0], module


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_torch_runs_between_native_plans(dtype: str) -> None:
    """Twice, and with other images in between: what torch reads and makes is this call's."""
    x, program, module = mixed(dtype)
    compiled = GpuCompiled(program, Packs(DEVICE), big)
    assert len(compiled.native) == 3 and compiled.kept and compiled.ops
    first = compiled.run([x.to(DEVICE)])
    before = [y.clone() for y in first]
    other = compiled.run([2 * x.to(DEVICE)])
    again = compiled.run([x.to(DEVICE)])
    with torch.no_grad():
        wanted = module.double()(x.double())
        module.float()
    for y, kept, twice, third, expected in zip(first, before, other, again, wanted, strict=True):
        assert y.dtype is torch.float32 and torch.equal(y, kept) and torch.equal(y, third)
        assert not torch.equal(y, twice) and y.data_ptr() != third.data_ptr()
        allowed = numerics.FP32_REL_L2 * 4 if dtype == "float32" else numerics.FP16_REL_L2 * 4
        assert numerics.rel_l2(y.cpu(), expected) <= allowed


def test_a_first_call_in_inference_mode_binds_no_later_one() -> None:
    for x, program in (mixed("float32")[:2], block(1)[:2]):
        compiled = GpuCompiled(program, Packs(DEVICE), big)
        with torch.inference_mode():
            first = compiled.run([x.to(DEVICE)])
        again = compiled.run([x.to(DEVICE)])
        assert all(torch.equal(a, b) and not b.is_inference() for a, b in zip(first, again, strict=True))


def test_a_default_device_of_the_callers_reaches_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    for x, program in (mixed("float32")[:2], block(1)[:2]):
        plain = GpuCompiled(program, Packs(DEVICE), big).run([x.to(DEVICE)])
        with torch.device("meta"):
            found = GpuCompiled(program, Packs(DEVICE), big).run([x.to(DEVICE)])
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    with torch.device("meta"):
        (stand_in,) = gpu_session.on_cpu([x])
    assert stand_in.device.type == "cpu" and stand_in.shape == x.shape


def test_the_report_says_what_torch_runs() -> None:
    x, _, module = mixed("float32")
    session = Session(module, (x.to(DEVICE),), {}, "triton", "float32")
    executable, captured = session.executable([x.to(DEVICE)])
    report = make_report("Mixed", "triton", executable, captured, [x])
    (mirrored,) = [step for step in report.fallbacks if "flip" in step.kind]
    assert mirrored.backend == "torch" and mirrored.reason and "through torch" in str(report)
    assert report.counts["native_calls"] == 3
    assert [step.backend for step in report.steps].count("triton") >= 4


def test_calls_from_many_threads_do_not_meet() -> None:
    """Each gets what a call alone gives, whether torch runs in between or not."""
    for x, program in (mixed("float32")[:2], block(1)[:2]):
        compiled = GpuCompiled(program, Packs(DEVICE), big)
        images = [(1 + i) * x.to(DEVICE) for i in range(2)]
        alone = [compiled.run([one]) for one in images]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(compiled.run, [[one] for one in images * 3]))
        for mine, wanted in zip(together, alone * 3, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


def test_programs_of_many_sizes_hold_bounded_memory() -> None:
    """The one that ran longest ago gives up what it holds, and takes it anew when it is called again."""
    made = [mixed("float32", batch)[:2] for batch in (1, 2, 3)]
    keeper, packs = Keeper(0), Packs(DEVICE)
    programs = [GpuCompiled(program, packs, big, keeper=keeper) for _, program in made]
    keeper.limit = programs[1].needed_bytes + programs[2].needed_bytes
    first = programs[0].run([made[0][0].to(DEVICE)])
    assert 0 < programs[0].held_bytes <= programs[0].needed_bytes
    programs[1].run([made[1][0].to(DEVICE)])
    assert programs[0].held_bytes, "both fit"
    programs[2].run([made[2][0].to(DEVICE)])
    assert not programs[0].held_bytes and programs[1].held_bytes
    assert keeper.held_bytes <= keeper.limit
    again = programs[0].run([made[0][0].to(DEVICE)])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not programs[1].held_bytes


def test_memory_is_counted_while_another_thread_makes_segments() -> None:
    """As a program does before it runs, of those that run."""
    x, program, _ = mixed("float32")
    keeper, packs = Keeper(1 << 40), Packs(DEVICE)
    one, two = (GpuCompiled(program, packs, big, keeper=keeper) for _ in range(2))
    one.run([x.to(DEVICE)])

    class Growing:
        @property
        def bytes(self) -> int:
            segments[len(segments)] = SimpleNamespace(bytes=1)  # type: ignore[assignment]
            return 5

    before, segments = one.held_bytes, one.segments
    segments[-1] = Growing()  # type: ignore[assignment]
    two.run([x.to(DEVICE)])
    segments[-1] = SimpleNamespace(bytes=0)  # type: ignore[assignment]
    assert before < one.held_bytes < before + 5


def test_a_running_program_keeps_its_memory() -> None:
    x, program, _ = mixed("float32")
    keeper, packs = Keeper(0), Packs(DEVICE)
    one, two = (GpuCompiled(program, packs, big, keeper=keeper) for _ in range(2))
    one.run([x.to(DEVICE)])
    with one._lock:
        two.run([x.to(DEVICE)])
        assert one.held_bytes
    two.run([x.to(DEVICE)])
    assert not one.held_bytes
    del one
    assert keeper.held_bytes == two.held_bytes


def test_parameters_of_torch_calls_move_to_the_device() -> None:
    _, program, _ = mixed("float32")
    ops = [item.node.op for item in program.items if not isinstance(item, NativeItem)]
    moved = [on_device(op, torch.device("meta")) for op in ops]
    constants = [op.value for op in moved if isinstance(op, ir.Constant)]
    assert constants and all(value.is_meta for value in constants)
    assert all(type(op) is type(twin) for op, twin in zip(ops, moved, strict=True))
    made = ir.Torch(torch.ops.aten.zeros.default, ([2, 3],), {"device": torch.device("cpu")}, "a factory")
    assert interpret.evaluate(on_device(made, torch.device("meta")), []).is_meta


@pytest.mark.parametrize("form", ["pointer", "tma"])
def test_a_small_network_equals_the_native_runner(form: str) -> None:
    x, program, native = block(2, "float32")
    compiled = GpuCompiled(program, Packs(DEVICE), lambda spec: replace(big(spec), form=form))
    kinds = [type(task.step).__name__ for task in compiled.plan.tasks]
    assert "ImportStep" not in kinds and {"ConvStep", "PairStep", "PoolStep"} <= set(kinds)
    (y,) = compiled.run([x])
    assert engine_nets.relative(y.cpu(), native(x)) <= numerics.NET_MAX
    (again,) = compiled.run([x])
    assert torch.equal(y, again) and y.data_ptr() != again.data_ptr()
    (other,) = compiled.run([2 * x])
    assert torch.equal(y, again) and not torch.equal(other, y)


def test_float16_stays_near() -> None:
    """Twelve layers in a row, each rounded once."""
    x, program, native = block(2, "float16")
    (y,) = GpuCompiled(program, Packs(DEVICE), big).run([x])
    assert y.dtype is torch.float32
    assert numerics.rel_l2(y.cpu(), native(x)) <= 12**0.5 * numerics.FP16_REL_L2 * 2


@pytest.mark.parametrize("kind", ("read again", "read behind a pool", "siblings"))
def test_a_concatenation_that_is_a_result_takes_only_what_no_step_reads(kind: str) -> None:
    """It is float32: operands are of the plan's format, and so are all columns of siblings, which are one launch."""
    torch.manual_seed(5)
    first, beside, behind = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        y = F.max_pool2d(y, 2) if kind == "read behind a pool" else y
        return torch.cat((y, self.behind(F.relu(self.beside(x)) if kind == "siblings" else y)), 1)

    module = engine_nets.Function(forward, first=first, beside=beside, behind=behind).eval()
    x = numerics.random(2, 8, 6, 7)
    compiled = GpuCompiled(lowered(module, x, "float16")[0], Packs(DEVICE), big)
    for step in compiled.plan.plan.steps:
        if isinstance(step, ConvStep):
            dtypes = [
                compiled.plan.plan.buffers[view.buffer].dtype for view in (step.x, *(o.view for o in step.outputs))
            ]
            assert dtypes[0] == "float16" and len(set(dtypes[1:])) == 1
    with torch.no_grad():
        wanted = module.double()(x.double())
    assert numerics.rel_l2(compiled.run([x.to(DEVICE)])[0].cpu(), wanted) <= 4 * numerics.FP16_REL_L2


def test_an_input_waits_in_the_format_it_is_rounded_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bits; but not where the stem normalises first, nor in what is no float32."""
    x, program, _ = block(2, "float16")
    narrow = GpuCompiled(program, Packs(DEVICE), big)
    y = narrow.run([x])[0]
    assert [[z.dtype for z in segment.inputs] for segment in narrow.segments.values()] == [[torch.float16]]
    monkeypatch.setattr(gpu_segment, "held_as", lambda plan, source, dtype: dtype)
    wide = GpuCompiled(program, Packs(DEVICE), big)
    assert torch.equal(wide.run([x])[0], y) and wide.held_bytes > narrow.held_bytes
    assert [[z.dtype for z in segment.inputs] for segment in wide.segments.values()] == [[torch.float32]]


def test_what_else_enters_waits_as_it_comes() -> None:
    entry = ImportStep("x", 0, View(0, 0, 3))
    buffers = tuple(
        Buffer(1, 4, 4, 3, "arena", i, dtype) for i, dtype in enumerate(("bfloat16", "float32", "bfloat16"))
    )

    def kept(*steps: ImportStep, dtype: torch.dtype = torch.float32) -> torch.dtype:
        return gpu_segment.held_as(Plan(buffers, steps, ((1, 3, 4, 4),), 0), 0, dtype)

    other = replace(entry, source=1, y=View(1, 0, 3))
    assert kept(entry) == kept(entry, replace(entry, y=View(2, 0, 3))) == kept(entry, other) == torch.bfloat16
    assert kept(entry, replace(entry, y=View(1, 0, 3))) == torch.float32, "read in two formats"
    assert kept(replace(entry, scale=np.ones(3, np.float32))) == torch.float32
    assert kept(replace(entry, shift=np.ones(3, np.float32))) == torch.float32
    assert kept() == torch.float32
    for dtype in (torch.uint8, torch.float64, torch.float16):  # float64 would be rounded twice on the other way
        assert kept(entry, dtype=dtype) == dtype


def test_bytes_enter_through_the_stem() -> None:
    """Normalisation in front of the stem becomes the stem's own reading."""
    module = engine_nets.randomised(Block()).eval()
    x = (numerics.random(2, 3, 23, 21).abs() * 255).to(torch.uint8)
    wrapped = engine_nets.Function(lambda self, v: self.net((v.float() - 127.5) / 127.5), net=module).eval()
    program, native = lowered(wrapped, x, "float32")
    compiled = GpuCompiled(program, Packs(DEVICE), big)
    assert sum(task.entry is not None for task in compiled.plan.tasks) == 1
    assert engine_nets.relative(compiled.run([x])[0].cpu(), native(x)) <= numerics.NET_MAX


@pytest.mark.parametrize("seed", range(3))
def test_any_order_that_streams_allow_gives_the_same_bits(seed: int) -> None:
    """What a GPU may do: streams run in order, tasks after what they wait for, everything else at any time."""
    x, program, _ = block(1, "float32")
    plan = GpuCompiled(program, Packs(DEVICE), big).plan
    assert len({task.stream for task in plan.tasks}) > 1

    def run(order: list[int]) -> Tensor:
        arena = torch.full((plan.arena_bytes + 64,), 255, dtype=torch.uint8, device=DEVICE)
        outputs = [torch.empty(b.n, b.h, b.w, b.c, device=DEVICE) for b in plan.plan.outputs]
        launches = plan.launches([x.to(DEVICE)], outputs, arena[-arena.data_ptr() % 64 :])
        for j in order:
            for one in launches[j]:
                one.run()
        return outputs[0]

    first = run(list(range(len(plan.tasks))))
    generator, done, orders = random.Random(seed), set[int](), []
    while len(done) < len(plan.tasks):
        ready = [
            j
            for j, task in enumerate(plan.tasks)
            if j not in done
            and all(i in done for i in task.waits)
            and all(i in done for i in range(j) if plan.tasks[i].stream == task.stream)
        ]
        orders.append(generator.choice(ready))
        done.add(orders[-1])
    assert orders != sorted(orders)
    assert torch.isfinite(first).all() and torch.equal(run(orders), first)


def test_a_missing_wait_would_be_seen() -> None:
    """Without its waits a task may run before what it reads is there, and then the result differs."""
    _, program, _ = block(1, "float32")
    plan = GpuCompiled(program, Packs(DEVICE), big).plan
    assert any(task.waits for task in plan.tasks)
    for j, task in enumerate(plan.tasks):
        reached = set(task.needs)
        ordered = {i for i in range(j) if plan.tasks[i].stream == task.stream}
        for i in sorted(ordered | set(task.waits), reverse=True):
            ordered |= {i} | {k for k in range(i) if plan.tasks[k].stream == plan.tasks[i].stream}
        assert reached <= ordered, f"{task.name} may start before {sorted(reached - ordered)}"


def test_weights_are_packed_once_for_all_batches() -> None:
    packs = Packs(DEVICE)
    _, program, native = block(1, "float32")
    GpuCompiled(program, packs, big)
    before = packs.bytes
    captured = next(iter(native._session._captured.values()))
    other = lower(captured.graph, [numerics.random(1, 3, 31, 31)], spec_reasons, "float32")
    GpuCompiled(other, packs, big)
    assert packs.bytes == before


def test_tiles_are_looked_up_for_every_convolution() -> None:
    _, program, _ = block(1, "float32")
    looked_up: list[ConvSpec] = []
    compiled = GpuCompiled(program, Packs(DEVICE), lambda spec: looked_up.append(spec) or big(spec))  # type: ignore
    found = gpu_tune.wanted(compiled.plan.tasks)
    assert found and {one.spec for one in found} == {replace(spec, residual=False) for spec in looked_up}
    assert [one.spec.c for one in found if one.stem] == [3]
    assert [one.spec for one in found if one.residual] == [replace(s, residual=False) for s in looked_up if s.residual]
    cut = {one.spec.oc: [(group.oc, group.kh, group.kw, group.relu) for group in one.groups] for one in found}
    assert cut[32] == [(16, 1, 3, True), (16, 3, 1, True)], "a split's two convolutions, of taps of their own"
    assert cut[44] == [(24, 1, 1, True), (12, 1, 1, True), (8, 1, 1, False)], "siblings; a pool follows the last"


def test_what_is_not_finite_stays_in_its_group() -> None:
    """Of an image, which stems read, and of a map that torch made."""
    torch.manual_seed(4)
    first, second = nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(self.first(x * 0.5 + 1)), self.second(x.flip(2))

    module = engine_nets.Function(forward, first=first, second=second).eval()
    x = numerics.random(2, 4, 6, 7)
    program, _ = lowered(module, x, "float32")
    compiled = GpuCompiled(program, Packs(DEVICE), big)
    tasks = [task for plan in compiled.native.values() for task in plan.tasks]
    assert sum(task.entry is not None for task in tasks) >= 2 and sum(task.whole is not None for task in tasks) == 6
    assert all(compiled.ran_by(step) == ("triton", "") for plan in compiled.native.values() for step in plan.plan.steps)
    x[0, 0, 2, 2], x[1, 3, 4, 1] = float("inf"), float("nan")
    with torch.no_grad():
        wanted = module(x)
    for y, expected in zip(compiled.run([x.to(DEVICE)]), wanted, strict=True):
        assert torch.equal(y.cpu().isfinite(), expected.isfinite()) and not expected.isfinite().all()
        found, finite = y.cpu().nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0)
        assert numerics.rel_l2(found, finite) <= numerics.FP32_REL_L2


def test_buffers_of_others_need_memory_of_the_callers() -> None:
    _, program, _ = mixed("float32")
    later = [item for item in program.items if isinstance(item, NativeItem)][-1]
    assert any(b.kind == "input" for b in later.plan.buffers)
    with pytest.raises(ValueError, match="input buffers; allowed: in memory that is kept"):
        GpuPlan(later.plan, Packs(DEVICE), big)


def test_an_arena_too_small_is_refused() -> None:
    x, program, _ = block(1, "float32")
    plan: GpuPlan = GpuCompiled(program, Packs(DEVICE), big).plan
    with pytest.raises(ValueError, match="allowed: at least"):
        plan.launches([x], [torch.empty(1, 1, 1, 10)], torch.empty(8, dtype=torch.uint8))


def test_a_session_runs_on_the_gpu_backend() -> None:
    """The way from a module to its results and its report, on the interpreter's device."""
    module = engine_nets.randomised(Block()).eval()
    x = numerics.random(1, 3, 23, 21)
    there = x.to(DEVICE)
    session = Session(module, (there,), {}, "triton", "float32")
    session.plan([there])
    y = session((there,), {})
    assert engine_nets.relative(y.cpu(), engine_nets.eager(module, x)) <= numerics.NET_MAX
    executable, captured = session.executable([there])
    report = make_report("Block", "triton", executable, captured, [x])
    assert {step.backend for step in report.steps} == {"triton"} and not report.fallbacks
    assert report.counts["packed_bytes"] > 0
