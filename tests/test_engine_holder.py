"""A module that holds an optimised one: it is saved whole, trains the rest, and never takes other weights in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import numerics
from engine_nets import randomised
from inception_fast import optimize

X = numerics.random(2, 3, 12, 12, seed=2)


def backbone() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    randomised(net)
    return net.eval()


def held_by(net: nn.Module) -> nn.Sequential:
    return nn.Sequential(optimize(net, X), nn.Linear(8, 2), nn.Dropout(0.5))


def test_the_state_dict_of_a_holder_has_the_originals_entries() -> None:
    net = backbone()
    holder = held_by(net)
    state, wanted = holder.state_dict(), nn.Sequential(net, holder[1], holder[2]).state_dict()
    assert list(state) == list(wanted) and all(torch.equal(state[key], value) for key, value in wanted.items())
    assert list(state._metadata) == list(wanted._metadata)  # type: ignore[attr-defined]
    assert [name for name, _ in holder.named_parameters()] == ["1.weight", "1.bias"]
    own = holder[0].state_dict(keep_vars=True)
    assert list(own) == list(net.state_dict()) and own["0.weight"] is net[0].weight
    assert list(copy.deepcopy(holder).state_dict()) == list(wanted)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_keep_what_was_set_on_the_original(copied: Callable[[nn.Module], Any]) -> None:
    called: list[str] = []
    fast = optimize(backbone(), X)
    fast.classes = ["cat", "dog"]
    fast.register_forward_hook(lambda *call: called.append("hook"))
    twin = copied(fast)
    assert torch.equal(twin(X), fast(X)) and called == ["hook"] * 2
    assert type(twin) is type(fast) and twin.classes == fast.classes
    twin.register_forward_pre_hook(lambda *call: called.append("twin"))
    twin.note = "the copy's own"
    assert not hasattr(fast, "note") and not twin.training
    assert list(twin.state_dict()) == list(fast.state_dict())


def test_a_holder_loads_its_own_weights_and_no_others() -> None:
    net = backbone()
    holder, other = held_by(net), held_by(net)
    assert not torch.equal(holder[1].weight, other[1].weight)
    other.load_state_dict(holder.state_dict())
    assert torch.equal(other[1].weight, holder[1].weight)
    foreign = {key: value + 1 for key, value in holder.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"0\.0\.weight, 0\.0\.bias, .* not as optimised; load into the original"):
        other.load_state_dict(foreign)
    with pytest.raises(RuntimeError, match=r"0\.0\.weight not as optimised"):
        other.load_state_dict({"0.0.weight": torch.zeros(1)}, strict=False)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0\.0\.weight\""):
        other.load_state_dict(other[1].state_dict(prefix="1."))
    other.load_state_dict(other[1].state_dict(prefix="1."), strict=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0\.9\.weight\""):
        other.load_state_dict({**other.state_dict(), "0.9.weight": torch.zeros(1)})


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w.numpy().__imul__(2)], ids=["torch", "numpy"])
def test_a_state_that_is_not_what_was_optimised_is_not_saved(write: Any) -> None:
    net = backbone()
    holder = held_by(net)
    write(net[0].weight.detach())
    with pytest.raises(RuntimeError, match="parameters of Sequential changed after it was optimised"):
        holder.state_dict()


def test_a_holder_trains_what_is_not_optimised() -> None:
    holder = held_by(backbone())
    with pytest.warns(UserWarning, match="only infer, and this one stays in eval mode; train the original"):
        assert holder.train() is holder
    assert [part.training for part in (holder, *holder)] == [True, False, True, True]
    before: Tensor = holder[0](X)
    optimizer = torch.optim.SGD(holder.parameters(), 0.1)
    weight = holder[1].weight.detach().clone()
    holder(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(holder[1].weight, weight) and torch.equal(holder[0](X), before)
    assert not any(part.training for part in (holder.eval(), *holder))


def test_alone_it_says_the_same() -> None:
    fast = optimize(backbone(), X)
    with pytest.warns(UserWarning, match="only infer"):
        assert fast.train() is fast and not fast.training
    assert fast.train(False) is fast and fast.requires_grad_(True) is fast
    with pytest.raises(RuntimeError, match="Missing key"):
        fast.load_state_dict({})


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.fc = backbone(), nn.Linear(8, 2)
        self.register_buffer("gain", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x)) * self.gain


def test_a_part_that_is_set_behind_the_plans_back_is_refused() -> None:
    fast = optimize(Classifier(), X)
    for name, value in (("fc", nn.Linear(8, 5)), ("gain", torch.zeros(2)), ("gain", nn.Parameter(torch.zeros(2)))):
        with pytest.raises(
            AttributeError, match=f"{name} of Classifier .*; set it in the original module and optimise"
        ):
            setattr(fast, name, value)
    fast.transform, fast.note = nn.Identity(), "what is no part of the original may be kept here"
    assert [name for name, _ in fast.named_children()] == ["transform"] and fast(X).shape == (2, 2)
