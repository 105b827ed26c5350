"""What the engine's own rewrites of the Inception block save: sibling 1x1s merged, average pools moved behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..engine import optimize
from ..models import create_model
from . import nets
from .context import Context
from .factorising import raced
from .race import Contestant, without
from .row import CONFIRMED, DIFFERS, REFUTED, Row

PACKAGE = "this package"
MERGE, COMMUTE = "merge_siblings", "commute_average_pool"
SIBLINGS = {"inception_v3": (94, 66), "inception_v4": (149, 105), "inception_resnet_v2": (244, 189)}
"""Convolutions of the network as written and as the engine is stated to run them."""


def engine_passes(context: Context) -> list[Row]:
    block = _block()
    x = nets.images(768, 17, 17)
    whole, unmerged = Contestant(block), Contestant(block, (MERGE,))
    uncommuted = Contestant(block, (COMMUTE,))
    rows = [_same_bits(context, block), *_convolutions(context)]
    claim = "Merging the 1x1 convolutions of v3's Mixed_6b that read the same tensor saves time."
    rows += raced(context, "engine", "merge_siblings_time", claim, PACKAGE, None, x, unmerged, whole)
    claim = "Moving the average pool of v3's Mixed_6b behind its 1x1, to pool 192 channels for 768, saves time."
    return rows + raced(context, "engine", "commute_average_pool_time", claim, PACKAGE, None, x, uncommuted, whole)


def _block() -> nn.Module:
    """v3's first block on the 17x17 grid: three sibling 1x1s and an average pool with a fourth behind it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model("inception_v3")
    return nets.settled(model.get_submodule("Mixed_6b"))


def _same_bits(context: Context, block: nn.Module) -> Row:
    """Merging is a matter of layout, so not one bit may move; only the pool's pass changes the order of sums."""
    x = nets.images(768, 17, 17)
    with torch.inference_mode():
        with without(COMMUTE):
            merged = optimize(block, x)(x)
        with without(COMMUTE, MERGE):
            apart = optimize(block, x)(x)
    different = int((merged != apart).sum())
    return Row(
        "merge_siblings_bits", "Merging sibling 1x1 convolutions changes no bit of the result.", PACKAGE, 0.0,
        float(different), "values that differ", context.command("engine"), CONFIRMED if not different else REFUTED,
        f"{merged.numel():,} values of v3's Mixed_6b compared",
    )  # fmt: skip


def _convolutions(context: Context) -> list[Row]:
    rows = []
    for name in list(SIBLINGS)[: 1 if context.quick else None]:
        context.say(f"engine: counting the convolutions of {name}")
        model: Any = create_model(name).eval()
        size = model.data_config.input_size
        # The graph is the same for every backend, and "torch" packs no weights.
        counts = optimize(model, torch.zeros(1, *size), backend="torch").report().counts
        before, after = SIBLINGS[name]
        claim = f"The engine runs {name} with {after} convolutions in place of {before}."
        measured = counts["convolutions"]
        verdict = CONFIRMED if (counts["convolutions_before"], measured) == (before, after) else DIFFERS
        note = f"{counts['convolutions_before']} as written"
        rows.append(
            Row(f"convolutions_{name}", claim, PACKAGE, float(after), float(measured), "convolutions",
                context.command("engine"), verdict, note,
                {"before": counts["convolutions_before"], "after": measured})
        )  # fmt: skip
    return rows
