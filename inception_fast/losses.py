"""Losses of the Inception papers, thin over torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ._numbers import is_number, plain

__all__ = ["AuxiliaryLoss", "LabelSmoothingCrossEntropy"]


class LabelSmoothingCrossEntropy(nn.CrossEntropyLoss):
    """torch's cross entropy with smoothed labels: a share `smoothing` of each target is spread over all classes.

    logits [n, classes]; target [n] class indices or [n, classes] probabilities. The Inception-v3 paper takes 0.1.
    """

    def __init__(self, smoothing: float = 0.1, weight: Tensor | None = None, reduction: str = "mean") -> None:
        smoothing = plain(smoothing)
        if not is_number(smoothing) or not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing {smoothing!r}; allowed: 0 <= smoothing < 1")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction {reduction!r}; allowed: mean, sum, none")
        super().__init__(weight=weight, reduction=reduction, label_smoothing=smoothing)


class AuxiliaryLoss(nn.Module):
    """`loss` of the main logits plus `weight` times the loss of each auxiliary head's.

    Takes what a model in training mode returns: logits, or a sequence (logits, auxiliary logits, ...) without None.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor] | None = None, weight: float = 0.4) -> None:
        super().__init__()
        weight = plain(weight)
        if not is_number(weight) or not 0.0 <= weight < math.inf:
            raise ValueError(f"weight {weight!r}; allowed: a finite number, 0 or more")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss {loss!r}; allowed: a function of logits and target, or None")
        self.loss = LabelSmoothingCrossEntropy() if loss is None else loss
        self.weight = weight

    def forward(self, outputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return self.loss(outputs, target)
        main, *auxiliary = outputs
        return self.loss(main, target) + self.weight * sum(self.loss(logits, target) for logits in auxiliary)
