"""The recipes' arithmetic: TensorFlow's RMSProp, the learning rates, the average of the weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from inception_fast.train.optim import (
    RMSpropTF,
    WeightAverage,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from inception_fast.train.recipe import get_recipe
from inception_fast.train.settings import Settings, difference

GRADIENTS = np.random.default_rng(5).normal(size=(6, 3, 2)) * [[[3.0]], [[0.1]], [[1.0]], [[2.0]], [[0.5]], [[1e-3]]]
START = np.random.default_rng(6).normal(size=(3, 2))
RATES = (0.05, 0.05, 0.04, 0.04, 0.03, 0.03)


def ours(weight_decay: float = 0.0, epsilon: float = 1.0) -> np.ndarray:
    p = nn.Parameter(torch.tensor(START))
    optimizer = RMSpropTF([p], 0.05, 0.9, 0.9, epsilon, weight_decay)
    for gradient, lr in zip(GRADIENTS, RATES, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(gradient)
        optimizer.step()
    return p.detach().numpy()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("epsilon", [1.0, 1e-8])
def test_rmsprop_is_its_formula(weight_decay: float, epsilon: float) -> None:
    p, square, momentum = START.copy(), np.ones_like(START), np.zeros_like(START)
    for gradient, lr in zip(GRADIENTS, RATES, strict=True):
        g = gradient + weight_decay * p
        square = 0.9 * square + 0.1 * g**2
        momentum = 0.9 * momentum + lr * g / np.sqrt(square + epsilon)
        p = p - momentum
    np.testing.assert_allclose(ours(weight_decay, epsilon), p, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["native", "torch"])
def test_rmsprop_takes_a_rate_that_is_a_tensor(dtype: torch.dtype) -> None:
    moved = []
    for lr in (0.5, torch.tensor(0.5)):
        p = nn.Parameter(torch.tensor(START, dtype=dtype))
        optimizer = RMSpropTF([p], lr=lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for gradient in GRADIENTS:
            p.grad = torch.tensor(gradient, dtype=dtype)
            optimizer.step()
            schedule.step()
        moved.append(p.detach())
    assert torch.equal(*moved) and not torch.equal(moved[0], torch.tensor(START, dtype=dtype))


@pytest.mark.parametrize(
    "name, value", [("lr", float("nan")), ("lr", -1.0), ("lr", torch.ones(2)), ("decay", 1.0), ("epsilon", "1")]
)
def test_rmsprop_refuses_rates_of_no_sense(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} .*; allowed: a number from 0 to below"):
        RMSpropTF([nn.Parameter(torch.ones(2))], **{name: value})  # type: ignore[arg-type]


def test_rmsprop_refuses_sparse_gradients() -> None:
    words = nn.Embedding(4, 3, sparse=True)
    words(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"a gradient of layout torch.sparse_coo; allowed: torch.strided"):
        RMSpropTF(words.parameters()).step()


def test_rmsprop_is_tensorflows() -> None:
    tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed")
    with tf.Graph().as_default():
        rate, given = tf.compat.v1.placeholder(tf.float64), tf.compat.v1.placeholder(tf.float64, START.shape)
        variable = tf.compat.v1.get_variable("p", initializer=START, use_resource=True)
        update = tf.compat.v1.train.RMSPropOptimizer(rate, 0.9, 0.9, 1.0).apply_gradients([(given, variable)])
        with tf.compat.v1.Session() as session:
            session.run(tf.compat.v1.global_variables_initializer())
            for gradient, lr in zip(GRADIENTS, RATES, strict=True):
                session.run(update, {rate: lr, given: gradient})
            theirs = session.run(variable)
    np.testing.assert_allclose(ours(), theirs, rtol=1e-6)  # TensorFlow keeps the 0.9s in float32


def test_rmsprop_is_not_torchs() -> None:
    """The reason for its being here: torch's, with the same numbers, goes elsewhere."""
    p = nn.Parameter(torch.tensor(START))
    optimizer = torch.optim.RMSprop([p], 0.05, 0.9, 1.0, momentum=0.9)
    for gradient in GRADIENTS:
        p.grad = torch.tensor(gradient)
        optimizer.step()
    assert np.abs(p.detach().numpy() - ours()).max() > 0.01


