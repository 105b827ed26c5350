"""Several processes as one: `torchrun` starts them, this module lets N of them compute what one would on the whole
batch.
"""

from __future__ import annotations

import inspect
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .torchrun import let_the_first_speak, place

DEVICES = ("cpu", "cuda")
TASKS = Path("/proc/self/task")  # this process's threads, on Linux


@dataclass(frozen=True)
class World:
    """This process among `size`; the leader (rank 0) alone writes and speaks."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Any = None  # torchrun's, which outlives the processes that it starts again

    @property
    def leader(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes; leaves `values` alone."""
        if self.size == 1:
            return values
        return _summed(values) / self.size

    def agree(self, value: int) -> int:
        """The leader's value, on every process."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(shared, 0)
        return int(_let_go(shared).item())

    def any(self, value: bool) -> bool:
        """Whether it is so on one process or more; every process must call this."""
        if self.size == 1:
            return value
        return bool(_summed(torch.tensor([int(value)], device=self.device)).item())

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The others enter when the leader has left: what it found out, they read from its files.

        Raises ValueError on the others where the leader failed: what it raises itself says why.
        """
        if not self.leader and not self.agree(0):
            raise ValueError("the first process could not begin, and says why")
        try:
            yield
        except BaseException:
            if self.leader:
                self.agree(0)
            raise
        if self.leader:
            self.agree(1)

    def begin(self, name: str) -> None:
        """Notes, for processes that torchrun may have to start again, that the run `name` is this job's."""
        if self.leader and self.store is not None:
            self.store.set(f"begun {name}", "yes")

    def begun(self, name: str) -> bool:
        """Whether torchrun started this process again and the one before had begun the run `name`.

        One that had refused to begin, as its folder held another run, would otherwise go on with that one.
        """
        return _starts() > 0 and self.store is not None and bool(self.store.check([f"begun {name}"]))


@contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """The world that torchrun's environment describes; one process without it. device: "cpu", "cuda", None for the
    best there is.
    """
    if device is not None and device not in DEVICES:
        raise ValueError(f"device {device!r}; allowed: {', '.join(DEVICES)}")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda'; allowed here: cpu, torch sees no GPU")
    _, size = place()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    where = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if size == 1:
        yield World(device=where)
        return
    store, rank, size = next(dist.rendezvous("env://"))
    kept = store
    while isinstance(kept, dist.PrefixStore):  # torch gives each start a prefix of its own
        kept = kept.underlying_store
    # torchrun keeps its store when it starts the workers again; the addresses of the dead ones must not be found there.
    store = dist.PrefixStore(f"start {_starts()} of {size}", store)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield World(dist.get_rank(), size, where, kept)
    except Exception as error:
        let_the_first_speak()  # before the group falls apart, of which the others would speak
        if _is_lost(error):
            reason = re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0]
            raise ConnectionError(
                f"another process of this run is gone ({reason}); it or torchrun says why, and a resumed run goes on"
            ) from error
        raise
    finally:
        _rest()
        dist.destroy_process_group()


def _summed(values: Tensor) -> Tensor:
    """The sum over the processes; leaves `values` alone."""
    total = values.clone()
    dist.all_reduce(total)
    return _let_go(total)


def _let_go(tensor: Tensor) -> Tensor:
    """`tensor`, once nothing but its Python object holds it; after a second all the same.

    A thread of gloo's does so until shortly after the result is there. Where it is the last to hold one, it takes the
    interpreter's lock to free it, and aborts a process that is at its end by then (until Python 3.14).
    """
    holders, late = tensor._use_count, time.monotonic() + 1  # type: ignore[attr-defined]
    while tensor.device.type == "cpu" and holders() > 1 and time.monotonic() < late:
        time.sleep(1e-5)
    return tensor


def _rest(patience: float = 2.0) -> None:
    """Waits until gloo's threads have nothing left to do, or for so many seconds.

    What `_let_go` waits for they may do with tensors that are FSDP's, whom nobody here can ask. They do it while the
    interpreter's lock is free, so they have to be seen asleep behind several such moments.
    """
    asleep, late = 0, time.monotonic() + patience
    while asleep < 3 and time.monotonic() < late:
        time.sleep(0.005)
        asleep = 0 if _gloo_works() else asleep + 1


def _gloo_works() -> bool:
    """Whether any of gloo's threads runs or is about to; never where the system does not tell."""
    for file in TASKS.glob("*/stat"):
        try:
            name, state = file.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:  # ended meanwhile
            continue
        if name.startswith("pt_gloo") and not state.split()[0] == "S":
            return True
    return False


def _is_lost(error: Exception) -> bool:
    """Whether it came from a word to another process: gloo's own errors are of no type of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _starts() -> int:
    """How often torchrun has started the workers again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class _Sum(torch.autograd.Function):
    """The sum over all processes, for the gradient too: each process's loss depends on every process's summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _summed(grad)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of the whole batch over all processes, equal shares each, on any device.

    `torch.nn.SyncBatchNorm` does this on GPUs only. Names in the state dict are those of `nn.BatchNorm2d`; maps of a
    narrower format are computed in float32, as there.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _Sum.apply(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        scale = torch.rsqrt(variance + self.eps)
        if not self.affine:
            return (centred * scale[:, None, None]).to(x.dtype)
        return (centred * (scale * self.weight)[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def share_statistics(model: nn.Module) -> None:
    """Turns every plain `nn.BatchNorm2d` of `model` into a `GlobalBatchNorm2d` with the same tensors and settings."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d


class SharedDropout(TorchFunctionMode):
    """Draws dropout masks for the whole batch and takes this process's rows, so that N processes drop what one
    would.
    """

    def __init__(self, seed: int, world: World) -> None:
        super().__init__()
        self.world = world
        self.generator = torch.Generator(world.device).manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.dropout:
            return func(*args, **(kwargs or {}))
        return self._dropout(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        rows = input.shape[0]
        shape = (rows * self.world.size, *input.shape[1:])
        drawn = torch.rand(shape, generator=self.generator, device=input.device)
        mask = drawn[self.world.rank * rows : (self.world.rank + 1) * rows] >= p
        return input * (mask.to(input.dtype) / (1 - p or 1))  # of p = 1 the mask is all zeros


def wrap(model: nn.Module, world: World, batch_norm: str) -> nn.Module:
    """The module to call in training: gradients averaged over the processes; `batch_norm` as in `Settings`."""
    if batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    if world.size == 1:
        return model
    if batch_norm == "sync":
        share_statistics(model)
    places = [world.device] if world.device.type == "cuda" else None
    parallel = nn.parallel.DistributedDataParallel
    # torch 2.13 calls it otherwise, and warns of the name before.
    names = inspect.signature(parallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return parallel(model, device_ids=places, **{buffers: batch_norm == "local"})  # type: ignore[arg-type]
