"""Images decoded and prepared by worker processes, in order, a bounded number of batches ahead of the network."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..images import ImageError, read_photo
from .extractors import Prepare
from .sources import Source

AHEAD = 2  # batches that a worker prepares before they are asked for
SHARED_MEMORY = "/dev/shm"


class Failure(ValueError):
    """Images that could not be read, where that is to end the run."""


@dataclass(frozen=True)
class Prepared:
    """`x` [n, c, h, w] float32 holds the images `rows`; `bad` are (index, reason) of those that could not be read."""

    x: Tensor
    rows: list[int]
    bad: list[tuple[int, str]]

    @property
    def count(self) -> int:
        return len(self.rows) + len(self.bad)


class Images:
    """A data set for `DataLoader` whose items are whole batches."""

    def __init__(self, source: Source, prepare: Prepare) -> None:
        self.source, self.prepare = source, prepare

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, index: int) -> Prepared:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Prepared:
        x = torch.empty(len(indices), *self.prepare.shape)
        rows: list[int] = []
        bad: list[tuple[int, str]] = []
        for index in indices:
            try:
                x[len(rows)] = torch.from_numpy(self.image(index))
                rows.append(index)
            except (ImageError, OSError, ValueError) as error:
                bad.append((index, " ".join(str(error).split()) or type(error).__name__))
        return Prepared(x[: len(rows)], rows, bad)

    def image(self, index: int) -> np.ndarray:
        """[c, h, w] float32 of one image."""
        name = self.source.names[index]
        try:
            data = self.source.read(index)
        except FileNotFoundError:
            raise ImageError(f"{name}: no such file") from None
        except (OSError, ValueError) as error:
            raise ImageError(f"{name} cannot be read ({error})") from error
        return self.prepare(read_photo(data, name, plain=self.prepare.plain).image)


class Batches:
    """The indices in portions of `size`, made as they are asked for."""

    def __init__(self, indices: Sequence[int], size: int) -> None:
        self.indices, self.size = indices, size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.size):
            yield list(self.indices[start : start + self.size])


def feed(
    source: Source, prepare: Prepare, indices: Sequence[int], *, batch_size: int, workers: int, threads: int = 0
) -> Iterator[Prepared]:
    """The images of `indices` in their order. `workers` processes decode, or else `threads` of this one, or none.

    At most AHEAD batches for each worker are in memory. Raises ValueError where shared memory is too small for them,
    ChildProcessError, an OSError, where one of the processes dies.
    """
    if threads and not workers:
        yield from _feed_threads(Images(source, prepare), Batches(indices, batch_size), threads)
        return
    workers = min(workers, len(Batches(indices, batch_size)))
    _check_shared_memory(4 * int(np.prod(prepare.shape)) * batch_size, workers)
    options: dict[str, Any] = {"prefetch_factor": AHEAD} if workers else {}
    loader: Any = DataLoader(
        Images(source, prepare),  # type: ignore[arg-type]
        batch_sampler=Batches(indices, batch_size),
        collate_fn=_as_is,
        num_workers=workers,
        **options,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            f"a decoding process died ({str(error).splitlines()[0]}); what is written stays, run the same command again"
        ) from error


def _feed_threads(images: Images, batches: Batches, threads: int) -> Iterator[Prepared]:
    """For processes that should not fork. Decoding lets go of the interpreter's lock."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Prepared]] = deque()
        for batch in batches:
            ahead.append(pool.submit(images.__getitems__, batch))
            if len(ahead) > AHEAD * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _as_is(prepared: Any) -> Any:
    return prepared


def _check_shared_memory(batch_bytes: int, workers: int) -> None:
    """A worker that runs out of shared memory dies of a bus error, so the request is refused before."""
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return
    state = os.statvfs(SHARED_MEMORY)
    free, needed = state.f_bavail * state.f_frsize, batch_bytes * (AHEAD + 1) * workers
    if needed > free:
        raise ValueError(
            f"{workers} workers need {needed >> 20} MiB of shared memory, {SHARED_MEMORY} has {free >> 20} MiB free; "
            "allowed: fewer --workers, or a smaller --batch-size"
        )
