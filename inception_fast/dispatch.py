"""Which backend runs an operation, and why not the others.

A backend is a module with three functions: `reasons(spec)` (an empty list means it can run), `prepare(spec, params,
...)` (packs weights, cached) and `run(prepared, x, ...)`. Nothing here is traced: operations choose when they meet real
tensors.

CPU tensors take the first of cpu, torch that can run; CUDA tensors the first of cuda, triton, torch, where "cuda" (the
Hopper kernels) is taken unnamed only for what was measured to be faster there. "torch" is the library path, "reference"
runs only when named. float16 on the CPU, where no backend is named, is chosen for and run as float32, rounded once. A
tensor that has to leave the native kernels for another reason than its dtype (the CPU kernels take float32 and
bfloat16) warns, once per operation and reason; `explain` shows every reason at any time. A named backend never falls
back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import threading
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from .kernels import cuda
from .kernels.spec import ConvSpec, PairSpec, PoolSpec

ORDER = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
DEVICES = {
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "torch": ("cpu", "cuda"),
    "reference": ("cpu", "cuda"),
}
BACKENDS = tuple(DEVICES)
ADAPTERS = {"cpu": "native_cpu", "cuda": "hopper_gpu", "triton": "triton_gpu", "torch": "library", "reference": "truth"}
DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")


@dataclasses.dataclass(frozen=True)
class Available:
    """A backend that can run here; truthy. `detail`: its best instruction set or its version."""

    detail: str

    def __bool__(self) -> Literal[True]:
        return True

    def __repr__(self) -> str:
        return f"Available({json.dumps(self.detail, ensure_ascii=False)})"


@dataclasses.dataclass(frozen=True)
class Unavailable:
    """A backend that cannot run here; falsy. `reason`: why."""

    reason: str

    def __bool__(self) -> Literal[False]:
        return False

    def __repr__(self) -> str:
        return f"Unavailable({json.dumps(self.reason, ensure_ascii=False)})"


@dataclasses.dataclass(frozen=True)
class PoolProjectSpec:
    """Average pool, 1x1 convolution, scale, shift, ReLU. With `conv_first` the pool meets the output channels."""

    pool: PoolSpec
    conv: ConvSpec
    conv_first: bool


Status: TypeAlias = Available | Unavailable
Spec: TypeAlias = ConvSpec | PairSpec | PoolSpec | PoolProjectSpec

_OPERATION = {ConvSpec: "conv", PairSpec: "pair", PoolSpec: "pool", PoolProjectSpec: "pool_project"}
_names: ContextVar[tuple[str | None, ...]] = ContextVar("inception_fast_backends", default=())
_warned: set[tuple[type, str]] = set()
_warned_lock = threading.Lock()


def backend_status() -> dict[str, Status]:
    """Every backend by name: Available(detail) or Unavailable(reason). Probed once; no CUDA call, no Triton import.

    A GPU on which the CUDA kernels once gave wrong numbers makes "cuda" unavailable from then on. Raises ValueError
    when INCEPTION_FAST_ISA names a tier that this machine cannot run.
    """
    found, wrong = dict(_probe()), cuda.distrusted()
    return found | {"cuda": Unavailable(wrong)} if found["cuda"] and wrong else found


def runs_on_cpu() -> bool:
    """Whether the native CPU kernels can run: `backend_status` of "cpu" alone, for who asks in every call."""
    return bool(_probe()["cpu"])


@functools.cache
def _probe() -> dict[str, Status]:
    return {
        "cpu": _probe_cpu(),
        "cuda": _probe_gpu("cuda"),
        "triton": _probe_gpu("triton"),
        "torch": Available(str(torch.__version__)),
        "reference": Available("float64, only by name"),
    }


def _probe_cpu() -> Status:
    try:
        cpu = importlib.import_module(".kernels.cpu", __package__)
    except ImportError as error:
        return Unavailable(str(error))
    return Available(cpu.default_tier())


def _probe_gpu(name: str) -> Status:
    """Reads files and module specs only: cuInit would break a later fork, and importing Triton takes seconds."""
    if not any(Path(file).exists() for file in DRIVER_FILES):
        return Unavailable("no NVIDIA driver")
    if torch.version.cuda is None:
        return Unavailable(f"torch {torch.__version__} is built without CUDA")
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return Unavailable("triton is not installed; `pip install inception-fast[triton]`")
        return Available(f"triton {importlib.metadata.version('triton')}")
    why = cuda.missing() or cuda.driver.refusal(cuda.driver.capabilities())
    return Unavailable(why) if why else Available("sm_90a")


def check_name(name: str | None) -> None:
    """Raises ValueError for a backend name that does not exist."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; allowed: {', '.join(BACKENDS)}")


