"""Between TensorFlow and torch: tensors pass by DLPack, on the CPU as views, on a GPU behind synchronised devices.

On a GPU TensorFlow computes in a stream that it shows to nobody and frees memory in that stream's order, which torch's
allocator does not know. So nothing is left to streams: the whole device is waited for before the engine reads, after it
has written, and after TensorFlow has copied the results into memory of its own. Inputs are not copied.

What was not verified, for want of a GPU: none of the GPU's part ran on hardware. Its order was tested with stand-ins
for both libraries. That TensorFlow waits for its device before it hands a tensor over is what its sources say, and that
CUDA's synchronisation waits for kernels of both libraries is what CUDA's manual says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Sequence[Tensor]], list[Tensor]]


def to_torch(tensor: Any) -> Tensor:
    """A view of an eager TensorFlow tensor, complete: TensorFlow waits for the operation that makes it."""
    from tensorflow.experimental import dlpack

    return torch.utils.dlpack.from_dlpack(dlpack.to_dlpack(tensor))


def to_tensorflow(y: Tensor) -> Any:
    from tensorflow.experimental import dlpack

    return dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(y))


def copied(y: Any) -> Any:
    """The same values in memory that TensorFlow allocated, on the same device."""
    import tensorflow

    with tensorflow.device(y.device):
        return tensorflow.raw_ops.DeepCopy(x=y)


def wait_for(device: torch.device) -> None:
    """Returns when every stream of the GPU has finished, those of TensorFlow and of other threads included."""
    torch.cuda.synchronize(device)


def device_of(tensors: Sequence[Any]) -> torch.device:
    """Where eager TensorFlow tensors lie, in torch's words.

    Raises ValueError for several devices, other kinds of devices, and GPUs that TensorFlow numbers in its own way;
    RuntimeError where torch cannot use the GPU.
    """
    names = sorted({tensor.device for tensor in tensors})
    if len(names) > 1:
        raise ValueError(f"tensors on {', '.join(names)}; allowed: all on one device")
    if names[0].endswith("CPU:0"):
        return torch.device("cpu")
    found = re.search(r"GPU:(\d+)$", names[0])
    if found is None:
        raise ValueError(f"tensor on {names[0]}; allowed: the CPU, as in with tf.device('CPU'), or an NVIDIA GPU")
    if not torch.cuda.is_available():
        raise RuntimeError(f"tensor on {names[0]}, and this torch has no CUDA; allowed: the CPU, or a torch with CUDA")
    _check_numbering()
    return torch.device("cuda", int(found[1]))


def _check_numbering() -> None:
    """DLPack carries TensorFlow's number of a GPU, which is CUDA's only where none is hidden or divided."""
    from tensorflow import config

    physical, visible = config.list_physical_devices("GPU"), config.get_visible_devices("GPU")
    logical = config.list_logical_devices("GPU")
    if visible != physical[: len(visible)] or len(logical) != len(visible):
        raise ValueError(
            f"TensorFlow sees {len(visible)} of {len(physical)} GPUs as {len(logical)} devices, so its numbers are not "
            "CUDA's; allowed: the first GPUs, undivided; CUDA_VISIBLE_DEVICES hides the others from both libraries"
        )


def on_cpu(tensors: Sequence[Any], run: Run) -> list[Any]:
    """`run` on views of the tensors, its results as tensors. Both allocators align alike, so all are views."""
    return [to_tensorflow(y) for y in run([to_torch(tensor) for tensor in tensors])]


def on_gpu(tensors: Sequence[Any], device: torch.device, run: Run) -> list[Any]:
    """`run` on views of tensors on a GPU; its results copied once, on the GPU. Returns when all of it is done."""
    shared = [to_torch(tensor) for tensor in tensors]
    wrong = [x.device for x in shared if x.device != device]
    if wrong:
        raise RuntimeError(f"DLPack says {wrong[0]} of a tensor that TensorFlow has on {device}")
    wait_for(device)
    ys = run(shared)
    wait_for(device)
    results = [copied(to_tensorflow(y)) for y in ys]
    wait_for(device)  # before `ys` and `shared` are let go
    return results
