"""The order of the data as a pure function of seed and step: nothing to save, nothing that workers or processes could
change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

Key = tuple[int, int]
"""(epoch, index of the image in its source): all that an image's augmentation depends on, beside the seed."""


def mix(*numbers: int) -> int:
    """One 63-bit seed from several non-negative integers, well spread even where they are small and close."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Stream:
    """An endless row of shuffled epochs over `indices`, cut into batches; a batch may hold the end of one epoch and
    the start of the next.

    Iterating yields the keys of this process's share of each batch, for the steps `start` to `stop`, both counted
    from zero.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if not indices:
            raise ValueError("no images to train on; allowed: at least one")
        if batch_size % processes:
            raise ValueError(f"batch size {batch_size} over {processes} processes; allowed: a multiple of {processes}")
        self.indices = np.asarray(indices, dtype=np.int64)
        self.batch_size, self.seed, self.start, self.stop = batch_size, seed, start, stop
        self.rank, self.processes = rank, processes
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        order: np.ndarray = np.random.default_rng([self.seed, epoch]).permutation(self.indices)
        return order

    def epoch(self, step: int) -> float:
        """Passes over the data made before `step`."""
        return step * self.batch_size / len(self.indices)

    def batch(self, step: int) -> list[Key]:
        """This process's keys of one step."""
        share = self.batch_size // self.processes
        first = step * self.batch_size + self.rank * share
        return [self._key(position) for position in range(first, first + share)]

    def _key(self, position: int) -> Key:
        epoch, offset = divmod(position, len(self.indices))
        return epoch, int(self._order(epoch)[offset])

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.batch, range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop - self.start
