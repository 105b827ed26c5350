"""The rewrites between capture and plan: exact in real arithmetic, each from a graph to how often it fired."""

from __future__ import annotations

from collections.abc import Callable

from .. import graph as ir
from .cleanup import drop_identity, flatten_concats, fold_flatten
from .epilogue import fold_affine, fold_input_affine, fold_relu, fold_residual, lone_relu
from .merge import commute_average_pool, merge_siblings
from .padding import fold_padding
from .pairs import form_chains, form_splits
from .recognise import find_lrn, find_normalize, gather_channels

Pass = Callable[[ir.Graph], int]

# The composites go first, while their chains are as torch wrote them.
PIPELINE: tuple[Pass, ...] = (
    drop_identity,
    gather_channels,
    find_lrn,
    find_normalize,
    fold_affine,
    fold_relu,
    fold_padding,
    fold_residual,
    fold_relu,
    lone_relu,
    fold_input_affine,
    fold_flatten,
    flatten_concats,
    commute_average_pool,
    merge_siblings,
    form_chains,
    form_splits,
    ir.prune,
)


def optimise(graph: ir.Graph) -> tuple[ir.Graph, dict[str, int]]:
    """A rewritten copy, and how often each pass fired."""
    result = graph.copy()
    fired: dict[str, int] = {}
    for rewrite in PIPELINE:
        fired[rewrite.__name__] = fired.get(rewrite.__name__, 0) + rewrite(result)
    return result, fired
