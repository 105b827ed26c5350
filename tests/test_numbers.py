"""Options are numbers of NumPy as well as Python's, and nothing else that looks like one."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import inception_fast as fast
from inception_fast import fid, layers, ops
from inception_fast._numbers import plain
from inception_fast.measure.timer import Plan
from inception_fast.train import Settings, get_recipe

I64, F32, TRUE, FALSE = np.int64, np.float32, np.bool_(True), np.bool_(False)
X, W, S = torch.rand(1, 4, 8, 8), torch.rand(4, 4, 1, 3), torch.rand(4)
ROWS = np.random.RandomState(0).rand(30, 4)

SERVED: dict[str, Callable[[], Any]] = {
    "residual": lambda: ops.conv_bn_relu(
        X, W, S, S, stride=I64(1), padding=(I64(0), 1), relu=FALSE, residual=X, residual_scale=F32(0.5)
    ),
    "pool_project": lambda: ops.pool_project(
        X, W[..., :1], S, S, kernel_size=I64(3), stride=I64(1), padding=I64(1), count_include_pad=TRUE
    ),
    "batch_norm": lambda: ops.batch_norm_relu(X, S, S, eps=F32(1e-3)),
    "conv_batch_norm": lambda: ops.conv_batch_norm_relu(X, W, S, S, stride=I64(2), padding=I64(1), eps=F32(1e-3)),
    "convolution": lambda: ops.convolution(X, W, stride=I64(2), padding=I64(1), winograd=FALSE),
    "layer": lambda: fast.ConvBNReLU(I64(4), I64(4), I64(3), I64(2), (I64(1), 1), F32(1e-3), F32(0.1))(X),
    "layer in evaluation": lambda: fast.ConvBNReLU(I64(4), np.uint8(4), I64(3), I64(2)).eval()(X),
    "pair": lambda: fast.AsymmetricPair(I64(4), I64(4), I64(4), I64(3)).eval()(X),
    "split": lambda: fast.ParallelSplit(I64(4), I64(4), I64(4), I64(3)).eval()(X),
    "pool layer": lambda: fast.PoolProject(I64(4), I64(4), I64(3), I64(1), I64(1), FALSE)(X),
    "pool of a window": lambda: layers.MaxPool2d(I64(3), I64(2))(X),
    "loss": lambda: fast.LabelSmoothingCrossEntropy(F32(0.1))(X[0, 0], torch.arange(8)),
    "replace": lambda: fast.replace_layers(nn.Sequential(nn.Conv2d(4, 4, 3)), winograd=FALSE)(X),
    "optimize": lambda: fast.optimize(nn.Conv2d(4, 4, 3), X, batch_sizes=[I64(1), I64(2)], winograd=FALSE)(X),
    "kid": lambda: fid.kernel_inception_distance(ROWS, ROWS, subsets=I64(2), subset_size=I64(9), seed=I64(1)),
    "prdc": lambda: fid.precision_recall_density_coverage(ROWS, ROWS, neighbours=I64(3), block=I64(7)),
    "inception score": lambda: fid.inception_score(ROWS, ROWS[:10], splits=I64(3), seed=I64(1)),
}


@pytest.mark.parametrize("name", SERVED)
def test_numpys_numbers_are_served(name: str) -> None:
    assert SERVED[name]() is not None


def test_models_keep_pythons_numbers() -> None:
    """What is kept goes to JSON, with weights and in reports."""
    numbers: dict[str, Any] = {"num_classes": I64(7), "in_chans": np.int32(3), "drop_rate": F32(0.5)}
    numbers |= {"bn_eps": F32(2**-10), "bn_momentum": np.float16(0.25), "aux_drop_rate": np.float64(0.25)}
    with torch.device("meta"):
        net: Any = fast.create_model("inception_v1", aux_logits=TRUE, classic=FALSE, **numbers)
        features: Any = fast.create_model("inception_v3", features_only=TRUE, out_indices=[I64(0), I64(-1)])
        embedding: Any = fast.create_model("inception_resnet_v1", embedding_size=I64(128))
    assert {name: getattr(net.options, name) for name in numbers} == numbers
    held = [getattr(net.options, name) for name in (*numbers, "aux_logits", "classic")]
    assert [type(value) for value in held] == [int, int, float, float, float, float, bool, bool]
    assert features.out_indices == (0, 4) and type(embedding.options.embedding_size) is int
    net.reset_classifier(I64(5))
    assert net.num_classes == 5 and type(net.num_classes) is int
    net.adapt_in_chans(I64(1))
    assert net.in_chans == 1 and type(net.in_chans) is int


def test_trainings_keep_pythons_numbers() -> None:
    recipe = get_recipe("paper", lr=F32(0.25), decay_epochs=I64(3))
    settings = Settings("inception_v1", steps=I64(3), recipe=recipe, options={"drop_rate": F32(0.5)}, winograd=FALSE)
    found = settings.steps, recipe.lr, recipe.decay_epochs, settings.options["drop_rate"], settings.winograd
    assert [type(value) for value in found] == [int, float, int, float, bool]


REFUSED: dict[str, Callable[[], Any]] = {
    "truth as classes": lambda: fast.create_model("inception_v1", num_classes=TRUE),
    "a float as classes": lambda: fast.create_model("inception_v1", num_classes=np.float64(10)),
    "truth as a rate": lambda: fast.create_model("inception_v1", drop_rate=FALSE),
    "not a number": lambda: fast.create_model("inception_v1", bn_momentum=np.float32("nan")),
    "several": lambda: fast.create_model("inception_v1", num_classes=np.array([10])),
    "text": lambda: fast.create_model("inception_v1", num_classes=np.str_("10")),
    "a float as stride": lambda: ops.convolution(X, W, stride=np.float64(1), padding=0),
    "truth as stride": lambda: ops.convolution(X, W, stride=TRUE, padding=0),
    "a number as a flag": lambda: ops.convolution(X, W, stride=1, padding=0, winograd=I64(1)),  # type: ignore[arg-type]
    "truth as eps": lambda: ops.batch_norm_relu(X, S, S, eps=TRUE),  # type: ignore[arg-type]
    "a float as a length": lambda: fast.AsymmetricPair(4, 4, 4, np.float64(3)),  # type: ignore[arg-type]
    "truth as smoothing": lambda: fast.LabelSmoothingCrossEntropy(FALSE),  # type: ignore[arg-type]
    "truth as a batch": lambda: fast.optimize(nn.Conv2d(4, 4, 3), X, batch_sizes=[TRUE]),  # type: ignore[list-item]
    "floats as subsets": lambda: fid.kernel_inception_distance(ROWS, ROWS, subsets=2.0, subset_size=9),  # type: ignore[arg-type]
    "truth as neighbours": lambda: fid.precision_recall_density_coverage(ROWS, ROWS, neighbours=True),
    "truth as splits": lambda: fid.inception_score(ROWS, ROWS[:10], splits=True),
    "a number as auxiliary heads": lambda: fast.create_model("inception_v1", aux_logits=1),  # type: ignore[arg-type]
    "a number as an option": lambda: fast.create_model("inception_v3", fid=0),
    "a number as features only": lambda: fast.create_model("inception_v3", features_only=1),  # type: ignore[arg-type]
    "no share of auxiliary heads": lambda: fast.losses.AuxiliaryLoss(weight=float("nan")),
    "a number as winograd": lambda: Settings("inception_v1", winograd=1),  # type: ignore[arg-type]
    "no time": lambda: Plan(seconds=float("nan")),
    "no patience": lambda: Plan(patience=-1),
    "no end of calm": lambda: Plan(calm=float("inf")),
    "no beginning": lambda: Plan(warm=float("inf")),
    "parts of a round": lambda: Plan(least=1.5),  # type: ignore[arg-type]
    "truth as steps": lambda: Settings("inception_v1", steps=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_looks_like_the_number_is_refused(name: str) -> None:
    with pytest.raises((ValueError, TypeError), match="allowed"):
        REFUSED[name]()


def test_plain_takes_all_kinds_of_numbers_and_leaves_the_rest() -> None:
    values = (np.array(3), np.longdouble(0.5), Fraction(1, 4), [np.uint8(2), TRUE], "same", None, 2j)
    found = plain(values)
    assert found == (3, 0.5, 0.25, [2, True], "same", None, 2j)
    assert [type(value) for value in (*found[:3], *found[3])] == [int, float, float, int, bool]
    x: Tensor = torch.ones(1)
    assert plain(x) is x
