"""Plans and calls that do not fit are refused, naming the step, what was seen and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import (
    Buffer,
    ConvStep,
    EltwiseStep,
    ImportStep,
    LrnStep,
    NormalizeStep,
    Output,
    PairStep,
    Plan,
    PoolStep,
    View,
)
from inception_fast.kernels.spec import ConvSpec, PoolSpec

from cpu_plans import call, chain, chain_input, poisoned, weights


def changed(index: int, **fields: Any) -> Callable[[Plan], Plan]:
    def change(plan: Plan) -> Plan:
        steps = list(plan.steps)
        steps[index] = replace(steps[index], **fields)
        return replace(plan, steps=tuple(steps))

    return change


def buffer(index: int, **fields: Any) -> Callable[[Plan], Plan]:
    def change(plan: Plan) -> Plan:
        buffers = list(plan.buffers)
        buffers[index] = replace(buffers[index], **fields)
        return replace(plan, buffers=tuple(buffers))

    return change


def output(*views: View) -> Callable[[Plan], Plan]:
    return changed(1, outputs=tuple(Output(view, True) for view in views))


def steps(*added: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, steps=plan.steps + added)


def conv_spec(**fields: Any) -> Callable[[Plan], Plan]:
    return lambda plan: changed(1, spec=replace(plan.steps[1].spec, **fields))(plan)


def pool_spec(**fields: Any) -> Callable[[Plan], Plan]:
    return lambda plan: changed(2, spec=replace(plan.steps[2].spec, **fields))(plan)


V = View
ONES = np.ones(4, np.float32)
REFUSED: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "arena too small": (lambda p: replace(p, arena_bytes=1088), r"buffer 1 at 576 of 576 bytes.*arena of 1088"),
    "a place at the end of 64 bits": (buffer(1, position=2**63 - 64), r"buffer 1 at 9223372036854775744 of.*arena"),
    "bytes beyond 64 bits": (buffer(1, n=2**30, h=2**30, w=2**3), r"buffer 1 of shape \(1073741824.*fewer than 2\^60"),
    "negative arena": (lambda p: replace(p, arena_bytes=-1), "arena of -1 bytes"),
    "unaligned buffer": (buffer(1, position=516), "buffer 1 at 516.*multiple of 64"),
    "negative position": (buffer(1, position=-64), "buffer 1 at -64"),
    "unknown kind": (buffer(1, kind="heap"), "'heap'.*arena, input, output"),
    "empty buffer": (buffer(1, c=0), r"\(1, 6, 6, 0\)"),
    "empty input": (lambda p: replace(p, inputs=((1, 0, 6, 6),)), r"input shape \(1, 0, 6, 6\)"),
    "input of another shape": (buffer(0, kind="input", position=0, h=5), r"\(1, 5, 6, 4\).*\(1, 6, 6, 4\)"),
    "input out of range": (buffer(0, kind="input", position=1), "at 1.*one of 1 inputs"),
    "writing an input": (buffer(0, kind="input", position=0), "'import' writes buffer 0 of kind input"),
    "gap in the outputs": (buffer(2, position=1), "output position 1"),
    "negative output": (buffer(2, position=-1), "output position -1"),
    "an output twice": (buffer(1, kind="output", position=0), "buffer 2 at 0 among the outputs"),
    "output not written": (lambda p: replace(p, steps=p.steps[:2]), "the caller reads.*buffer 2"),
    "output half written": (buffer(2, c=5), "channel 4 holds nothing"),
    "buffer out of range": (changed(2, x=V(3, 0, 4)), "'pool': input in buffer 3.*one of 3"),
    "negative buffer": (changed(2, x=V(-1, 0, 4)), "'pool': input in buffer -1"),
    "view too long": (changed(2, x=V(1, 1, 4)), r"'pool': input channels \[1, 5\) of buffer 1.*\[0, 4\)"),
    "view before the start": (changed(2, x=V(1, -1, 4)), r"channels \[-1, 3\)"),
    "empty view": (changed(2, x=V(1, 0, 0)), r"channels \[0, 0\)"),
    "x of another batch": (conv_spec(n=2), r"'conv': input of shape \(1, 6, 6, 4\).*\(2, 6, 6, 4\)"),
    "x of another size": (conv_spec(h=5, padding=(2, 1, 1, 1)), r"'conv': input of shape.*\(1, 5, 6, 4\)"),
    "y of another size": (conv_spec(padding=(0, 0, 1, 1)), r"'conv': output of shape.*\(1, 4, 6, 4\)"),
    "too few columns": (output(V(1, 0, 3)), "'conv': outputs of 3 channels.*4"),
    "no output": (output(), "'conv': outputs of 0 channels"),
    "overlapping outputs": (
        lambda p: changed(1, residual=None)(output(V(1, 0, 2), V(1, 1, 2))(p)),
        r"outputs channels \[0, 2\).*\[1, 3\)",
    ),
    "residual with two outputs": (output(V(1, 0, 2), V(1, 2, 2)), "a residual with 2 outputs"),
    "residual of another size": (changed(1, residual=V(2, 0, 4)), r"residual of shape \(1, 3, 3, 4\)"),
    "conv onto its input": (output(V(0, 0, 4)), r"output channels \[0, 4\) of buffer 0 over operand"),
    "conv onto shared bytes": (buffer(1, position=64), "output channels.*buffer 1 over operand channels.*buffer 0"),
    "pool onto its input": (
        lambda p: steps(PoolStep("again", PoolSpec(1, 6, 6, 4, 1, 1), V(1, 0, 4), V(1, 0, 4)))(p),
        "'again': output.*over operand",
    ),
    "eltwise onto a shifted view": (
        steps(EltwiseStep("shift", V(1, 0, 3), V(1, 1, 3))),
        "'shift': output.*over operand",
    ),
    "eltwise of another size": (
        steps(EltwiseStep("e", V(1, 0, 4), V(2, 0, 4))),
        r"'e': output of shape \(1, 3, 3, 4\)",
    ),
    "reading before writing": (lambda p: replace(p, steps=p.steps[1:]), "'conv' reads.*buffer 0.*holds nothing"),
    "reading what was overwritten": (
        lambda p: replace(
            p,
            buffers=(*p.buffers, Buffer(1, 6, 6, 4, "arena", 64)),
            steps=(*p.steps, ImportStep("new", 0, V(3, 0, 4)), EltwiseStep("late", V(0, 0, 4), V(1, 0, 4))),
        ),
        "'late' reads.*buffer 0.*none overwrote since",
    ),
    "weight of another shape": (changed(1, weight=weights(4, 4, 3, 1)[0]), r"\(4, 4, 3, 1\).*\(4, 4, 3, 3\)"),
    "parts too few": (
        changed(1, weight=tuple(weights(2, 4, 3, 3)[:1])),
        r"weight of shape \(2, 4, 3, 3\).*\(4, 4, 3, 3\)",
    ),
    "parts too many": (
        changed(1, weight=(weights(4, 4, 3, 3)[0], weights(1, 4, 3, 3)[0])),
        r"weights of shapes \(4, 4, 3, 3\), \(1, 4, 3, 3\).*\(4, 4, 3, 3\) in all",
    ),
    "no parts": (changed(1, weight=()), r"weights of shapes .*\(4, 4, 3, 3\) in all"),
    "a part of another shape": (
        changed(1, weight=(weights(2, 4, 3, 3)[0], weights(2, 4, 3, 1)[0])),
        r"\(2, 4, 3, 1\).*\(4, 4, 3, 3\) in all",
    ),
    "a part of another dtype": (
        changed(1, weight=(weights(2, 4, 3, 3)[0], weights(2, 4, 3, 3)[0].astype(np.float64))),
        "weight of dtype float64",
    ),
    "weight of another dtype": (
        changed(1, weight=weights(4, 4, 3, 3)[0].astype(np.float64)),
        "weight of dtype float64",
    ),
    "weight not an array": (changed(1, weight=[1.0]), "weight of list"),
    "scale too long": (changed(1, scale=np.ones(5, np.float32)), "'conv': scale of length 5.*4"),
    "shift too short": (changed(1, shift=np.ones(3, np.float32)), "'conv': shift of length 3.*4"),
    "shift of two dimensions": (changed(1, shift=np.ones((2, 2), np.float32)), "shift has 2 dimensions"),
    "conv dtype": (conv_spec(dtype="float16"), "'conv'.*float16"),
    "pool dtype": (pool_spec(dtype="float16"), "'pool'.*float16"),
    "pool of another size": (pool_spec(stride=(1, 1)), r"'pool': output of shape \(1, 3, 3, 4\).*\(1, 5, 5, 4\)"),
    "pool shift too long": (changed(2, shift=np.ones(9, np.float32)), "'pool': shift of length 9"),
    "pool shift of another dtype": (changed(2, shift=np.ones(4)), "'pool': shift of dtype float64"),
    "import from nowhere": (changed(0, source=1), "'import': input 1.*one of 1"),
    "import of another size": (changed(0, y=V(2, 0, 4)), r"'import': output of shape \(1, 3, 3, 4\)"),
    "lrn window": (steps(LrnStep("lrn", V(1, 0, 4), V(0, 0, 4), 0, 1.0, 1.0, 1.0)), "'lrn': window of 0"),
    "lrn of another size": (steps(LrnStep("lrn", V(1, 0, 4), V(2, 0, 4), 3, 1.0, 1.0, 1.0)), "'lrn': output of shape"),
    "normalize of another size": (steps(NormalizeStep("n", V(1, 0, 4), V(2, 0, 4), 1.0)), "'n': output of shape"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_plan_that_does_not_fit_is_refused(change: Callable[[Plan], Plan], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.compile(change(chain()))


def staged(images: tuple[int, ...], *held: int, **fields: Any) -> Plan:
    """The chain of four images, its steps these at a time, its first two buffers of `held` images."""
    plan = replace(chain(4), images=images)
    for i, n in enumerate(held):
        plan = buffer(i, n=n)(plan)
    return pool_spec(n=images[2])(conv_spec(n=images[1])(replace(plan, **fields)))


STAGES: dict[str, tuple[Plan, str]] = {
    "too few numbers": (replace(chain(4), images=(2, 2)), "for 2 steps; allowed: for none or for 3"),
    "negative": (staged((-1, 2, 4), 2, 4), "'import': -1 images at a time; allowed: 0 or more"),
    "fewer later": (staged((4, 2, 4), 4, 4), "'import' runs 4 images at a time; allowed: a divisor of the 2"),
    "not a divisor of the batch": (staged((3, 3, 3), 3, 3), "multiple of the 3 that the step takes"),
    "all beside some": (staged((0, 4, 4), 4, 4), "'import' runs 0 images at a time"),
    "a spec of another number": (conv_spec(n=4)(staged((2, 2, 4), 2, 4)), r"\(2, 6, 6, 4\); allowed: \(4, 6, 6, 4\)"),
    "a buffer of too few": (staged((2, 2, 4), 2, 2), "buffer 1 of 2 images; allowed: a multiple of the 4"),
    "an output of too few": (buffer(2, n=2)(staged((2, 2, 2), 2, 2)), "an output of 2 images; allowed: 4"),
}


@pytest.mark.parametrize(("plan", "message"), STAGES.values(), ids=STAGES.keys())
def test_stages_that_do_not_follow_each_other_are_refused(plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.compile(plan)


def test_what_later_slices_overwrite_is_refused() -> None:
    """Memory that is free once, in the order of the steps, while the first ones have other images to come."""
    buffers = (
        Buffer(2, 6, 6, 4, "arena", 0),
        Buffer(2, 6, 6, 4, "arena", 4608),
        Buffer(4, 6, 6, 4, "arena", 0),
        Buffer(4, 6, 6, 4, "output", 0),
    )
    steps = (
        ImportStep("import", 0, V(0, 0, 4)),
        EltwiseStep("copy", V(0, 0, 4), V(1, 0, 4)),
        EltwiseStep("collect", V(1, 0, 4), V(2, 0, 4)),
        EltwiseStep("all", V(2, 0, 4), V(3, 0, 4)),
    )
    plan = Plan(buffers, steps, ((4, 4, 6, 6),), 4608 + 1152, (2, 2, 2, 4))
    with pytest.raises(ValueError, match=r"'all' reads.*buffer 2.*none overwrote since"):
        cpu.compile(plan)
    apart = replace(buffers[2], position=4608 + 1152)
    moved = replace(plan, buffers=(*buffers[:2], apart, buffers[3]), arena_bytes=4608 + 1152 + 2304)
    x = torch.arange(4 * 4 * 36.0).reshape(4, 4, 6, 6)
    assert torch.equal(call(cpu.compile(moved), moved, x)[0], x)


def test_pairs_must_be_connected() -> None:
    spec = ConvSpec(1, 6, 6, 4, 4, 1, 1)
    first = ConvStep("a", spec, V(0, 0, 4), *weights(4, 4, 1, 1), (Output(V(1, 0, 4), True),))
    apart = ConvStep("b", spec, V(0, 0, 4), *weights(4, 4, 1, 1), (Output(V(3, 0, 4), True),))
    grown = replace(chain(), buffers=(*chain().buffers, Buffer(1, 6, 6, 4, "arena", 1152)), arena_bytes=1728)
    with pytest.raises(ValueError, match="'pair': second reads"):
        cpu.compile(steps(PairStep("pair", "chain", first, apart))(grown))
    with pytest.raises(ValueError, match="'pair': second reads"):
        cpu.compile(steps(PairStep("pair", "split", first, replace(apart, x=V(1, 0, 4))))(grown))
    cpu.compile(steps(PairStep("pair", "split", first, apart))(grown))


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(TypeError, match="str"):
        cpu.compile(replace(chain(), steps=("relu",)))


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"inputs": []}, "0 inputs; allowed: 1"),
    "no output": ({"outputs": []}, "0 outputs; allowed: 1"),
    "dtype": ({"dtype": "float64"}, "float64.*float32, bfloat16, uint8"),
    "null input": ({"pointer": 0}, "input 0 is null"),
    "null output": ({"outputs": [0]}, "output 0 is null"),
    "null arena": ({"arena": 0}, "a null arena.*1152 bytes"),
    "unaligned arena": ({"arena": 4096 + 32}, "64-byte aligned"),
    "no threads": ({"threads": 0}, "0 threads.*1 to"),
    "too many threads": ({"threads": 10**6}, "1000000 threads"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_call_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    x, y = chain_input(), torch.zeros(36)
    arena = poisoned(288)
    inputs = [(change.get("pointer", x.data_ptr()), change.get("dtype", "float32"), x.stride())]
    with pytest.raises(ValueError, match=message):
        cpu.compile(chain()).run(
            change.get("inputs", inputs),
            change.get("outputs", [y.data_ptr()]),
            change.get("arena", arena.ctypes.data),
            change.get("threads", 1),
        )
    assert not y.any()


def test_an_input_used_in_place_must_be_dense() -> None:
    buffers = (Buffer(2, 3, 5, 6, "input", 0), Buffer(2, 3, 5, 6, "output", 0))
    plan = Plan(buffers, (EltwiseStep("copy", V(0, 0, 6), V(1, 0, 6)),), ((2, 6, 3, 5),), 0)
    compiled = cpu.compile(plan)
    x = torch.randn(2, 6, 3, 5)
    with pytest.raises(ValueError, match="input 0 is of another type or not dense"):
        call(compiled, plan, x)
    with pytest.raises(ValueError, match="input 0 is of another type or not dense"):
        call(compiled, plan, x.to(torch.uint8).contiguous(memory_format=torch.channels_last))
    dense = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(call(compiled, plan, dense)[0], x)