def test_weights_decay_and_biases_do_not() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    groups = build_optimizer(get_recipe("paper", weight_decay=0.1), model).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]


@pytest.mark.parametrize("optimizer", ["rmsprop_tf", "sgd", "adamw"])
def test_optimizer_state_round_trip(optimizer: str) -> None:
    """A stopped optimizer goes on as one that never stopped, bit for bit."""
    recipe = get_recipe("modern", optimizer=optimizer)

    def steps(model: nn.Module, count: int, state: torch.optim.Optimizer) -> None:
        for i in range(count):
            model.zero_grad()
            model(torch.full((2, 3), 0.5 + i)).square().sum().backward()
            state.step()

    torch.manual_seed(3)
    first = nn.Linear(3, 2)
    second = nn.Linear(3, 2)
    whole = build_optimizer(recipe, first)
    steps(first, 2, whole)
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(recipe, second)
    load_optimizer_tensors(resumed, second, optimizer_tensors(whole, first))
    steps(first, 3, whole)
    steps(second, 3, resumed)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


def test_optimizer_state_of_another_network_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(get_recipe("paper"), model)
    with pytest.raises(ValueError, match="optimizer state of 'other'"):
        load_optimizer_tensors(optimizer, model, {"other/square": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"shape \(3, 3\); allowed: \(2, 3\)"):
        load_optimizer_tensors(optimizer, model, {"weight/square": torch.ones(3, 3)})


def test_weight_average_warms_up() -> None:
    """Its decay after n updates is min(decay, (1 + n) / (10 + n)); counters are copied, not averaged."""
    model = nn.BatchNorm1d(1)
    average = WeightAverage(model, 0.2)
    expected = 1.0
    for n in range(1, 5):
        with torch.no_grad():
            model.weight.fill_(n + 1.0)
        model.num_batches_tracked.fill_(n)
        average.update(n)
        decay = min(0.2, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1.0)
        assert average.tensors["weight"].item() == pytest.approx(expected, rel=1e-6)
        assert average.tensors["num_batches_tracked"].item() == n


def test_paper_rate_falls_every_second_epoch() -> None:
    recipe = get_recipe("paper")
    rates = [recipe.learning_rate(0, 1000, epoch) for epoch in (0.0, 1.99, 2.0, 3.5, 4.0, 20.0)]
    expected = [0.045, 0.045, 0.045 * 0.94, 0.045 * 0.94, 0.045 * 0.94**2, 0.045 * 0.94**10]
    assert rates == pytest.approx(expected)
    assert (recipe.rms_decay, recipe.epsilon, recipe.clip) == (0.9, 1.0, 2.0)
    assert (recipe.label_smoothing, recipe.aux_weight, recipe.ema) == (0.1, 0.4, 0.9999)


def test_the_rate_may_fall_inside_an_epoch() -> None:
    """TF-slim's flag, of a number of epochs, takes 2.5 too: the epochs are not rounded before they are counted."""
    recipe = get_recipe("paper", decay_epochs=2.5)
    rates = [recipe.learning_rate(0, 1000, epoch) / recipe.lr for epoch in (2.4, 2.5, 4.9, 5.0, 7.5)]
    assert rates == pytest.approx([1, 0.94, 0.94, 0.94**2, 0.94**3])


def test_modern_rate_rises_then_falls_as_a_cosine() -> None:
    recipe = get_recipe("modern", lr=1.0, warmup=0.1)
    rates = [recipe.learning_rate(step, 100, 0.0) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": -1.0}, "lr -1.0; allowed: a finite number more than 0"),
        ({"lr": 0.0}, "lr 0.0; allowed: a finite number more than 0"),
        ({"lr": math.nan}, "lr nan; allowed: a finite number more than 0"),
        ({"lr": math.inf}, "lr inf; allowed: a finite number more than 0"),
        ({"weight_decay": math.inf}, "weight_decay inf; allowed: a finite number, 0 or more"),
        ({"clip": math.nan}, "clip nan; allowed: a finite number, 0 or more"),
        ({"ema": math.nan}, "ema nan; allowed: 0 to below 1"),
        ({"momentum": 1.0}, "momentum 1.0; allowed: 0 to below 1"),
        ({"lr": "0.1"}, "lr '0.1'; allowed: a number"),
        ({"optimizer": "lion"}, "optimizer 'lion'; allowed: rmsprop_tf, sgd, adamw"),
        ({"optimizer": "adamw", "momentum": 0.9}, "momentum 0.9 with optimizer 'adamw'; allowed: with rmsprop_tf, sgd"),
        ({"speed": 3}, "recipe field 'speed'; allowed"),
    ],
)
def test_recipe_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_recipe("paper", **fields)


