"""The truth: every op in about ten slow lines, on logically NCHW tensors of any layout.

Computed in float64 and rounded once, to the dtype of `x`; pass float64 to see no rounding at all. Shares no code with
any kernel. Padding is (top, bottom, left, right). Differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

Pair = Sequence[int]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64)


def _per_channel(values: Tensor) -> Tensor:
    return _wide(values).reshape(1, -1, 1, 1)


def _windows(x: Tensor, kernel: Pair, stride: Pair, padding: Sequence[int], fill: float = 0.0) -> list[Tensor]:
    """One [n, c, oh, ow] tensor per tap, in row order: what that tap sees at each output position."""
    (kh, kw), (sh, sw), (top, bottom, left, right) = kernel, stride, padding
    n, c, h, w = x.shape
    padded = x.new_full((n, c, h + top + bottom, w + left + right), fill)
    padded[:, :, top : top + h, left : left + w] = x
    oh, ow = (padded.shape[2] - kh) // sh + 1, (padded.shape[3] - kw) // sw + 1
    taps = product(range(kh), range(kw))
    return [padded[:, :, i : i + sh * (oh - 1) + 1 : sh, j : j + sw * (ow - 1) + 1 : sw] for i, j in taps]


def _eltwise(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, residual: Tensor | None, residual_scale: float
) -> Tensor:
    y = y if scale is None else y * _per_channel(scale)
    y = y if shift is None else y + _per_channel(shift)
    y = y if residual is None else _wide(residual) + residual_scale * y
    return torch.relu(y) if relu else y


def _conv(x: Tensor, weight: Tensor, stride: Pair, padding: Sequence[int], groups: int = 1) -> Tensor:
    oc, cg, kh, kw = weight.shape
    grouped = _wide(weight).reshape(groups, oc // groups, cg, kh * kw)
    y = torch.zeros((), dtype=torch.float64, device=x.device)
    for tap, window in enumerate(_windows(_wide(x), (kh, kw), stride, padding)):
        n, _, oh, ow = window.shape
        part = torch.einsum("ngchw,goc->ngohw", window.reshape(n, groups, cg, oh, ow), grouped[..., tap])
        y = y + part.reshape(n, oc, oh, ow)
    return y


def conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    groups: int = 1,
    relu: bool = True,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
) -> Tensor:
    """y = act(residual + residual_scale * (scale * conv(x, w) + shift)); without a residual, act(scale * conv + shift).

    x [n, c, h, w], weight [oc, c / groups, kh, kw], scale and shift [oc], y and residual [n, oc, oh, ow].
    """
    y = _conv(x, weight, stride, padding, groups)
    return _eltwise(y, scale, shift, relu, residual, residual_scale).to(x.dtype)


def pair(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    w2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    kind: str = "chain",
    paddings: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Tensor:
    """Two stride-1 convolutions with scale, shift, ReLU. "chain": conv2(conv1(x)); "split": conv1(x) beside conv2(x).

    Padded SAME for odd kernels unless `paddings` says otherwise. A chain's intermediate is not rounded.
    """
    first, second = paddings or tuple((k.shape[2] // 2,) * 2 + (k.shape[3] // 2,) * 2 for k in (w1, w2))
    a = conv(_wide(x), w1, scale1, shift1, padding=first)
    b = conv(a if kind == "chain" else _wide(x), w2, scale2, shift2, padding=second)
    return (b if kind == "chain" else torch.cat((a, b), 1)).to(x.dtype)


def pool(
    x: Tensor,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    *,
    kind: str = "max",
    count_include_pad: bool = False,
    overhang: Pair = (0, 0),
    shift: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """y = act(pool(x) + shift). An average divides by the elements of the map in the window, plus its padding with
    `count_include_pad`; the overhang (bottom, right) is never counted.
    """
    top, bottom, left, right = padding
    reach = (top, bottom + overhang[0], left, right + overhang[1])
    fill = 0.0 if kind == "avg" else float("-inf")
    windows = torch.stack(_windows(_wide(x), kernel, stride, reach, fill))
    if kind == "max":
        y = windows.amax(0)
    else:
        ones = torch.ones_like(_wide(x))
        if count_include_pad:
            ones = torch.nn.functional.pad(ones, (left, right, top, bottom), value=1.0)
            reach = (0, overhang[0], 0, overhang[1])
        y = windows.sum(0) / torch.stack(_windows(ones, kernel, stride, reach)).sum(0)
    return _eltwise(y, None, shift, relu, None, 1.0).to(x.dtype)


def pool_project(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    kernel: Pair = (3, 3),
    stride: Pair = (1, 1),
    padding: Sequence[int] = (1, 1, 1, 1),
    count_include_pad: bool = False,
) -> Tensor:
    """y = relu(scale * conv1x1(avg_pool(x), weight) + shift), in the order written."""
    pooled = pool(_wide(x), kernel, stride, padding, kind="avg", count_include_pad=count_include_pad)
    return conv(pooled, weight, scale, shift).to(x.dtype)


def eltwise(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
) -> Tensor:
    """y = act(residual + residual_scale * (scale * x + shift)), each part optional."""
    return _eltwise(_wide(x), scale, shift, relu, residual, residual_scale).to(x.dtype)


def lrn(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """y = x / (k + alpha / size * sum of x^2 over `size` channels around each) ** beta, zeros beyond the ends."""
    squares = _wide(x).square()
    before, c = size // 2, x.shape[1]
    sums = [squares[:, max(0, i - before) : i - before + size].sum(1) for i in range(c)]
    return (_wide(x) / (k + alpha / size * torch.stack(sums, 1)) ** beta).to(x.dtype)


def normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """y = x / max(||x||_2, eps), the norm over the channels of a pixel."""
    norm = _wide(x).square().sum(1, keepdim=True).sqrt()
    return (_wide(x) / norm.clamp_min(eps)).to(x.dtype)


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """relu(weight * (x - mean) / sqrt(var + eps) + bias), and mean and var (divided by the count) of each channel."""
    values = _wide(x)
    mean = values.mean((0, 2, 3))
    centred = values - mean.reshape(1, -1, 1, 1)
    var = (centred * centred).mean((0, 2, 3))
    scale = _wide(weight) / (var + eps).sqrt()
    y = torch.relu(centred * scale.reshape(1, -1, 1, 1) + _per_channel(bias))
    return y.to(x.dtype), mean, var
