"""The public entry: `optimize` and the module it returns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import dispatch
from .._numbers import is_integer, plain
from ..kernels.plan import Plan
from .inputs import arguments_of
from .report import Report, make_report
from .segment import NativeItem
from .session import Session

BACKENDS = ("cpu", "cuda", "triton", "torch", "reference")
ON_GPU = ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (*DTYPES, torch.float16)


class OptimizedModule(nn.Module):
    """A module's inference, one fused plan for each input size; made by `optimize`. Threads may call it at once.

    Its state dict has the original module's entries, its parameters are none: what holds it is saved whole and trains
    the rest.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        super().train(False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses a part in the place of one of the original's: the plans would go on without it."""
        session = self.__dict__.get("_session")
        if session is not None and isinstance(value, (nn.Module, Tensor)) and hasattr(session.module, name):
            raise AttributeError(
                f"{name} of {session.name} is in the plan; set it in the original module and optimise that again"
            )
        super().__setattr__(name, value)

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for these arguments, in fresh tensors; maps that kernels make are channels_last."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError("optimised modules hold native code and cannot be traced; trace the original module")
        return self._session(args, kwargs)

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """What became of every captured node, for the example's sizes or those of the given arguments."""
        if args or kwargs:
            leaves = self._session.signature.leaves(args, kwargs)
        else:
            leaves = self._session.signature.example
        executable, captured = self._session.executable(leaves)
        return make_report(self._session.name, self._session.backend, executable, captured, leaves)

    def time_steps(self, *args: Any, **kwargs: Any) -> list[tuple[str, float]]:
        """Runs once and returns (step name, seconds) of every native step, in order."""
        seconds: list[tuple[str, float]] = []
        self._session(args, kwargs, seconds)
        return seconds

    def native_plans(self) -> list[Plan]:
        """The plans of the native calls for the example's sizes, in order; none on the backends that run by torch.

        A large batch is run a few images at a time: by one plan with `images`, or by one of fewer images many times.
        """
        executable, _ = self._session.executable(self._session.signature.example)
        plans: list[Plan] | None = getattr(executable, "plans", None)
        if plans is not None:
            return list(plans)
        program = getattr(executable, "program", None)
        return [] if program is None else [item.plan for item in program.items if isinstance(item, NativeItem)]

    @property
    def backend(self) -> str:
        return self._session.backend

    @property
    def batch_sizes(self) -> list[int]:
        """The batches planned so far, of all input sizes."""
        return sorted({key[0][0][0] for key in self._session.programs() if key and key[0][0]})

    def extra_repr(self) -> str:
        return f"{self._session.name}, backend={self.backend!r}, batch_sizes={self.batch_sizes}"

    def __copy__(self) -> OptimizedModule:
        return self._twin(self.__getstate__())

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        return self._twin(copy.deepcopy(self.__getstate__(), memo))

    def _twin(self, state: dict[str, Any]) -> OptimizedModule:
        """With hooks and all else that was set on this one."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(state)
        return twin

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "optimised modules hold native code and cannot be pickled; pickle the original and optimise it again"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError("optimised modules hold native code and cannot be scripted; trace the original module")

    def train(self, mode: bool = True) -> OptimizedModule:
        """Stays in eval mode, with a warning where another one is asked for: a module that holds this one may train."""
        if mode:
            warnings.warn(
                "optimised modules only infer, and this one stays in eval mode; train the original module and optimise "
                "it again",
                stacklevel=2,
            )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._session.original().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes no values in, so that others than the held ones are errors."""
        held = self._session.original().state_dict(prefix=prefix)
        given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if strict:
            missing_keys += [key for key in held if key not in given]
            unexpected_keys += [key for key in given if key not in held]
        changed = [key for key, value in given.items() if key in held and not _equal(value, held[key])]
        if changed:
            error_msgs.append(
                f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''} not as optimised; load into the "
                "original module and optimise it again"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedModule:
        probe = fn(torch.empty(1, dtype=torch.float32, device="cpu"))
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            raise RuntimeError(
                f"optimised modules stay at torch.float32 on cpu, asked for {probe.dtype} on {probe.device}; "
                "move the original module and optimise it again"
            )
        return self


def _equal(value: Any, held: Any) -> bool:
    if not (isinstance(value, Tensor) and isinstance(held, Tensor)):
        return not isinstance(held, Tensor)
    return value.shape == held.shape and torch.equal(value.to(held), held)


def optimize(
    module: nn.Module,
    example_inputs: Any,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    batch_sizes: Sequence[int] | None = None,
    winograd: bool = False,
    batch_invariant: bool = False,
) -> OptimizedModule:
    """A module that computes what `module` computes in eval mode, as one fused plan; `module` itself stays as it is.

    Args:
        module: any module that torch.export can capture, with float32 parameters on the CPU.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Of a module with a
            `data_config`, images may be uint8, as in later calls.
        dtype: what weights and activations are kept in, torch.float32 (None too) or torch.bfloat16. Sums, BN and the
            module's outputs are float32 either way, so the outputs' dtype is the module's.
        backend: None: the best for the device of the example. "cpu": the native kernels. "triton": one CUDA graph of
            Triton kernels, for inputs on a GPU; float16 too. "cuda": the same, but what the Hopper kernels can run by
            these, in bfloat16 or float16; None gives them what was measured to be faster there. "torch", "reference"
            (float64 inside): the graph by torch.
        batch_sizes: batches to plan now, None for the example's; others are planned when they come.
        winograd: on "cpu" alone: lets convolutions at stride 1 take Winograd's algorithm where it is faster: fewer
            products, all in float32, of weights that are not rounded. An expected 1.3 to 25 times the rounding error of
            a layer's direct sum in float32; in bfloat16 less than one of it. report() says which took it.
        batch_invariant: an image has the same bits alone and in any batch. The kernels of "cpu" keep that anyway;
            "triton" and "cuda" give up speed for it, as every batch runs the kernels of one batch and no sum is cut
            into parts. Where torch runs a node that may not keep it, on either, a RuntimeWarning names it.

    Raises TypeError or ValueError for what cannot be served, RuntimeError where the backend cannot run here.

    Example:
        fast_model = optimize(model, torch.randn(1, 3, 299, 299), batch_sizes=[1, 8])
    """
    _check_module(module)
    device = _device_of(example_inputs)
    name, named = _checked_backend(backend, device)
    allowed = {"triton": GPU_DTYPES, "cuda": GPU_DTYPES[1:]}.get(name, DTYPES)
    held = torch.float32 if dtype is None else dtype
    if held not in allowed:
        raise ValueError(f"dtype {held!r}; backend {name!r} runs {', '.join(map(str, allowed))}")
    winograd, invariant = check_winograd(winograd, name), _checked_invariance(batch_invariant, name)
    if name in ON_GPU:
        from .gpu_session import module_on_cpu

        module = module_on_cpu(module)
    _check_parameters(module)
    sizes = _checked_batch_sizes(batch_sizes)
    kind = str(held).removeprefix("torch.")
    session = Session(module, *arguments_of(example_inputs), name, kind, winograd, named=named, invariant=invariant)
    for batch in [session.signature.batch] if sizes is None else sizes:
        session.plan(session.signature.resized(batch))
    return OptimizedModule(session)


def _check_module(module: object) -> None:
    """Raises TypeError or ValueError for what is no module that can be captured."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module of type {type(module).__name__}; allowed: torch.nn.Module")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"TorchScript module of type {type(module).__name__}; allowed: the module that it was made from"
        )
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise TypeError("a DistributedDataParallel, which shares out gradients; allowed: its .module")
    if isinstance(module, OptimizedModule):
        raise ValueError("module is optimised already; allowed: the original module")


def check_winograd(winograd: bool, backend: str) -> bool:
    """Whether Winograd's algorithm is asked for. Raises where it is and there is none."""
    winograd = plain(winograd)
    if not isinstance(winograd, bool):
        raise TypeError(f"winograd of type {type(winograd).__name__}; allowed: bool")
    if winograd and backend != "cpu":
        raise ValueError(f"winograd=True on backend {backend!r}; allowed: 'cpu'")
    return winograd


def _checked_invariance(batch_invariant: bool, backend: str) -> bool:
    batch_invariant = plain(batch_invariant)
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant of type {type(batch_invariant).__name__}; allowed: bool")
    if batch_invariant and backend not in ("cpu", *ON_GPU):
        raise ValueError(f"batch_invariant=True on backend {backend!r}; allowed: cpu, {', '.join(ON_GPU)}")
    return batch_invariant


def _device_of(example_inputs: Any) -> torch.device:
    """That of the example's first tensor; the CPU where there is none."""
    tensors = (leaf for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, Tensor))
    return next((x.device for x in tensors), torch.device("cpu"))


