"""Everything an optimised module keeps: the captured graphs, the compiled programs, and when to make new ones."""

from __future__ import annotations

import contextlib
import copy
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils import _pytree as pytree

from ..kernels import cpu
from ..kernels.plan import Plan
from ..kernels.spec import PairSpec
from . import graph as ir
from .capture import CaptureError, capture, snapshot
from .inputs import Key, Signature, check_real, key_of
from .normalisation import image_affine, take_bytes
from .passes import optimise
from .plan import Program, lower
from .program import (
    DTYPES,
    ArenaPool,
    Compiled,
    Copies,
    Interpreted,
    Planned,
    same_weights,
)
from .slices import Sliced, images_at_a_time, in_slices, plan_in_slices

if TYPE_CHECKING:
    from .gpu_session import GpuSession

Runnable = Interpreted | Planned
KEPT_PROGRAMS = 16  # of those planned on demand; sizes asked for at the start stay
AUTOCASTING = ("cpu", "cuda")
KEPT_CAPTURES = 32  # a few megabytes each; those of kept programs stay


class Captured:
    """One capture: as it came, and rewritten, with how often each pass fired. `tree` is the structure of the result."""

    def __init__(self, raw: ir.Graph, tree: pytree.TreeSpec) -> None:
        self.raw, self.tree = raw, tree
        self.graph, self.fired = optimise(raw)


