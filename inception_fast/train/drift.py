"""How far the distribution of each layer's input moves in training: the internal covariate shift of arXiv:1502.03167.

At chosen steps the same held-out images pass through the network as it stands, batch norm with the statistics of these
images, and OUT/drift.jsonl gets, of every convolution's and linear layer's input, the quantiles, the channels' means
and the deviation within a channel. A layer's drift from one row to the next is the distance of the channels' means in
units of that deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .data import evaluation_loader
from .labelled import Data
from .log import read_log
from .networks import build

if TYPE_CHECKING:
    from .trainer import Trainer

NAME = "drift.jsonl"
IMAGES = 64
QUANTILES = (0.15, 0.5, 0.85)  # those of the paper's figure 4


class Probe:
    """A copy of the network, its layers apart, that looks at the same images again and again.

    Raises ValueError where there are no held-out images, or the network is spread over several processes.
    """

    def __init__(self, trainer: Trainer, data: Data) -> None:
        s = trainer.settings
        if trainer.world.size > 1:
            raise ValueError(f"drift of {trainer.world.size} processes; allowed: one")
        if not data.held_out:
            raise ValueError(f"drift needs held-out images; allowed: data with some, {data.source.name} has none")
        self.trainer = trainer
        self.model = build(s.model, trainer.classes, s.options, None, trainer.aux).to(trainer.world.device).train()
        count = min(IMAGES, len(data.held_out))
        ((pixels, _),) = evaluation_loader(data, count, count, s.image_size, workers=0)
        self.images: Tensor = trainer.normalise(pixels)
        self.found: dict[str, dict[str, Any]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_pre_hook(self._note(name))

    def row(self) -> dict[str, Any]:
        """What OUT/drift.jsonl keeps of the step just made. Changes nothing of the run."""
        self.model.load_state_dict(self.trainer.model.state_dict())
        self.found = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            self.model(self.images)
        return {"step": self.trainer.steps_done, "layers": self.found}

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.found[name] = describe(inputs[0])

        return hook


def describe(x: Tensor) -> dict[str, Any]:
    """Quantiles over all values of [n, c, ...], the mean of each channel, and the deviation within a channel."""
    values = x.detach().double().movedim(1, 0).flatten(1)
    quantiles = [_finite(float(v)) for v in _quantiles(values.flatten())]
    deviation = float(values.var(1, correction=0).mean().sqrt())
    means = [_finite(v) for v in values.mean(1).tolist()]
    return {"quantiles": quantiles, "means": means, "deviation": _finite(deviation)}


def _quantiles(values: Tensor) -> Tensor:
    """By sorting: `torch.quantile` refuses more than 16 million values."""
    ordered = values.sort().values
    return ordered[[min(int(q * len(ordered)), len(ordered) - 1) for q in QUANTILES]]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def movements(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """(step, layer, drift since the row before) of every layer; None where a value was not finite."""
    found = []
    for before, after in pairwise(rows):
        for layer, now in after["layers"].items():
            found.append({"step": after["step"], "layer": layer, "drift": distance(before["layers"][layer], now)})
    return found


def distance(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """Root mean square, over the channels, of the means' change, in deviations of `before`."""
    pairs = list(zip(before["means"], after["means"], strict=True))
    if before["deviation"] is None or any(None in pair for pair in pairs):
        return None
    moved = math.sqrt(sum((b - a) ** 2 for a, b in pairs) / len(pairs))
    return moved / before["deviation"] if before["deviation"] else None


def read_drift(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's drift; none for a run that was not watched."""
    return read_log(folder, NAME)
