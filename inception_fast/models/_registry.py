"""Names, options and weights: the one way in which models are made."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ._base import InceptionNet
from ._init import SkipInit, reset_parameters
from ._options import check, check_choice
from ._trunk import FeatureNet
from .inception_resnet import InceptionResnetV1, InceptionResnetV2
from .inception_v1 import InceptionV1
from .inception_v2 import InceptionV2
from .inception_v3 import InceptionV3
from .inception_v4 import InceptionV4

FAMILIES: dict[str, type[InceptionNet]] = {
    family.variant: family
    for family in (InceptionV1, InceptionV2, InceptionV3, InceptionV4, InceptionResnetV1, InceptionResnetV2)
}


def list_models(pattern: str | Sequence[str] | None = None) -> list[str]:
    """Sorted names of the variants, or of those that match a shell pattern (or one of several).

    >>> list_models("*resnet*")
    ['inception_resnet_v1', 'inception_resnet_v2']
    """
    patterns = ["*"] if pattern is None else [pattern] if isinstance(pattern, str) else list(pattern)
    return sorted(name for name in FAMILIES if any(fnmatchcase(name, p) for p in patterns))


def find_family(name: str, others: tuple[str, ...] = ()) -> type[InceptionNet]:
    """The class of a variant; ValueError, with the closest names, for an unknown one.

    `others` are names that the caller serves itself.
    """
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    allowed = [*list_models(), *others]
    close = difflib.get_close_matches(str(name).lower(), allowed, cutoff=0.5)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise ValueError(f"unknown model {name!r}{hint}; allowed: {', '.join(allowed)}")


def build(name: str, **options: Any) -> InceptionNet:
    """A net with random parameters, on the default device and in the default dtype."""
    family = find_family(name)
    allowed = [field.name for field in fields(family.options_class)]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    with SkipInit():
        net = family(**options)
    reset_parameters(net)
    return net


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    aux_logits: bool | None = None,
    convention: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Makes a variant, with random parameters or with those of a file.

    Args:
        num_classes: 1000 unless the weights or the variant say otherwise; 0 for pooled features.
        in_chans: 3 unless the weights say otherwise; weights for other images have their first convolution adapted.
        aux_logits: auxiliary heads; none unless the weights have them.
        convention: "tf" or "torch"; by default that of the weights, else that of the family (see its options).
        weights: a path or "hf:<repo>"; its layout is recognised.
        features_only: return the list of maps of `out_indices` (all five strides by default) and no logits.
        options: the family's own, such as `fid`, `classic`, `stem`, `widths`, `transform_input` or `conv_block`.

    Raises ValueError for an unknown name or value, TypeError for an unknown option.

    >>> create_model("inception_v3", num_classes=10).get_classifier()
    Linear(in_features=2048, out_features=10, bias=True)
    """
    asked = {"num_classes": num_classes, "in_chans": in_chans, "aux_logits": aux_logits, "convention": convention}
    options |= {key: value for key, value in asked.items() if value is not None}
    check_choice("features_only", features_only, (False, True))
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices={out_indices!r} without features_only; allowed: features_only=True")
    if features_only and options.get("aux_logits"):
        raise ValueError("aux_logits=True with features_only; allowed: False, there are no logits")
    if weights is None:
        net = build(name, **options)
    else:
        net = load(name, weights, options)
    return FeatureNet(net, net.feature_info, out_indices) if features_only else net


def load(name: str, weights: str | os.PathLike[str], options: dict[str, Any]) -> InceptionNet:
    """The net that the weights were trained in, changed as far as the caller asks."""
    from ..weights import resolve  # the readers cost an import that random nets do not need

    find_family(name)
    source = resolve(weights, name)
    held = source.options.get("in_chans", 3)
    net = build(name, **{**source.options, **options, "in_chans": held})
    source.load(net)
    if source.data_config is not None:
        h, w = source.data_config.input_size[1:]
        seen = f"the data config of {os.fspath(weights)}: images of {h}x{w} for {name}"
        check(min(h, w) >= net.smallest, seen, f"{net.smallest}x{net.smallest} or larger")
        net.set_data_config(source.data_config)
    net.adapt_in_chans(options.get("in_chans", held))
    return net
