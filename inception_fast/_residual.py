"""A residual block whose 1x1 convolution, sum and ReLU are one operation of inference on the CPU, else torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _inferred_layer, _trained_layer, ops
from ._block_graph import ResidualForm
from ._checks import is_strided, not_scripted
from ._fold import Fold
from ._plain import fusable, has_hooks

DTYPES = (torch.float32, torch.bfloat16)


class ResidualSum(nn.Module):
    """y = act(x + scale * conv(concat(branches(x)))), act = ReLU or the identity: [n, c, h, w] -> [n, c, h, w].

    `replace_layers` makes blocks of that form such in place. torch's own operations in training, under autocast,
    compiled or watched, and elsewhere than on the CPU.
    """

    scale: float
    _form: ResidualForm
    _fold: Fold
    _unit: tuple[nn.BatchNorm2d]
    __prepare_scriptable__ = not_scripted

    @staticmethod
    def take(block: nn.Module, form: ResidualForm) -> None:
        """Makes the block itself one of these."""
        layer: Any = block
        layer.__class__ = ResidualSum
        layer._form, layer._fold = form, Fold()
        # A convolution's bias is the shift of this. In a tuple, for it is no child of the block.
        channels = getattr(layer, form.conv).out_channels
        layer._unit = (nn.BatchNorm2d(channels, eps=0.0, affine=False).eval(),)

    def forward(self, x: Tensor) -> Tensor:
        form = self._form
        joined = torch.cat([getattr(self, name)(x) for name in form.branches], 1)
        conv, relu = getattr(self, form.conv), getattr(self, form.relu) if form.relu else F.relu
        if not torch.compiler.is_compiling() and not (form.relu and (type(relu) is not nn.ReLU or has_hooks(relu))):
            y = self._fused(x, joined, conv, form.relu is not None)
            if y is not None:
                return y
        y = x + self.scale * conv(joined)
        return y if form.relu is None else relu(y)

    def _fused(self, x: Tensor, joined: Tensor, conv: nn.Conv2d, relu: bool) -> Tensor | None:
        (unit,), fold, scale = self._unit, self._fold, self.scale
        if not (_inferred_layer.serves(joined) and _trained_layer.is_plain(x) and is_strided(x)):
            return None
        if not (x.dtype is joined.dtype and x.dtype in DTYPES and type(scale) in (int, float) and fusable(conv, unit)):
            return None
        weight = conv.weight
        if weight.dtype is not x.dtype or weight.shape != (unit.num_features, joined.shape[1], 1, 1):
            return None
        if x.shape != (joined.shape[0], unit.num_features, *joined.shape[2:]) or 0 in x.shape:
            return None
        if conv.stride != (1, 1) or conv.padding != (0, 0):
            return None
        tail = _inferred_layer.Tail(x, relu, float(scale))
        parts = ((conv, unit),)
        known = None if fold.memo is None else fold.memo.again(joined, parts, tail)
        if known is not None:
            return known
        rest: dict[str, Any] = {"relu": relu, "residual": x, "residual_scale": tail.scale}
        y = ops.conv_bn_relu(joined, weight, *fold(conv, unit), stride=1, padding=0, **rest)
        asked = _inferred_layer.conv_asked(joined, conv, unit, fold, tail)
        fold.memo = _inferred_layer.remember(fold.memo, joined, parts, asked, tail)
        return y
