"""Which modules are plain, so that a layer may compute in their place: of torch's class, no hooks, no transforms."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as every

from . import _trained_layer
from ._checks import foreign


def conv_problem(conv: nn.Module) -> str | None:
    """Why the fused operations cannot take a convolution's place; None when they can."""
    if type(conv) is not nn.Conv2d:
        return f"convolution of class {type(conv).__name__}; allowed: torch.nn.Conv2d"
    if conv.groups != 1:
        return f"groups {conv.groups}; allowed: 1"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation}; allowed: (1, 1)"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} of mode {conv.padding_mode!r}; allowed: numbers, 'zeros'"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "_conv_forward" in module.__dict__
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


def by_torch() -> bool:
    """Whether all has to be torch's own operations: they are exported, traced, or transformed."""
    if _exported() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return _in_function_transform() if torch.compiler.is_compiling() else _trained_layer.transformed()


@_trained_layer.asked_while_traced
def _exported() -> bool:
    """Not only compiled, which torch 2.11 calls exported too where Dynamo reads this."""
    return torch.compiler.is_exporting()


@_trained_layer.asked_while_traced
def _in_function_transform() -> bool:
    """Whether torch.func looks on, for compiled code: asked while it is traced, once for each of the places."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def fusable(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether conv and bn may run as scale * conv + shift: both plain, statistics frozen."""
    return (
        type(bn) is nn.BatchNorm2d
        and not bn.training
        and bn.running_mean is not None
        and conv_problem(conv) is None
        and not (has_hooks(conv) or has_hooks(bn))
        and not foreign(conv.weight)
        and not by_torch()
    )


def plainly_learns(conv: nn.Conv2d) -> bool:
    return (
        torch.is_grad_enabled()
        and conv_problem(conv) is None
        and conv.bias is None
        and (weight := conv.weight).requires_grad
        and weight.dtype is torch.float32
        and not (foreign(weight) or has_hooks(conv))
        and not torch.compiler.is_compiling()
        and not by_torch()
    )


def plainly_trains(bn: nn.Module) -> bool:
    return (
        type(bn) is nn.BatchNorm2d
        and bn.training
        and bn.track_running_stats
        and bn.weight is not None
        and bn.bias is not None
        and (mean := bn.running_mean) is not None
        and bn.num_batches_tracked is not None
        and bn.weight.dtype is torch.float32
        and mean.dtype is torch.float32
        and not has_hooks(bn)
        and not by_torch()
    )


def are_pair(a: nn.Conv2d, b: nn.Conv2d) -> bool:
    """Whether they are 1xn and nx1 in either order, n odd, stride 1, padded SAME, as they stand."""
    kernel = tuple(a.kernel_size)
    if 1 not in kernel or kernel != tuple(b.kernel_size)[::-1] or max(kernel) % 2 == 0:
        return False
    return all(conv.stride == (1, 1) and conv.padding == tuple(k // 2 for k in conv.kernel_size) for conv in (a, b))
