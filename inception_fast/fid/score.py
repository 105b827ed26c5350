"""The Inception score, Salimans et al., arXiv:1606.03498."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._numbers import check_integer
from .statistics import Doubles, as_rows, check_rows

SPLITS, SEED, BLOCK = 10, 2020, 2048
NEEDED = "features of the FID network, whose classifier it asks"


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits."""

    mean: float
    std: float


def inception_score(features: Any, weight: Any, *, splits: int = SPLITS, seed: int = SEED) -> InceptionScore:
    """exp of the mean divergence between an image's classes and those of its split, in the order of torch-fidelity.

    Args:
        features: [n, 2048].
        weight: [classes, 2048] of the classifier; its bias stays out, as in the original code.

    Raises ValueError for fewer images than splits, and for features of another width than the classifier's.
    """
    splits = check_integer("splits", splits)
    check_rows(features)
    check_splits(splits, len(features))
    if weight is None:
        raise TypeError("weight None, as of a network without a classifier; allowed: [classes, d]")
    matrix = as_rows(weight)
    if features.shape[1] != matrix.shape[1]:
        raise ValueError(
            f"features of width {features.shape[1]}; allowed for the Inception score: {matrix.shape[1]}, {NEEDED}"
        )
    order = np.random.RandomState(seed).permutation(len(features))
    scores = []
    for i in range(splits):
        rows = order[i * len(order) // splits : (i + 1) * len(order) // splits]
        marginal, negentropy = np.zeros(len(matrix)), 0.0
        for start in range(0, len(rows), BLOCK):
            taken = rows[start : start + BLOCK]
            p, log_p = _softmax(as_rows(features[taken], numbers=taken) @ matrix.T)
            marginal += p.sum(axis=0)
            negentropy += float((p * log_p).sum())
        marginal /= len(rows)
        # p log p is 0 in the limit of a class that is beyond float64's reach in every row.
        log_marginal = np.log(marginal, where=marginal > 0, out=np.zeros_like(marginal))
        scores.append(np.exp(negentropy / len(rows) - marginal @ log_marginal))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def check_splits(splits: int, images: int) -> None:
    """Raises ValueError for more splits than images."""
    if not 1 <= splits <= images:
        raise ValueError(f"{splits} splits of {images} images; allowed: 1 to the number of images")


def _softmax(logits: Doubles) -> tuple[Doubles, Doubles]:
    """Probabilities and their logarithms, [n, classes]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.exp(log_p), log_p
