"""What a finished run leaves beside its log: weights that `create_model` loads, and a picture of its curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..measure.results import write_text
from .charts import COLOURS, Line, chart, smooth
from .networks import TINY

if TYPE_CHECKING:
    from .trainer import Trainer


def export_weights(
    trainer: Trainer, folder: Path, weights: Mapping[str, Tensor], classes: Sequence[str]
) -> Path | None:
    """Writes FOLDER/model.safetensors for `create_model(name, weights=...)`; None for the small network, which is not
    among the models, and for `broken` weights.

    Holds `weights`, the averaged ones, the names of `classes`, the options of the network, and how the images were
    prepared that it was judged on: at the size it was trained at, whole, as `augment.whole` makes them.
    """
    if trainer.settings.model == TINY or broken(weights):
        return None
    from ..weights import Source
    from ..weights.convert import write
    from ..weights.torch_files import OPTIONS

    model: Any = trainer.model
    options = {key: value for key, value in asdict(model.options).items() if key in OPTIONS and value is not None}
    if options["global_pool"] == "avg":  # that of every other file
        del options["global_pool"]
    size = trainer.settings.image_size
    shape = (model.in_chans, size, size)
    config = replace(model.data_config, input_size=shape, crop_pct=1.0, interpolation="bilinear")
    tensors = {name: value.detach().cpu() for name, value in weights.items()}
    path = folder / "model.safetensors"
    source = Source("inception_fast", trainer.settings.model, options, config, tensors, str(path), json.dumps(classes))
    write(path, source, tensors)
    return path


def broken(weights: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with values that are no finite numbers: statistics of the step at which a run diverged."""
    return next((name for name, value in weights.items() if not value.isfinite().all()), None)


def plot_run(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes FOLDER/curves.svg: loss, accuracy and learning rate against steps."""
    steps = [row["step"] for row in rows]
    window = max(len(rows) // 50, 1)
    panels: list[str] = []
    for title, key in (("Loss", "loss"), ("Accuracy of the batch", "accuracy"), ("Learning rate", "lr")):
        values = [row[key] for row in rows]
        line = Line(key, steps, values if key == "lr" else smooth(values, window), colour=COLOURS[len(panels)])
        panels.append(chart(title, "step", [line]))
    path = folder / "curves.svg"
    write_text(path, side_by_side(panels))
    return path


def side_by_side(panels: Sequence[str]) -> str:
    """Several charts as one SVG file."""
    from .charts import HEIGHT, WIDTH

    inner = "".join(f'<g transform="translate({i * WIDTH},0)">{panel}</g>' for i, panel in enumerate(panels))
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{inner}</svg>\n'
