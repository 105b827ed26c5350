"""A network behind the engine, on the device that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import backend_status
from ..engine import optimize
from .batching import batches

ALLOWED = "cpu, cuda, cuda:N"
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class Placed:
    """Calls on the CPU's tensors whose results are there too, wherever the network runs. An image's features have the
    same bits alone and in any batch. `winograd` is `optimize`'s, which has it on the CPU alone.

    Raises ValueError for a device that is not here, and what `optimize` raises.
    """

    def __init__(
        self,
        net: nn.Module,
        size: Sequence[int],
        dtype: torch.dtype | None,
        device: str | torch.device = "cpu",
        *,
        winograd: bool = False,
    ) -> None:
        self.device, self.winograd = device_of(device), winograd
        example = torch.zeros(1, *size, device=self.device)
        self.plan = optimize(net, example, dtype=dtype, winograd=winograd, batch_invariant=True)

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [n, c, h, w] -> float32 [n, width]."""
        with torch.no_grad():
            parts = [self.plan(part.to(self.device)).reshape(len(part), -1) for part in x.split(batches(len(x)))]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.to("cpu", torch.float32)

    @property
    def settings(self) -> dict[str, Any]:
        """What features depend on beside the network and its dtype: no CPU, but every GPU has kernels of its own, and
        Winograd's tiles are another sum.
        """
        tiles = {"winograd": True} if self.winograd else {}
        return tiles if self.device.type == "cpu" else {"device": torch.cuda.get_device_name(self.device)}


def device_of(device: str | torch.device) -> torch.device:
    """The device, where networks can run on it. Raises ValueError naming what can be had."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r}; allowed: {ALLOWED}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r}; allowed: {ALLOWED}")
    if found.type == "cuda":
        status = backend_status()["triton"]
        if not status:
            raise ValueError(f"device {str(device)!r}; allowed here: cpu, for {status.reason}")  # type: ignore[union-attr]
        if (found.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {str(device)!r}; allowed here: cpu, and cuda:N below {torch.cuda.device_count()}")
    return found
