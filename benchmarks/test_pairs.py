"""Every distinct asymmetric pair and parallel split of the networks, each as one operation."""

from __future__ import annotations

import pytest
import torch
from inventory import Pair, pairs
from operands import device_of, exact, image, macs, operands

import inception_fast as fast

PAIRS = pairs()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_pair(measure, pair: Pair, backend: str) -> None:
    x, first, second = image(pair.first), operands(pair.first), operands(pair.second)
    op = fast.ops.asymmetric_pair if pair.kind == "chain" else fast.ops.parallel_split

    def truth():
        y = exact(x, pair.first, first)
        if pair.kind == "chain":
            return exact(y, pair.second, second)
        return torch.cat([y, exact(x, pair.second, second)], 1)

    def make(name: str):
        device = device_of(name)
        mine, rest = x.to(device), [part.to(device) for part in (*first, *second)]
        return lambda: op(mine, *rest, backend=name)

    measure(make, truth, macs=macs(pair.first) + macs(pair.second), multiplicity=dict(PAIRS[pair]))
