"""What the papers say of whole networks: multiply-adds, parameters, and how one compares with another."""

from __future__ import annotations

from typing import Any

import torch

from ..measure.design import Design, inspect
from ..models import create_model, list_models
from .context import Context
from .row import Row, below, counted

UNITS = {"macs": "billion multiply-adds", "params": "million parameters"}


def networks(context: Context) -> list[Row]:
    found = {name: _design(name) for name in list_models()}
    found["GoogLeNet of 2014"] = _design("inception_v1", classic=True)
    found["inception_resnet_v1 at 299"] = _design("inception_resnet_v1", size=299)
    levels = {
        name: [{"name": x.name, "shape": x.shape, "values": x.values, "depth": x.depth} for x in found[name].levels]
        for name in ("inception_v1", "inception_v3", "inception_v4", "inception_resnet_v2")
    }
    flagged = {name: [b.name for b in found[name].bottlenecks] for name in levels}
    v3, v4 = found["inception_v3"], found["inception_v4"]
    classic = found["GoogLeNet of 2014"]
    resnet1, resnet2 = found["inception_resnet_v1 at 299"], found["inception_resnet_v2"]

    def row(name: str, claim: str, source: str, stated: float, measured: float, unit: str, note: str = "") -> Row:
        command = context.command("networks")
        return Row(name, claim, source, stated, measured, unit, command, counted(measured, stated), note)

    return [
        row("googlenet_macs", "GoogLeNet spends 1.5 billion multiply-adds an image.", "arXiv:1409.4842, section 1",
            1.5, classic.macs / 1e9, UNITS["macs"]),
        row("v3_macs", "Inception v3 spends 5 billion multiply-adds an image.", "arXiv:1512.00567, abstract",
            5, v3.macs / 1e9, UNITS["macs"]),
        Row("v3_params", "Inception v3 has fewer than 25 million parameters.", "arXiv:1512.00567, abstract",
            25, v3.params / 1e6, UNITS["params"], context.command("networks"), below(v3.params / 1e6, 25),
            "the claim is a bound"),
        row("v3_over_googlenet_macs", "Inception v3 costs about 2.5 times as much as GoogLeNet.",
            "arXiv:1512.00567, section 6", 2.5, v3.macs / classic.macs, "times the multiply-adds"),
        row("resnet_v1_over_v3_macs", "Inception-ResNet v1 costs about as much as Inception v3.",
            "arXiv:1602.07261, section 3.2", 1, resnet1.macs / v3.macs, "times the multiply-adds",
            "facenet's form, with a sixth block at the end, on 299x299"),
        row("resnet_v2_over_v4_macs", "Inception-ResNet v2 costs about as much as Inception v4.",
            "arXiv:1602.07261, section 3.2", 1, resnet2.macs / v4.macs, "times the multiply-adds"),
        Row("bottlenecks_v3_v4", "A network should avoid representational bottlenecks, above all early ones.",
            "arXiv:1512.00567, section 2", 0, float(len(v4.bottlenecks)), "bottlenecks in v4",
            context.command("networks"), counted(len(v4.bottlenecks), 0.0), _remark(flagged),
            {"levels": levels, "flagged": flagged}),
    ]  # fmt: skip


def _remark(flagged: dict[str, list[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(names) or 'none'}" for name, names in flagged.items())


def _design(name: str, size: int | None = None, **options: Any) -> Design:
    with torch.device("meta"):
        model: Any = create_model(name, **options).eval()
        c, h, w = model.data_config.input_size
        return inspect(model, torch.empty(1, c, size or h, size or w))
