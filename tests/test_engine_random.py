"""Random networks: the same numbers as eager in float64, for other batches and layouts, in memory of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import numerics
from inception_fast import optimize
from random_nets import MAKERS, RandomNet

IMAGES = numerics.random(3, 3, 11, 13, seed=7)
SEEDS = range(40)


def expect_same(found: Any, wanted: Any, net: RandomNet) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
    for y, right in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        assert y.dtype == torch.float32 and y.shape == right.shape
        assert (y - right).abs().max() <= numerics.NET_MAX * right.abs().max(), net.extra_repr()


@pytest.mark.parametrize("seed", SEEDS)
def test_as_eager_in_float64(seed: int) -> None:
    net = RandomNet(seed, IMAGES[:2])
    wide = copy.deepcopy(net).double()
    fast = optimize(net, IMAGES[:2])
    all_native = not fast.report().counts["torch_fallbacks"]
    alone: list[Tensor] = []
    for batch in (2, 1, 3, 2):
        x = IMAGES[:batch].clone()
        with torch.no_grad():
            wanted = wide(x.double())
        for layout in numerics.LAYOUTS:
            found = fast(numerics.as_layout(x, layout))
            expect_same(found, wanted, net)
            for y in pytree.tree_leaves(found):
                y.fill_(float("nan"))
        assert torch.equal(x, IMAGES[:batch])
        if all_native:
            alone.append(fast(x)["logits"][0])
    for logits in alone:
        assert torch.equal(logits, alone[0])


def test_the_seeds_draw_every_kind_of_call() -> None:
    drawn = {name for seed in SEEDS for name, _, _ in RandomNet(seed, IMAGES[:2]).calls}
    assert drawn == set(MAKERS)
