"""The memory that captured GPU programs hold, and which of them give theirs up for others."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Protocol

import torch

SHARE = 0.25  # of the device's memory that a session's programs may hold between calls
WITHOUT_DEVICE = 1 << 30  # bytes in place of that share where kernels are interpreted


class Holder(Protocol):
    """A program with graphs and the memory that they point at."""

    @property
    def held_bytes(self) -> int: ...

    @property
    def holds(self) -> bool:
        """Whether these are more than 0."""

    @property
    def needed_bytes(self) -> int: ...

    def release(self) -> bool:
        """Gives graphs and memory up, to be made anew by the next call; False while a call is running."""


class Keeper:
    """Bounds what programs hold together: before one takes memory, those that ran longest ago give theirs up.

    A program whose call is running keeps its own, and so does the one that asks, however large it is.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._newest: int | None = None
        self._recent: OrderedDict[int, weakref.ref[Holder]] = OrderedDict()

    @classmethod
    def of(cls, device: torch.device) -> Keeper:
        """With the limit for a device."""
        if device.type != "cuda":
            return cls(WITHOUT_DEVICE)
        return cls(int(SHARE * torch.cuda.get_device_properties(device).total_memory))

    @property
    def held_bytes(self) -> int:
        return sum(holder.held_bytes for holder in self._living())

    def admit(self, holder: Holder) -> None:
        """Notes that the holder is about to run, and makes room for it."""
        if self._newest == id(holder) and holder.holds:
            return  # as in most calls: it ran last, and has what it needs
        with self._lock:
            self._recent[id(holder)] = weakref.ref(holder)
            self._recent.move_to_end(id(holder))
            others = [other for other in self._living() if other is not holder]
            held = sum(other.held_bytes for other in others) + holder.needed_bytes
            for other in others:
                if held <= self.limit:
                    break
                size = other.held_bytes
                held -= size if size and other.release() else 0
            # One that was running then is asked again by the next call.
            self._newest = id(holder) if held <= self.limit else None

    def _living(self) -> list[Holder]:
        found = {key: reference() for key, reference in list(self._recent.items())}
        for key in [key for key, holder in found.items() if holder is None]:
            self._recent.pop(key, None)
        return [holder for holder in found.values() if holder is not None]
