"""Work counts against layers counted by hand and against the published multiply-adds of the variants."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inception_fast
from inception_fast.measure.flops import layers, totals


def test_layers_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 8, (1, 3), stride=2, padding=(0, 1), bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 5 * 5, 10),
    ).eval()  # fmt: skip
    costs = {c.name: c for c in layers(net, torch.zeros(2, 3, 9, 9))}
    assert (costs["0"].macs, costs["0"].params, costs["0"].kind) == (2 * 5 * 5 * 8 * 3 * 3, 72, "Conv2d")
    assert (costs["1"].macs, costs["1"].params) == (0, 16)
    assert (costs["4"].macs, costs["4"].params) == (2 * 200 * 10, 2010)
    assert list(costs) == ["0", "1", "4"]
    assert totals(costs.values()) == (2 * 1800 + 4000, 72 + 16 + 2010)


def test_groups_and_functional_calls_are_counted_where_they_happen():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 2, 3, 3))

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight, groups=2)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return torch.einsum("nchw,cd->ndhw", self.inner(x), torch.ones(4, 5, device=x.device))

    costs = {c.name: c for c in layers(Outer(), torch.zeros(1, 4, 6, 6))}
    assert costs["inner"].macs == 16 * 4 * 2 * 9 and costs["inner"].params == 72
    assert costs[""].macs == 16 * 4 * 5


def test_a_layer_under_two_names_counts_where_it_is_first():
    """And what contains it under the second name does not lose what it never did."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.both = nn.Sequential(self.a, nn.Conv2d(8, 4, 1, bias=False))

        def forward(self, x):
            return self.both(self.a(x))

    costs = {c.name: c.macs for c in layers(Shared(), torch.zeros(1, 8, 5, 5))}
    assert costs == {"a": 2 * 25 * 8 * 8 * 9, "both.1": 25 * 8 * 4}


@pytest.mark.parametrize(
    "name, size, macs",
    [("inception_v1", 224, 1_498_376_192), ("inception_v3", 299, 5_713_216_096), ("inception_v4", 299, 12_253_974_624)],
)
def test_variants_have_their_published_work(name, size, macs):
    model = inception_fast.create_model(name).eval()
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    counted, params = totals(layers(model, torch.zeros(1, 3, size, size)))
    assert counted == macs and params == sum(p.numel() for p in model.parameters())
    assert before == {key: value.data_ptr() for key, value in model.state_dict().items()}