def test_unknown_recipe_names_the_known() -> None:
    with pytest.raises(ValueError, match="recipe 'papr'; allowed: paper, modern"):
        get_recipe("papr")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"steps": 20}, None),
        ({"model": "inception_v1"}, "model is 'tiny_inception' there and 'inception_v1' here"),
        ({"recipe": get_recipe("paper", lr=0.1)}, "recipe is {'lr': 0.045} there and {'lr': 0.1} here"),
        ({"steps": 20, "recipe": get_recipe("modern")}, "steps is 10 there"),
    ],
)
def test_difference_names_the_first_field(changed: dict[str, object], words: str | None) -> None:
    old = Settings("tiny_inception", steps=10)
    new = Settings(**({"model": "tiny_inception", "steps": 10} | changed))  # type: ignore[arg-type]
    found = difference(old.as_json(), new)
    assert (found is None) if words is None else (found is not None and words in found)


def test_winograd_is_for_float32_and_was_off_before_it_was_a_setting() -> None:
    with pytest.raises(ValueError, match="winograd with dtype 'bfloat16'; allowed: float32"):
        Settings("tiny_inception", dtype="bfloat16", winograd=True)
    old = Settings("tiny_inception").as_json()
    del old["winograd"]
    assert difference(old, Settings("tiny_inception")) is None
    assert difference(old, Settings("tiny_inception", winograd=True)) == "winograd is False there and True here"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_native_rmsprop_is_its_formula(weight_decay: float) -> None:
    """Several parameters, one longer than a worker's piece and one in channels_last, beside the formula in float64."""
    shapes: list[tuple[int, ...]] = [(5,), (40000,), (6, 4, 3, 3)]
    starts = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    starts[2] = starts[2].contiguous(memory_format=torch.channels_last)
    native, wide = ([nn.Parameter(p.clone().to(dtype)) for p in starts] for dtype in (torch.float32, torch.float64))
    optimizers = [RMSpropTF(params, 0.05, 0.9, 0.9, 1e-3, weight_decay) for params in (native, wide)]
    version = native[0]._version
    for turn in range(3):
        for params in (native, wide):
            for p, start in zip(params, starts, strict=True):
                p.grad = (start * (turn - 1.5)).to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
    assert native[0]._version > version
    for mine, truth in zip(native, wide, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=2e-6, atol=2e-6)


def test_native_rmsprop_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("inception_fast.train.optim.update", lambda params, *rest: calls.append(len(params)))
    for dtype in (torch.float32, torch.float64):
        p = nn.Parameter(torch.ones(3, dtype=dtype))
        p.grad = torch.ones_like(p)
        RMSpropTF([p]).step()
    assert calls == [1]
