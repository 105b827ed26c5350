"""Lowering: each value in memory of its own while it lives, concatenations and residuals in place, torch between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import ALIGNMENT, EltwiseStep, ImportStep, NormalizeStep, Plan
from torch import Tensor, nn

import engine_nets
import numerics
from engine_nets import NETS, Function, images, randomised, relative
from inception_fast.engine import interpret
from inception_fast.engine.passes import optimise
from inception_fast.engine.plan import Program, Tap, TorchItem, lower
from inception_fast.engine.program import ArenaPool, Compiled
from inception_fast.engine.segment import NativeItem, views
from plan_oracle import run_plan


def check_lifetimes(plan: Plan) -> None:
    """Follows who owns each byte: what a step reads is what was written for it, and nothing else came in between."""
    owner: dict[int, int] = {}
    for step in plan.steps:
        touched = {v.buffer for v in views(step)}
        for number in touched:
            buffer = plan.buffers[number]
            if buffer.kind != "arena":
                continue
            assert buffer.position % ALIGNMENT == 0 and buffer.position + buffer.bytes <= plan.arena_bytes
            lines = range(buffer.position // ALIGNMENT, (buffer.position + buffer.bytes + ALIGNMENT - 1) // ALIGNMENT)
            for line in lines:
                before = owner.get(line)
                assert before in (None, number) or before not in touched, f"{step.name}: two buffers in one place"
                owner[line] = number


def check_inputs(program: Program, item: NativeItem) -> None:
    """What a call reads of an earlier one stays until it returns: its steps wait for no input, and may run at once."""
    for number in (source for source in item.sources if isinstance(source, int)):
        read = program.buffers[number]
        for buffer in item.plan.buffers:
            apart = buffer.position >= read.position + read.bytes or read.position >= buffer.position + buffer.bytes
            assert read.kind != "arena" or buffer.kind != "arena" or apart


@pytest.mark.parametrize("name", [n for n in NETS if n.startswith("inception")], scope="module")
def test_lifetimes_of_the_variants(name: str) -> None:
    executable, _ = engine_nets.optimised(name)._session.executable([images(name)])
    for item in executable.program.items:
        check_lifetimes(item.plan)


def lowered(function: Callable[..., object], *inputs: Tensor, **modules: nn.Module) -> Program:
    """The program of a small network, checked natively against eager and, where all is native, by the oracle."""
    module = randomised(Function(function, **modules))
    graph, _ = optimise(engine_nets.capture(module, *inputs))
    program = lower(graph, inputs, cpu.reasons)
    with torch.no_grad():
        expected = module(*(x.clone() for x in inputs))
        wide = interpret.run(graph, inputs, torch.float64)
    flat = expected if isinstance(expected, (tuple, list)) else [expected]
    for found, wanted in zip(Compiled(program, ArenaPool()).run(inputs), flat, strict=True):
        assert relative(found, wanted) <= numerics.NET_MAX
    for item in program.items:
        if isinstance(item, NativeItem):
            check_lifetimes(item.plan)
            check_inputs(program, item)
    if len(program.items) == 1 and isinstance(program.items[0], NativeItem):
        check_oracle(program, program.items[0], inputs, wide)
    return program


def check_oracle(program: Program, item: NativeItem, inputs: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    sources = zip(item.sources, item.plan.inputs, strict=True)
    found = run_plan(item.plan, [inputs[s.op.index].reshape(shape) for s, shape in sources])
    for tap, wanted in zip(program.outputs, expected, strict=True):
        assert isinstance(tap, Tap)
        y = found[item.outputs.index(program.buffers[tap.view.buffer].position)]
        assert relative(y.reshape(wanted.shape), wanted) <= numerics.FP32_MAX


def steps(program: Program) -> list[object]:
    return [s for item in program.items if isinstance(item, NativeItem) for s in item.plan.steps]


def torch_items(program: Program) -> list[TorchItem]:
    return [item for item in program.items if isinstance(item, TorchItem)]


X = numerics.random(2, 4, 9, 9, seed=5)


def conv(cin: int, cout: int, kernel: object = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, **options)  # type: ignore[arg-type]


def test_nested_concatenations_are_one_buffer() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        inner = torch.cat([m.a(x), m.b(x)], 1)
        return m.d(torch.cat([m.c(x), inner, F.max_pool2d(inner, 1)], 1))

    modules = {"a": conv(4, 3), "b": conv(4, 5), "c": conv(4, 2), "d": conv(18, 3)}
    assert lowered(net, X, **modules).copies == 0


def test_what_goes_to_two_concatenations_is_copied_once() -> None:
    def net(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x)
        return m.c(torch.cat([y, m.b(x)], 1)), m.d(torch.cat([m.b(x), y, y], 1))

    modules = {"a": conv(4, 3), "b": conv(4, 5), "c": conv(8, 2), "d": conv(11, 2)}
    assert lowered(net, X, **modules).copies == 2


def test_an_input_goes_straight_into_a_concatenation() -> None:
    program = lowered(lambda m, x: torch.cat([m.a(x), x], 1), X, a=conv(4, 3, padding=1))
    assert program.copies == 0 and sum(isinstance(s, ImportStep) for s in steps(program)) == 2


def test_outputs_that_overlap() -> None:
    """The same value twice, a part of it, and a concatenation that holds it: each result is whole."""

    def net(m: Function, x: Tensor) -> tuple[Tensor, ...]:
        y = m.a(x).relu()
        both = torch.cat([y, m.b(x)], 1)
        return y, both, y, both[:, 1:4], y.mean((2, 3)), y.mean((2, 3), keepdim=True)

    lowered(net, X, a=conv(4, 3), b=conv(4, 5))


def test_merged_columns_with_an_unread_part() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = m.a(x)
        return torch.cat([y[:, 2:], m.b(x).relu()], 1)

    lowered(net, X, a=conv(4, 5, 1), b=conv(4, 3, 1))


def test_residual_in_place() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = m.a(x)
        for block in (m.b, m.c):
            y = F.relu(y + block(y))
        return F.max_pool2d(y, 2)

    modules = {"a": conv(4, 4), "b": conv(4, 4, padding=1), "c": conv(4, 4, padding=1)}
    program = lowered(net, X, **modules)
    # The 3x3 reads all of y, so its sum may not replace y while it reads.
    assert not any(s.residual == s.outputs[0].view for s in steps(program) if getattr(s, "residual", None))

    def bottleneck(m: Function, x: Tensor) -> Tensor:
        y = m.a(x)
        y = F.relu(y + m.up(m.down(y)))
        return F.max_pool2d(y, 2)

    program = lowered(bottleneck, X, a=conv(4, 4), down=conv(4, 2, 1), up=conv(2, 4, 1))
    (step,) = [s for s in steps(program) if getattr(s, "residual", None)]
    assert step.residual == step.outputs[0].view


@pytest.mark.parametrize("reader", ["later", "output", "concatenation"])
def test_residual_that_is_still_needed_is_kept(reader: str) -> None:
    def net(m: Function, x: Tensor) -> object:
        y = m.a(x)
        z = F.relu(y + m.up(m.down(y)))
        if reader == "later":
            return m.b(y), z
        return (y, z) if reader == "output" else torch.cat([z, y], 1)

    modules = {"a": conv(4, 4), "b": conv(4, 3), "down": conv(4, 2, 1), "up": conv(2, 4, 1)}
    program = lowered(net, X, **modules)
    (step,) = [s for s in steps(program) if getattr(s, "residual", None)]
    assert step.residual != step.outputs[0].view


def test_elementwise_in_place() -> None:
    program = lowered(lambda m, x: F.max_pool2d(m.bn(F.avg_pool2d(x, 3)), 2), X, bn=nn.BatchNorm2d(4))
    (step,) = [s for s in steps(program) if isinstance(s, EltwiseStep)]
    assert step.x == step.y


def test_vectors_and_norms() -> None:
    def net(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x).mean((2, 3))
        z = torch.cat([m.fc(y), y], 1)
        return F.normalize(z), m.lrn(x)

    program = lowered(net, X, a=conv(4, 6), fc=nn.Linear(6, 5), lrn=nn.LocalResponseNorm(3))
    assert any(isinstance(s, NormalizeStep) for s in steps(program)) and not torch_items(program)


def test_a_linear_layer_over_a_map() -> None:
    program = lowered(lambda m, x: m.fc(m.a(x).flatten(1)), X, a=conv(4, 2), fc=nn.Linear(98, 5))
    assert not torch_items(program) and len(steps(program)) == 3


def test_torch_between_native_steps() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = F.gelu(m.a(x))
        return torch.cat([m.b(y), F.max_pool2d(m.a(x), 3, 1), torch.sin(y[:, :, 1:-1, 1:-1])], 1).relu()

    program = lowered(net, X, a=conv(4, 6), b=conv(6, 5))
    assert [t.node.op.target._opname for t in torch_items(program)] == ["gelu", "slice", "slice", "sin"]
    assert all(t.reason for t in torch_items(program))


def test_what_a_call_reads_of_an_earlier_one_is_not_overwritten_beside_it() -> None:
    """The pool and the batch norm, in the memory that the pool reads for the last time, are of no use to each other."""

    def net(m: Function, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.sin(x)
        scaled = (y * 2).relu()
        return F.softmax(scaled, 1), scaled, F.max_pool2d(y, (7, 1), 1, (3, 0)), m.a(m.bn(x * 2))

    program = lowered(net, X, a=conv(4, 3), bn=nn.BatchNorm2d(4))
    assert any(isinstance(s, int) for item in program.items if isinstance(item, NativeItem) for s in item.sources)


def test_siblings_on_either_side_of_a_torch_call() -> None:
    """The later one is a column range of a convolution that an earlier native call runs."""

    def net(m: Function, x: Tensor) -> Tensor:
        y = m.c(m.a(x).sigmoid())
        return torch.cat([m.b(x), y], 1)

    program = lowered(net, X, a=conv(4, 3, 1), b=conv(4, 5, 1), c=conv(3, 2, 1))
    assert len(torch_items(program)) == 1 and program.copies == 1


def test_views_that_torch_makes_of_the_arena_do_not_change_later() -> None:
    def net(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x)
        turned = y.permute(0, 1, 3, 2)
        for _ in range(3):
            y = F.avg_pool2d(m.b(F.max_pool2d(y, 1)), 1)
        return turned, y

    lowered(net, X, a=conv(4, 6), b=conv(6, 6, padding=1))


def test_sizes_computed_at_run_time() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = m.a(x)
        return y.unfold(2, y.size(2), 1).sum(-1) + x.new_ones(1, 3, 1, 7)

    lowered(net, X, a=conv(4, 3))


def test_a_network_of_torch_alone() -> None:
    program = lowered(lambda m, x: F.gelu(x).permute(0, 2, 3, 1), X)
    assert not steps(program) and len(torch_items(program)) == 2


def test_padding_that_nothing_takes_in() -> None:
    program = lowered(lambda m, x: F.max_pool2d(F.pad(m.a(x), (1, 1, 1, 1)), 3), X, a=conv(4, 3))
    assert [t.reason for t in torch_items(program)] == ["padding that no convolution or pool behind it takes in"]


def test_reasons_of_the_backend_are_heard() -> None:
    graph, _ = optimise(engine_nets.capture(Function(lambda m, x: m.a(x), a=conv(4, 3)), X))
    program = lower(graph, [X], lambda spec: ["too odd a size", "wrong day"])
    assert [t.reason for t in torch_items(program)] == ["too odd a size; wrong day"]


def test_pixels_do_not_share_a_set_of_the_cache() -> None:
    """1024 float32 channels are a page: buffers of that pitch, or of a multiple, get a line more between pixels."""
    program = engine_nets.optimised("inception_v4").native_plans()[0]
    arena = [b for b in program.buffers if b.kind == "arena"]
    assert all(b.bytes // (b.n * b.h * b.w) % 4096 for b in arena)
    assert any(b.c == 1024 + 16 for b in arena)


def test_results_that_are_a_whole_buffer_are_made_as_they_are_returned() -> None:
    def three(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = m.conv(x)
        return y, y[:, :2], F.adaptive_avg_pool2d(y, 1).flatten(1)

    x = torch.randn(2, 3, 6, 5)
    y, part, vector = Compiled(lowered(three, x, conv=nn.Conv2d(3, 4, 3)), ArenaPool()).run([x])
    assert y.is_contiguous(memory_format=torch.channels_last) and vector.is_contiguous()
    assert not vector._is_view()
    assert torch.equal(part, y[:, :2])