class Session:
    """Thread-safe. `module` is only read; its parameters are shared, never written.

    What is packed for a size that comes later is read from them then, so that no copy is kept. It has to be what it was
    at first: writes that torch counts are noticed at once, others (through `.data`, NumPy, or of inference tensors) by
    checksums, before parameters are read again.
    """

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], backend: str, dtype: str,
        winograd: bool = False, *, named: bool = True, invariant: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.backend, self.dtype, self.named = type(module).__name__, backend, dtype, named
        self.invariant, self._warned = invariant, False
        self._tiles = cpu.winograd_tile if winograd else None
        self._mixed = torch._C._is_any_autocast_enabled()
        self._gpu: GpuSession | None = None
        self.module = snapshot(module)
        self.affine = image_affine(module)
        self.signature = Signature(self.module, args, kwargs, len(self.affine[0]) if self.affine else 0)
        self._state = [(t, version(t), checksum(t)) for t in (*self.module.parameters(), *self.module.buffers())]
        self._lock = threading.RLock()
        self._pool, self._copies = ArenaPool(), Copies()
        self._captured: OrderedDict[Any, Captured] = OrderedDict()
        self._fixed: dict[Key, tuple[Runnable, Captured]] = {}
        self._recent: OrderedDict[Key, tuple[Runnable, Captured]] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """A session of its own that shares what never changes: parameters, graphs and compiled programs."""
        twin = copy.copy(self)
        with self._lock:
            twin._lock = threading.RLock()
            twin._captured, twin._fixed = OrderedDict(self._captured), dict(self._fixed)
            twin._recent = OrderedDict(self._recent)
        return twin

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], seconds: list[tuple[str, float]] | None = None
    ) -> Any:
        if not torch._C._is_any_autocast_enabled() and peek_interpreter_stack() is None:
            return self._call(args, kwargs, seconds)
        with apart():
            return self._call(args, kwargs, seconds)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], seconds: list[tuple[str, float]] | None) -> Any:
        leaves = self.signature.leaves(args, kwargs)
        executable, captured = self.executable(leaves)
        if isinstance(executable, Interpreted):
            self._check_unchanged()
        results = executable.run(leaves, seconds)
        return results[0] if captured.tree.is_leaf() else pytree.tree_unflatten(results, captured.tree)

    def plan(self, leaves: Sequence[Any]) -> Key:
        """Makes the program for these inputs and keeps it for good."""
        key = key_of(leaves)
        with self._lock:
            if key not in self._fixed:
                self._fixed[key] = self._make(leaves)
        return key

    def executable(self, leaves: Sequence[Any]) -> tuple[Runnable, Captured]:
        """The program for these inputs, made now where there is none. Raises ValueError where they do not fit."""
        check_real(leaves)
        key = key_of(leaves)
        found = self._fixed.get(key) or self._recent.get(key)
        if found is None:
            self.signature.check(leaves)
        self.signature.check_values(leaves)
        if key in self._fixed:
            return self._fixed[key]
        with self._lock:
            if key not in self._recent:
                self._recent[key] = self._make(leaves)
                while len(self._recent) > KEPT_PROGRAMS:
                    self._recent.popitem(last=False)
                self._forget_captures()
            self._recent.move_to_end(key)
            return self._recent[key]

    def _forget_captures(self) -> None:
        """Drops the captures that were asked for longest ago, but for those of kept programs."""
        used = {id(captured) for _, captured in (*self._fixed.values(), *self._recent.values())}
        idle = [key for key, captured in self._captured.items() if id(captured) not in used]
        for key in idle[: max(0, len(self._captured) - KEPT_CAPTURES)]:
            del self._captured[key]

    def programs(self) -> dict[Key, tuple[Runnable, Captured]]:
        with self._lock:
            return {**self._fixed, **self._recent}

    def _make(self, leaves: Sequence[Any]) -> tuple[Runnable, Captured]:
        with apart():
            return self._made(leaves)

    def _made(self, leaves: Sequence[Any]) -> tuple[Runnable, Captured]:
        if self.backend in ("cuda", "triton"):
            return self._make_on_gpu(leaves)
        captured = self._capture(leaves)
        if self.backend == "cpu":
            return self._compile(captured, leaves), captured
        return Interpreted(
            captured.graph, torch.float64 if self.backend == "reference" else DTYPES[self.dtype]
        ), captured

    def _compile(self, captured: Captured, leaves: Sequence[Any]) -> Runnable:
        program = self._lower(captured.graph, leaves)
        if self.invariant:
            self._warn_of_loose(program)
        return self._compiled(captured, leaves, program)

    def _warn_of_loose(self, program: Program) -> None:
        """Once, where torch runs what may have other bits in another batch."""
        from .gpu_invariant import loose, warn_of

        if not self._warned and (names := loose(program)):
            self._warned = True
            warn_of(names)

    def _compiled(
        self, captured: Captured, leaves: Sequence[Any], program: Program, like: Compiled | None = None
    ) -> Compiled | Sliced:
        """The program, or as many images of it as come together at its end, and what is left of the batch alike."""
        plan = plan_in_slices(program) if captured.raw.dynamic else None
        if plan is None:
            return self._packed(program, None, like)
        images, batch = images_at_a_time(plan), self.signature.batch_of(leaves)
        together = images[-1]
        if together == batch:
            return self._packed(program, in_slices(plan, images, _fuses), like)
        some, left, rest = self._first(leaves, together), self._first(leaves, batch % together), None
        main = self._compiled(captured, some, self._lower(captured.graph, some), like)
        assert isinstance(main, Compiled)
        if batch % together:
            rest = self._compiled(captured, left, self._lower(captured.graph, left), main)
        return Sliced(program, main, rest, batch, together)

    def _first(self, leaves: Sequence[Any], count: int) -> list[Any]:
        batch = self.signature.batch_of(leaves)
        batched = [isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == batch for x in leaves]
        return [x[:count] if is_batched else x for x, is_batched in zip(leaves, batched, strict=True)]

    def _make_on_gpu(self, leaves: Sequence[Any]) -> tuple[Runnable, Captured]:
        from .gpu_session import GpuSession, on_cpu

        if self._gpu is None:
            device = next(x.device for x in leaves if isinstance(x, Tensor))
            self._gpu = GpuSession(device, self.dtype, self.backend, self.named, self.invariant)
        shapes = on_cpu(leaves)
        captured = self._capture(shapes)
        return self._gpu.compiled(captured.graph, shapes), captured

    def _packed(self, program: Program, sliced: Plan | None, other: Compiled | None) -> Compiled:
        like = self._like(program, other)
        if like is None:
            self._check_contents()
            cpu.trim()  # megabytes of a capture, before those of weights
        return Compiled(program, self._pool, like, sliced, self._copies)

    def _like(self, program: Program, other: Compiled | None) -> Compiled | None:
        """A program whose packed weights this one can share: `other`, or one of those made before."""
        runnables = (other, *(e.main if isinstance(e, Sliced) else e for e, _ in self.programs().values()))
        made = (e for e in runnables if isinstance(e, Compiled))
        return next((m for m in made if same_weights(m.program, program)), None)

    def _lower(self, graph: ir.Graph, leaves: Sequence[Any]) -> Program:
        try:
            return lower(graph, leaves, cpu.reasons, self.dtype, _fuses, self._tiles)
        except RuntimeError as error:
            raise ValueError(f"{self.name} cannot run inputs of {_sizes(leaves)}: {error}") from error

    def _capture(self, leaves: Sequence[Any]) -> Captured:
        """The graph for these inputs. A batch of one is captured apart: torch.export takes it for a constant.

        Where both captures came out the same, the first serves all batches, so that they share their parameters.
        """
        self._check_unchanged()
        sizes = [(tuple(x.shape[1:]), x.dtype) for x in leaves if isinstance(x, Tensor)]
        batch = self.signature.batch_of(leaves)
        key = (batch == 1, *sizes)
        for known in (key, (batch, *sizes)):
            if known in self._captured and self._captured[known].raw.serves(batch):
                self._captured.move_to_end(known)
                return self._captured[known]
        captured = self._capture_now(leaves, batch, free=batch != 1 and key not in self._captured)
        other = self._captured.get((batch != 1, *sizes))
        guarded = captured.raw.guards or (other is not None and other.raw.guards)
        if other is not None and not guarded and (batch == 1 or captured.raw.dynamic):
            captured = other if ir.same(captured.graph, other.graph) else captured
        alone = batch != 1 and not captured.raw.dynamic and captured is not other
        self._captured[(batch, *sizes) if alone else key] = captured
        return captured

    def _capture_now(self, leaves: Sequence[Any], batch: int, free: bool) -> Captured:
        """The graph for these inputs: of any batch that the module treats alike, or not `free` of this one alone."""
        self._check_contents()
        floats, images = self._as_floats(leaves)
        if images:
            assert self.affine is not None
            plain = self._capture(floats)
            return Captured(take_bytes(plain.raw, self.affine, images), plain.tree)
        try:
            arguments = self.signature.arguments(floats)
            return Captured(*capture(self.module, *arguments, dynamic=free, mixed=self._mixed))
        except CaptureError as error:
            signature = self.signature
            if not self._captured and not signature.normalised and signature.has_bytes():
                signature.normalised = True  # the module does not take the example's bytes itself
                return self._capture_now(leaves, batch, free)
            raise CaptureError(f"inputs of {_sizes(leaves)}: {error}") from error

    def _as_floats(self, leaves: Sequence[Any]) -> tuple[list[Any], set[int]]:
        """The leaves with bytes where the module takes floats as floats, and the positions of these."""
        found, changed = list(leaves), set()
        for i, (leaf, example) in enumerate(zip(leaves, self.signature.example, strict=True)):
            if isinstance(leaf, Tensor) and leaf.dtype != self.signature.taken(example):
                found[i] = leaf.to(self.signature.taken(example))
                changed.add(i)
        return found, changed

    def original(self) -> nn.Module:
        """A twin of the module, for its state. Raises RuntimeError where that is not what programs were made of."""
        self._check_unchanged()
        self._check_contents()
        return self.module

    def _check_unchanged(self) -> None:
        if any(version(t) != then for t, then, _ in self._state):
            raise self._changed()

    def _check_contents(self) -> None:
        """For what is read again: finds the writes that no version tells of. Not when the first program is made."""
        if (self._fixed or self._recent) and any(checksum(t) != then for t, _, then in self._state):
            raise self._changed()

    def _changed(self) -> RuntimeError:
        return RuntimeError(
            f"the parameters of {self.name} changed after it was optimised, and what reads them again, as a program "
            "for another input size does, would mix old and new ones; call optimize again"
        )


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Without autocast, for programs have formats of their own, in what torch runs too; and outside of torch.func's
    transforms, which would wrap what is made here, though nothing that came in is theirs. Entering costs microseconds.
    """
    with contextlib.ExitStack() as stack:
        if peek_interpreter_stack() is not None:
            stack.enter_context(temporarily_clear_interpreter_stack())
        for kind in AUTOCASTING:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def version(tensor: Tensor) -> tuple[int, int]:
    """Changes with every write to the tensor."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def checksum(tensor: Tensor) -> int:
    """Of the bytes, in the order in which they lie: a dense tensor of the CPU is not copied for it."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    whole = tensor.detach().resolve_conj().resolve_neg().cpu()
    return zlib.crc32(whole.permute(order).reshape(-1).contiguous().view(torch.uint8).numpy().data)


def _fuses(pair: PairSpec) -> bool:
    """As plans on as many threads as torch has now are better off; on others they run, too."""
    return cpu.fuses(pair, torch.get_num_threads())


def _sizes(leaves: Sequence[Any]) -> str:
    return ", ".join(str(tuple(x.shape)) for x in leaves if isinstance(x, Tensor))
