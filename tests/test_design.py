"""The design checker: levels counted by hand, the article's bottleneck found, its cure not, totals as published."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import inception_fast as fast
from inception_fast.claims import nets
from inception_fast.measure.design import inspect
from inception_fast.measure.flops import layers, totals


def test_levels_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    design = inspect(net, torch.zeros(2, 3, 9, 9))
    assert [(x.shape, x.values, x.macs, x.params) for x in design.levels] == [
        ((3, 9, 9), 243, 0, 0),
        ((8, 4, 4), 128, 8 * 16 * 27, 8 * 27 + 8 + 16),
        ((5,), 5, 640, 645),
    ]
    assert (design.macs, design.params) == (8 * 16 * 27 + 640, 885)
    assert design.narrowest == 5 and not design.bottlenecks
    json.dumps(design.to_dict(), allow_nan=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_inference_mode_hides_no_work(device):
    """There operators come whole, as conv2d and linear, and tensors made there stay of that mode."""
    with torch.device(device):
        net, x = (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 5)),
            torch.zeros(1, 3, 9, 9),
        )
        plain = inspect(net, x)
        with torch.inference_mode():
            made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 5))
            assert inspect(net, x) == inspect(made, torch.zeros(1, 3, 9, 9)) == plain
    assert plain.macs == 8 * 49 * 27 + 8 * 49 * 5


def test_every_tensor_of_an_operation_is_followed():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            left, right = self.a(x).chunk(2, 1)
            return self.b(left) + self.c(right)

    design = inspect(Halves(), torch.zeros(1, 3, 5, 5))
    assert design.macs == 25 * (48 + 32 + 32)
    assert [(x.name, x.values, x.depth) for x in design.levels] == [("input", 75, 0), ("a", 400, 1), ("add", 100, 5)]


def test_the_articles_bottleneck_is_flagged_and_its_cure_is_not():
    x = nets.images(*nets.REDUCTION)
    found = {name: inspect(make(), x) for name, make in nets.REDUCTIONS.items()}
    (flag,) = found["pool, then convolution"].bottlenecks
    assert (flag.shape, flag.values, flag.before, flag.after) == ((320, 17, 17), 92480, 392000, 184960)
    assert "17x17x320" in str(flag)
    assert not found["parallel"].bottlenecks and not found["convolution, then pool"].bottlenecks
    assert {design.levels[-1].shape for design in found.values()} == {(640, 17, 17)}


class Skip(nn.Module):
    """What is narrow in the branch is not narrow in the network: the input goes round it."""

    def __init__(self, around: bool) -> None:
        super().__init__()
        self.down, self.up, self.around = nn.Conv2d(16, 2, 1), nn.Conv2d(2, 16, 1), around

    def forward(self, x):
        y = self.up(torch.relu_(self.down(x)))
        return y + x if self.around else y


def test_a_way_round_is_no_bottleneck():
    x = torch.zeros(1, 16, 4, 4)
    assert not inspect(Skip(True), x).bottlenecks
    (flag,) = inspect(Skip(False), x).bottlenecks
    assert (flag.name, flag.values, flag.before, flag.after) == ("down", 32, 256, 256)


def test_vectors_are_not_judged():
    """A classifier of more classes than features squeezes nothing."""
    head = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 100))
    assert not inspect(head, torch.zeros(1, 3, 9, 9)).bottlenecks


@pytest.mark.parametrize("name, flagged", [("inception_v3", ["maxpool1"]), ("inception_v4", [])])
def test_networks(name, flagged):
    with torch.device("meta"):
        model = fast.create_model(name).eval()
        x = torch.empty(3, *model.data_config.input_size)
    design = inspect(model, x)
    macs, params = totals(layers(model, x[:1]))
    assert (design.macs, design.params) == (macs, params)
    assert sum(level.params for level in design.levels) == params
    assert sum(level.macs for level in design.levels) == macs
    assert [flag.name for flag in design.bottlenecks] == flagged
    assert ("Mixed_6b" if name == "inception_v3" else "features.10") in [level.name for level in design.levels]


@pytest.mark.parametrize("inputs", [(), (torch.zeros(3),), (torch.zeros(0, 3, 9, 9),), ("x",)])
def test_what_cannot_be_inspected_is_refused(inputs):
    with pytest.raises(ValueError, match=r"allowed: \[n, \.\.\.\] with n >= 1"):
        inspect(nn.Identity(), *inputs)


class Blind(nn.Module):
    def forward(self, x):
        return torch.ones(len(x), 3)


def test_a_result_without_the_input_has_no_design():
    with pytest.raises(ValueError, match="Blind makes its result without its input; allowed: a module that reads it"):
        inspect(Blind(), torch.zeros(1, 3, 9, 9))
