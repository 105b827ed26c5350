"""The fused operations as PyTorch operators: schemas, fakes, gradients, compile, export, autocast, FLOP counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inception_fast.kernels import reference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import numerics
from inception_fast import ops
from op_calls import conv_arguments, pair_arguments, pool_arguments

# One call of each operation: (operator, arguments for a dtype).
CALLS: dict[str, tuple[Any, Callable[[torch.dtype], list[Any]]]] = {
    "conv": (torch.ops.inception_fast.conv_bn_relu.default, lambda dtype: conv_call(dtype, "wide_1x7", False)),
    "conv_residual": (torch.ops.inception_fast.conv_bn_relu.default, lambda dtype: conv_call(dtype, "wide_1x7", True)),
    "conv_lopsided": (
        torch.ops.inception_fast.conv_bn_relu.default,
        lambda dtype: conv_call(dtype, "lopsided_tf_same", False),
    ),
    "pair": (torch.ops.inception_fast.asymmetric_pair.default, lambda dtype: pair_arguments("chain", dtype, 3)),
    "split": (torch.ops.inception_fast.parallel_split.default, lambda dtype: pair_arguments("split", dtype, 3)),
    "pool_project": (
        torch.ops.inception_fast.pool_project.default,
        lambda dtype: [*pool_arguments(dtype), [3, 3], [1, 1], [1, 1], True],
    ),
}


def conv_call(dtype: torch.dtype, case: str, with_residual: bool) -> list[Any]:
    arguments, options = conv_arguments(case, dtype)
    residual = numerics.random(2, 24, 9, 9, seed=8, dtype=dtype) if with_residual else None
    tail = [False, 0.5] if with_residual else [True, 1.0]
    return [*arguments, residual, list(options["stride"]), list(options["padding"]), *tail]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", CALLS)
def test_operator_is_well_formed(name: str, layout: str) -> None:
    """Only a channels_last input finds a fake with wrong strides."""
    operator, build = CALLS[name]
    arguments = build(torch.float32)
    arguments[0] = numerics.as_layout(arguments[0], layout)
    for argument in arguments:
        if isinstance(argument, Tensor):
            argument.requires_grad_()
    torch.library.opcheck(operator, tuple(arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_operator_is_well_formed_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    operator, build = CALLS[name]
    arguments = build(dtype)
    arguments[0] = numerics.as_layout(arguments[0], "channels_last")
    torch.library.opcheck(operator, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def small_call(name: str) -> tuple[Any, list[Any]]:
    """float64 arguments of few elements, each tensor asking for a gradient."""
    operator, build = CALLS[name]
    arguments = build(torch.float64)
    arguments[0] = arguments[0][:1, :2, :3, :4]
    if name.startswith("conv"):
        kernel = (1, 3) if name != "conv_lopsided" else (3, 3)
        arguments[1] = arguments[1][:2, :2, : kernel[0], : kernel[1]]
        arguments[2:4] = [values[:2] for values in arguments[2:4]]
        arguments[6] = [0, 0, 1, 1] if name != "conv_lopsided" else arguments[6]
        arguments[4] = None if arguments[4] is None else arguments[4][:1, :2, :3, :4]
    elif name == "pool_project":
        arguments[1:4] = [arguments[1][:2, :2], *(values[:2] for values in arguments[2:4])]
    else:
        arguments[1:4] = [arguments[1][:2, :2], *(values[:2] for values in arguments[2:4])]
        arguments[4:7] = [arguments[4][:2, :2], *(values[:2] for values in arguments[5:7])]
    return operator, [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]


@pytest.mark.parametrize("name", CALLS)
def test_gradients_and_their_gradients(name: str) -> None:
    operator, arguments = small_call(name)
    places = [place for place, argument in enumerate(arguments) if isinstance(argument, Tensor)]

    def call(*tensors: Tensor) -> Tensor:
        filled = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return operator(*filled)

    inputs = [arguments[place] for place in places]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_float32_gradients_keep_their_budget() -> None:
    arguments, options = conv_arguments("channels_equal_the_map")
    narrow = [argument.requires_grad_() for argument in arguments]
    exact = [argument.detach().double().requires_grad_() for argument in arguments]
    ops.conv_bn_relu(*narrow, **options).square().sum().backward()
    reference.conv(*exact, **options).square().sum().backward()
    for gradient, expected in zip(narrow, exact, strict=True):
        numerics.assert_close_gradient(gradient.grad, expected.grad)


def test_only_the_asked_gradients_are_computed() -> None:
    arguments = pair_arguments("chain")
    arguments[5].requires_grad_()
    ops.asymmetric_pair(*arguments).sum().backward()
    assert arguments[5].grad is not None and all(a.grad is None for a in arguments if a is not arguments[5])


def all_four(x: Tensor, arguments: list[Tensor]) -> Tensor:
    """Each operation once, on x [n, 8, h, w]."""
    w, w1, w3 = arguments
    one, zero = x.new_ones(8, dtype=torch.float32), x.new_zeros(8, dtype=torch.float32)
    y = ops.conv_bn_relu(x, w, one, zero, stride=1, padding=0, residual=x, residual_scale=0.5)
    y = ops.asymmetric_pair(y, w1, one, zero, w3, one, zero)
    y = ops.parallel_split(y, w3, one, zero, w1, one, zero)[:, 4:12]
    return ops.pool_project(y, w, one, zero)


def all_four_weights() -> list[Tensor]:
    shapes = ((8, 8, 1, 1), (8, 8, 1, 3), (8, 8, 3, 1))
    return [numerics.random(*shape, seed=place) for place, shape in enumerate(shapes)]


def test_compile_takes_the_whole_graph_at_any_batch_size() -> None:
    weights = all_four_weights()
    compiled = torch.compile(all_four, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (2, 3, 5):
            x = numerics.random(n, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
            y = compiled(x, weights)
            expected = all_four(x, weights)
            assert torch.equal(y, expected) and y.stride() == expected.stride()
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert numerics.rel_l2(gradient, torch.autograd.grad(expected.sum(), x)[0]) <= numerics.GRAD_REL_L2


class AllFour(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(all_four_weights())

    def forward(self, x: Tensor) -> Tensor:
        return all_four(x, list(self.weights))


def test_export_keeps_the_operators() -> None:
    module, x = AllFour(), numerics.random(2, 8, 5, 6)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    called = {str(node.target) for node in program.graph.nodes if "inception_fast" in str(node.target)}
    names = ("conv_bn_relu", "asymmetric_pair", "parallel_split", "pool_project")
    assert called == {f"inception_fast.{name}.default" for name in names}
    more = numerics.random(3, 8, 5, 6)
    assert torch.equal(program.module()(more), module(more))


def test_a_saved_program_needs_the_package_alone(tmp_path: Path) -> None:
    """Its operators are there once `inception_fast` is imported."""
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(AllFour(), (numerics.random(2, 8, 5, 6),)), path)
    code = (
        f"import torch, inception_fast; print(torch.export.load({str(path)!r}).module()(torch.ones(2, 8, 5, 6)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(AllFour()(torch.ones(2, 8, 5, 6)).shape)


def test_autocast_casts_all_but_scale_and_shift() -> None:
    arguments, options = conv_arguments("wide_1x7")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.conv_bn_relu(*arguments, **options)
    assert y.dtype is torch.bfloat16
    narrow = [argument.bfloat16() for argument in arguments[:2]]
    assert torch.equal(y, ops.conv_bn_relu(*narrow, *arguments[2:], **options))
    arguments[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.conv_bn_relu(*arguments, **options).sum().backward()
    assert arguments[0].grad is not None and arguments[0].grad.dtype is torch.float32


def test_flop_counter_counts_the_operations() -> None:
    weights, x = all_four_weights(), numerics.random(2, 8, 5, 6)
    with FlopCounterMode(display=False) as counter:
        all_four(x, weights)
    assert counter.get_total_flops() == 2 * (2 * 5 * 6) * 8 * 8 * (1 + 2 * 3 + 2 * 3 + 1)
    kernel, norm = torch.ones(4, 8, 3, 3, requires_grad=True), torch.ones(4)
    with FlopCounterMode(display=False) as counter:
        ops.conv_batch_norm_relu(x, kernel, norm, norm, stride=1, padding=1, eps=1e-3)
    assert counter.get_total_flops() == 2 * (2 * 5 * 6) * 4 * 8 * 9


def test_a_flop_counter_imported_later_counts_them_too() -> None:
    """The counter is not imported with the operations, since it imports Triton."""
    program = (
        "import sys, torch, inception_fast as fast; fast.ops\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    x, w, v = torch.ones(1, 8, 5, 6), torch.ones(8, 8, 1, 1), torch.ones(8)\n"
        "    fast.ops.conv_bn_relu(x, w, v, v, stride=1, padding=0)\n"
        "assert counter.get_total_flops() == 2 * 30 * 64, counter.get_total_flops()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
