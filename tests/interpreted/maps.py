"""Maps in guarded, pitched memory, on the interpreter's device or on a GPU where there is one."""

from __future__ import annotations

import torch
from inception_fast.kernels.triton.launch import Launch, Map, interpreting
from torch import Tensor

MARGIN = 64
DEVICE = torch.device("cpu" if interpreting() else "cuda")


def put(x: Tensor, before: int = 0, after: int = 0) -> Map:
    """x [n, c, h, w] as channels of wider pixels; NaN fills the other channels and a margin round the buffer."""
    n, c, h, w = x.shape
    pitch = before + c + after
    block = torch.full((n * h * w * pitch + 2 * MARGIN,), float("nan"), dtype=x.dtype, device=DEVICE)
    inside = block[MARGIN : block.numel() - MARGIN]
    inside.view(n, h, w, pitch)[..., before : before + c] = x.permute(0, 2, 3, 1).to(DEVICE)
    return Map(inside[before:], n, h, w, c, pitch)


def empty(n: int, c: int, h: int, w: int, dtype: torch.dtype, before: int = 0, after: int = 0) -> Map:
    return put(torch.full((n, c, h, w), float("nan"), dtype=dtype), before, after)


def take(y: Map) -> Tensor:
    """[n, c, h, w] of a map that `put` or `empty` made. Fails when anything round it was written to."""
    storage = torch.empty(0, dtype=y.data.dtype, device=DEVICE).set_(y.data.untyped_storage())
    start = y.data.storage_offset()
    strides = (y.h * y.w * y.pitch, y.w * y.pitch, y.pitch, 1)
    inside = storage.as_strided((y.n, y.h, y.w, y.c), strides, start)
    result = inside.clone()
    inside.fill_(float("nan"))
    assert storage.isnan().all(), "memory beside the map was written to"
    return result.permute(0, 3, 1, 2).cpu()


def run(launches: list[Launch]) -> None:
    assert launches
    for launch in launches:
        launch.run()
