"""What a module was optimised for, and the check of every call against it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from .capture import batch_of

POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)
Key = tuple[tuple[tuple[int, ...], torch.dtype, torch.device, torch.layout], ...]


def arguments_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor is the one argument, a tuple or list all positional ones, a dict all by keyword."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


class Misfit(ValueError):
    """Inputs of other sizes, types or devices than the example leaves free."""


class Signature:
    """The structure of the example's arguments. Batches are free together; height and width of maps are free.

    Maps of `image_channels` channels may come as uint8 images too; 0 for none. `normalised`: those that the example
    has as uint8 are normalised ahead of the module, which takes floats.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], image_channels: int) -> None:
        self._python = inspect.signature(module.forward)
        self._places = [p for p in self._python.parameters.values() if p.kind in POSITIONAL]
        self.example, self.spec = pytree.tree_flatten(self._canonical(args, kwargs))
        check_real(self.example)
        self.batch = batch_of(self.example)
        self.image_channels, self.normalised = image_channels, False
        self.one_tensor = isinstance(self.example[0], Tensor) and self.spec == pytree.tree_structure(((0,), {}))
        self.check(self.example)

    def _canonical(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One spelling of a call: what may be positional is, and defaults behind the last argument are left out."""
        bound = self._bound(args, kwargs)
        parameters = self._python.parameters
        for name, value in reversed(list(bound.arguments.items())):
            if value is parameters[name].default and isinstance(value, (NoneType, bool)):
                del bound.arguments[name]
            elif parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                break
        last = max((i for i, p in enumerate(self._places) if p.name in bound.arguments), default=0)
        for parameter in self._places[:last]:
            bound.arguments.setdefault(parameter.name, parameter.default)
        return bound.args, dict(sorted(bound.kwargs.items()))

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """Raises TypeError for what is no call of the module: a shape in place of a tensor, a name that it has not."""
        try:
            return self._python.bind(*args, **kwargs)
        except TypeError as error:
            named = [f"{name}={type(value).__name__}" for name, value in kwargs.items()]
            seen = ", ".join([*(type(value).__name__ for value in args), *named])
            allowed = self._python.replace(return_annotation=inspect.Signature.empty)
            raise TypeError(f"arguments ({seen}): {error}; allowed: {allowed}, as forward takes them") from None

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The call's flattened arguments, unchecked. Raises TypeError or ValueError for another structure."""
        if self.one_tensor and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return [args[0]]
        call = self._canonical(args, kwargs)
        leaves, spec = pytree.tree_flatten(call)
        if spec == self.spec:
            return leaves
        with contextlib.suppress(ValueError):
            leaves = self.spec.flatten_up_to(call)  # dictionaries in another order
            if pytree.tree_structure(self.spec.unflatten(leaves)) == self.spec:
                return leaves
        raise ValueError(f"arguments of structure {spec}; allowed: the example's, {self.spec}")

    def check(self, leaves: Sequence[Any]) -> None:
        """Raises Misfit naming what was seen and what is allowed."""
        batch = None
        for i, (leaf, example) in enumerate(zip(leaves, self.example, strict=True)):
            where = f"input {i}" if len(self.example) > 1 else "input"
            if not isinstance(example, Tensor):
                continue
            self._check_tensor(where, leaf, example)
            if self._batched(example):
                if batch not in (None, leaf.shape[0]):
                    raise Misfit(f"{where}: batch of {leaf.shape[0]}; allowed: {batch}, as the inputs before it")
                batch = leaf.shape[0]

    def _batched(self, example: Tensor) -> bool:
        return example.dim() > 0 and example.shape[0] == self.batch

    def _check_tensor(self, where: str, leaf: Any, example: Tensor) -> None:
        if not isinstance(leaf, Tensor):
            raise Misfit(f"{where}: {type(leaf).__name__}; allowed: a torch.Tensor")
        if leaf.device != example.device or leaf.layout != torch.strided:
            raise Misfit(f"{where}: {leaf.layout} on {leaf.device}; allowed: torch.strided on {example.device}")
        dtypes = self._dtypes(example)
        if leaf.dtype not in dtypes:
            raise Misfit(f"{where}: dtype {leaf.dtype}; allowed: {' or '.join(map(str, dtypes))}")
        free = [self._free(example, d) for d in range(example.dim())]
        fits = leaf.dim() == example.dim() and all(
            f or s == e for f, s, e in zip(free, leaf.shape, example.shape, strict=True)
        )
        if not fits or 0 in leaf.shape:
            names = ["n" if d == 0 else "hw"[d - 2] if f else str(example.shape[d]) for d, f in enumerate(free)]
            names = [str(example.shape[0]) if d == 0 and not free[0] else name for d, name in enumerate(names)]
            note = " with each size at least 1" if any(free) else ""
            raise Misfit(f"{where}: shape {tuple(leaf.shape)}; allowed: ({', '.join(names)}){note}")

    def check_values(self, leaves: Sequence[Any]) -> None:
        """What shapes do not tell: ValueError for other numbers than the example's, RuntimeError for gradients."""
        for i, (leaf, example) in enumerate(zip(leaves, self.example, strict=True)):
            if isinstance(example, Tensor) and isinstance(leaf, Tensor):
                if leaf.requires_grad and torch.is_grad_enabled():
                    raise RuntimeError(
                        f"input {i} requires gradients; optimised modules only infer: call them under torch.no_grad()"
                    )
            elif type(leaf) is not type(example) or leaf != example:
                allowed = "a torch.Tensor" if isinstance(example, Tensor) else f"{example!r}, as in the example"
                raise ValueError(f"input {i}: {leaf!r}; allowed: {allowed}")

    def _dtypes(self, example: Tensor) -> tuple[torch.dtype, ...]:
        taken = self.taken(example)
        return (taken, torch.uint8) if taken.is_floating_point and self._may_be_image(example) else (taken,)

    def taken(self, example: Tensor) -> torch.dtype:
        """The dtype in which the module itself takes that tensor of the example."""
        image = self.normalised and example.dtype is torch.uint8 and self._may_be_image(example)
        return torch.float32 if image else example.dtype

    def has_bytes(self) -> bool:
        """Whether the example has uint8 images of as many channels as the module's configuration."""
        tensors = (x for x in self.example if isinstance(x, Tensor))
        return any(x.dtype is torch.uint8 and self._may_be_image(x) for x in tensors)

    def _may_be_image(self, example: Tensor) -> bool:
        return example.dim() == 4 and example.shape[1] == self.image_channels

    def _free(self, example: Tensor, dim: int) -> bool:
        return self._batched(example) if dim == 0 else example.dim() == 4 and dim > 1

    def batch_of(self, leaves: Sequence[Any]) -> int:
        return next(
            x.shape[0] for x, e in zip(leaves, self.example, strict=True) if isinstance(e, Tensor) and self._batched(e)
        )

    def resized(self, batch: int) -> list[Any]:
        """Leaves of the example's shapes, with another batch, unwritten; only their shapes and dtypes count."""
        return [
            x.new_empty(batch, *x.shape[1:]) if isinstance(x, Tensor) and self._batched(x) else x for x in self.example
        ]

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return args, kwargs


def check_real(leaves: Sequence[Any]) -> None:
    """Raises RuntimeError where native code would miss what tracers, vmap and forward-mode gradients do to tensors."""
    for i, leaf in enumerate(leaf for leaf in leaves if isinstance(leaf, Tensor)):
        if type(leaf) is not Tensor:
            _check_values_exist(leaf)
        if is_functorch_wrapped_tensor(leaf):
            raise RuntimeError(f"input {i} inside of vmap or a transform of functions; allowed: plain tensors")
        if leaf.is_nested or leaf.is_quantized:
            kind = "nested" if leaf.is_nested else "quantized"
            raise ValueError(f"input {i}: a {kind} tensor; allowed: torch.strided")
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(leaf).tangent is not None:
            raise RuntimeError(f"input {i} has a tangent; optimised modules only infer: take the original module")
        if type(leaf) is not Tensor and _is_hollow(leaf):
            raise ValueError(f"input {i}: a {type(leaf).__name__}, whose values lie elsewhere; allowed: plain tensors")
    if torch._C._len_torch_dispatch_stack():
        _check_modes()


def _is_hollow(leaf: Tensor) -> bool:
    """Whether the tensor wraps others and has no memory of its own."""
    return leaf.layout == torch.strided and leaf.is_cpu and leaf.numel() > 0 and not leaf.data_ptr()


def _check_modes() -> None:
    """Raises RuntimeError inside of modes under which native code would find no memory to write to."""
    if get_proxy_mode() is not None:
        raise RuntimeError("optimised modules hold native code, which make_fx cannot trace; trace the original module")
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise RuntimeError(
            "optimised modules hold native code, for which FakeTensorMode makes no memory; call it outside"
        )


def _check_values_exist(leaf: Tensor) -> None:
    """Raises RuntimeError for the stand-ins that tracers pass, which have a shape and no values."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if isinstance(leaf, (FakeTensor, FunctionalTensor)):
        raise RuntimeError(
            f"{type(leaf).__name__} as input; optimised modules hold native code and cannot be exported: export the "
            "original module"
        )


def key_of(leaves: Sequence[Any]) -> Key:
    """What a program depends on: the tensors' shapes and dtypes, and what else must be as in the example."""
    return tuple((tuple(x.shape), x.dtype, x.device, x.layout) for x in leaves if isinstance(x, Tensor))
