"""Every kind of block and every network on the engine, on each of its backends."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from inventory import Block, blocks, sizes_of
from operands import device_of
from torch import Tensor, nn

import inception_fast as fast
from inception_fast.measure.compare import calibrate, clouds, truth
from inception_fast.measure.flops import layers, totals

BLOCKS = blocks()


def _contest(measure: Any, module: nn.Module, x: Tensor, **extra: Any) -> None:
    def make(name: str):
        device = device_of(name)
        optimized = fast.optimize(copy.deepcopy(module).to(device), x.to(device), backend=name)
        mine = x.to(device)
        return lambda: optimized(mine)

    measure(make, lambda: truth(module, [x])[0], macs=totals(layers(module, x))[0], **extra)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(measure, block: Block, backend: str) -> None:
    torch.manual_seed(0)
    module = fast.create_model(block.model).eval().get_submodule(block.path)
    x = clouds(torch.empty(1, *block.shape), 1).relu()
    calibrate(module, x)
    _contest(measure, module, x, multiplicity={block.model: BLOCKS[block]})


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", fast.list_models())
def test_network(measure, name: str, batch: int, backend: str) -> None:
    torch.manual_seed(0)
    module = fast.create_model(name).eval()
    x = clouds(torch.empty(1, *sizes_of(name)), batch)
    calibrate(module, x[:1])
    _contest(measure, module, x, batch=batch)
