"""One copy of the packed weights serves the plans of every batch size."""

from __future__ import annotations

import dataclasses

import numpy as np
import psutil
import pytest
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import ConvStep, Plan
from torch import nn

from cpu_plans import call, chain, chain_input, chain_truth
from inception_fast import create_model, optimize


def with_weights(plan: Plan, value: float) -> Plan:
    """The plan with every weight replaced by one value."""
    steps = [
        dataclasses.replace(s, weight=np.full_like(s.weight, value)) if isinstance(s, ConvStep) else s
        for s in plan.steps
    ]
    return dataclasses.replace(plan, steps=tuple(steps))


@pytest.mark.parametrize("tier", cpu.tiers())
def test_a_plan_like_another_uses_its_weights(tier: str) -> None:
    first = cpu.compile(chain(1), tier)
    plan, x = chain(3), chain_input(3)
    shared = cpu.compile(with_weights(plan, float("nan")), tier, like=first)
    del first
    assert torch.equal(call(shared, plan, x, threads=2)[0], chain_truth(x))


def test_a_plan_with_other_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match="weights of a plan with other convolutions"):
        cpu.compile(Plan((), (), (), 0), like=cpu.compile(chain(1)))


@pytest.mark.skipif(len(cpu.tiers()) < 2, reason="this machine runs one tier only")
def test_a_plan_for_another_tier_is_refused() -> None:
    slowest, fastest = cpu.tiers()[0], cpu.tiers()[-1]
    with pytest.raises(ValueError, match=f"for tier {slowest}"):
        cpu.compile(chain(1), slowest, like=cpu.compile(chain(1), fastest))


def test_another_batch_size_costs_no_second_copy() -> None:
    """Ten more batch sizes of 26 MB of weights stay far below one more copy each."""
    model = nn.Sequential(nn.Conv2d(512, 512, 5, padding=2), nn.ReLU()).eval()
    x = torch.randn(2, 512, 5, 5)
    fast = optimize(model, x)
    with torch.no_grad():
        fast(x)
        before = psutil.Process().memory_info().rss
        for batch in range(3, 13):
            fast(torch.randn(batch, 512, 5, 5))
    assert psutil.Process().memory_info().rss - before < 3 * 26e6


def test_shared_weights_give_every_image_the_same_bits() -> None:
    model = create_model("inception_v1", num_classes=7).eval()
    x = torch.randn(5, 3, 64, 64)
    fast = optimize(model, x[:2])
    with torch.no_grad():
        whole = fast(x)
        alone = torch.cat([fast(image[None]) for image in x])
    assert torch.equal(whole, alone)
    assert len({id(captured) for _, captured in fast._session.programs().values()}) == 1