def _checked_backend(backend: str | None, device: torch.device) -> tuple[str, bool]:
    """The named backend, or the best of the device's that runs whole plans, and whether it was named."""
    dispatch.check_name(backend)
    able = [name for name in dispatch.ORDER.get(device.type, ()) if name in BACKENDS and name != "cuda"]
    best = next((name for name in able if dispatch.backend_status()[name]), "cpu")
    asked = backend or dispatch.current_backend()
    name = asked or best
    status = dispatch.backend_status()[name]
    if not status:
        raise RuntimeError(f"backend {name!r} cannot run here: {status.reason}")  # type: ignore[union-attr]
    if name not in BACKENDS:
        raise RuntimeError(f"backend {name!r} runs no plans yet; allowed: {', '.join(BACKENDS)}")
    if name in ON_GPU and device.type != "cuda":
        raise ValueError(f"example inputs on {device}; backend {name!r} runs cuda tensors")
    return name, asked is not None


def _check_parameters(module: nn.Module) -> None:
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise ValueError(f"{name} is not initialised; allowed: modules that ran once")
        wrong_type = value.is_floating_point() and value.dtype != torch.float32
        if wrong_type or value.is_complex() or value.device.type != "cpu":
            raise ValueError(
                f"{name} is {value.dtype} on {value.device}; allowed: torch.float32 on cpu, dtype= says what it runs in"
            )


def _checked_batch_sizes(batch_sizes: Sequence[int] | None) -> list[int] | None:
    if batch_sizes is None:
        return None
    if not isinstance(batch_sizes, Sequence):
        raise TypeError(f"batch_sizes {batch_sizes!r}; allowed: None, or a sequence of integers of at least 1")
    sizes = [plain(b) for b in batch_sizes]
    if not sizes or not all(is_integer(b) and b >= 1 for b in sizes):
        raise ValueError(f"batch_sizes {sizes}; allowed: integers of at least 1, one or more")
    return sizes