def use_backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Inside the `with`, in this thread or task, operations run on the backend `name` or raise; None: as if outside.

    Example:
        with use_backend("torch"):
            y = model(x)
    """
    check_name(name)
    return _Use(name)


class _Use(contextlib.ContextDecorator, contextlib.AbstractContextManager[None]):
    """May be entered again, also inside of itself, and by threads at once, as torch's own contexts may."""

    def __init__(self, name: str | None) -> None:
        self._name = name

    def __enter__(self) -> None:
        _names.set((*_names.get(), self._name))

    def __exit__(self, *error: object) -> None:
        _names.set(_names.get()[:-1])


def current_backend() -> str | None:
    """The name given to the innermost `use_backend`, or None."""
    names = _names.get()
    return names[-1] if names else None


@functools.cache
def adapter(name: str) -> Any:
    """The module with `reasons`, `prepare` and `run` of a backend that has one."""
    return importlib.import_module(f".backends.{ADAPTERS[name]}", __package__)


def explain(
    spec: Spec, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
) -> dict[str, list[str]]:
    """Why each backend cannot run `spec` on `device`; an empty list means that it can. `dtype` replaces the spec's."""
    if dtype is not None:
        spec = with_dtype(spec, str(dtype).removeprefix("torch."))
    with _on(device):
        kind = torch.device(device).type
        return {name: _reasons(name, status, spec, kind) for name, status in backend_status().items()}


def _on(device: str | torch.device) -> contextlib.AbstractContextManager[object]:
    """The device as the current one, about which backends are asked, where it is a GPU with a number."""
    there = torch.device(device)
    numbered = there.type == "cuda" and there.index is not None and torch.cuda.is_available()
    return torch.cuda.device(there) if numbered else contextlib.nullcontext()


def _reasons(name: str, status: Status, spec: Spec, kind: str) -> list[str]:
    if isinstance(status, Unavailable):
        return [status.reason]
    if kind not in DEVICES[name]:
        return [f"runs on {' and '.join(DEVICES[name])} tensors, not on {kind}"]
    return adapter(name).reasons(spec)


def with_dtype(spec: Any, dtype: str) -> Any:
    """`spec` for another dtype."""
    fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    parts = {key: with_dtype(part, dtype) for key, part in fields.items() if isinstance(part, (ConvSpec, PoolSpec))}
    return dataclasses.replace(spec, **parts) if parts else dataclasses.replace(spec, dtype=dtype)


@functools.lru_cache(maxsize=4096)
def choose(spec: Spec, device: str, name: str | None = None) -> str:
    """The backend for `spec` on a device, which of several GPUs has its number: `name`, or the first of the order that
    can run and should.

    Raises ValueError for an unknown name, RuntimeError with every backend's reasons when none, or not the named one,
    can run.
    """
    check_name(name)
    with _on(device):
        return _chosen(spec, torch.device(device).type, name)


def _chosen(spec: Spec, kind: str, name: str | None) -> str:
    status = backend_status()
    candidates = ORDER.get(kind, ()) if name is None else (name,)
    # Whether "cuda" should is asked first: to find out whether it can, its kernels are run, which nobody asked for.
    should = (c for c in candidates if name is not None or c != "cuda" or (status[c] and adapter(c).wins(spec)))
    chosen = next((c for c in should if not _reasons(c, status[c], spec, kind)), None)
    if chosen is None:
        wanted = "no backend" if name is None else f"backend {name!r} cannot run; no other"
        lines = "".join(f"\n  {key}: {'; '.join(why) or 'can run'}" for key, why in explain(spec, kind).items())
        raise RuntimeError(f"{wanted} is chosen for {spec} on {kind}:{lines}")
    if name is None and chosen == "torch":
        _warn_of_library_path(spec, kind)
    return chosen


def _warn_of_library_path(spec: Spec, kind: str) -> None:
    reasons = explain(with_dtype(spec, "float32"), kind)
    native = [name for name in ORDER[kind] if name != "torch"]
    if not all(reasons[name] for name in native):
        return
    why = "; ".join(f"{name}: {', '.join(reasons[name])}" for name in native)
    with _warned_lock:
        if (type(spec), why) in _warned:
            return
        _warned.add((type(spec), why))
    message = f"inception_fast runs {_OPERATION[type(spec)]} through torch, slower than its kernels ({why})"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
