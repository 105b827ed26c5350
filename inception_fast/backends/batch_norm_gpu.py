"""Batch norm in training with its ReLU on a GPU: the Triton kernels for float32, float16 and bfloat16 maps in
channels_last, behind a convolution of torch's (cuDNN) or behind ours, which leaves the statistics as it stores.

x, z and y [n, c, h, w]; weight, bias and the statistics float32 [c]; `var` is divided by the count. The gradients of
the convolution are torch's (cuDNN). Everything goes to the current stream of the map's device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.spec import ConvSpec
from ..kernels.triton import convolve, norms
from ..kernels.triton.convolve import Part
from ..kernels.triton.launch import Launch, Map, dense, interpreting
from . import triton_gpu
from .pitch import pixel_pitch

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
# Up to so many products a result, statistics in the epilogue save more than a plain Triton convolution loses to cuDNN:
# one reading of z, 2 bytes at 4.3 TB/s, against 2 * products FLOP at 350 in place of 440 TFLOP/s. A model; not yet
# measured on hardware.
PRODUCTS = 384
LEAST_CHANNELS = 16  # fewer waste the kernel's step over channels

Statistics = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def reasons(x: Tensor) -> list[str]:
    """Why the kernels cannot take the map x; empty when they can."""
    found = [] if x.dtype in DTYPES else [f"dtype {x.dtype}; the GPU kernels take float32, float16 and bfloat16"]
    if not x.is_contiguous(memory_format=torch.channels_last):
        found.append("a map that is not in channels_last")
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < triton_gpu.OLDEST:
        found.append(f"GPU of compute capability {torch.cuda.get_device_capability(x.device)}; allowed: 8.0 and up")
    if not x.is_cuda and not interpreting():
        found.append(f"a map on {x.device}")
    return found


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, memory_format: torch.memory_format) -> Three:
    """(y, mean, var) with y = relu(weight * (x - mean) / sqrt(var + eps) + bias)."""
    source = _map(x)
    launches, parts = norms.statistics(source)
    return _normalised(x, launches, parts, weight, bias, eps, memory_format)


def convolved(
    x: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, z, mean, var) with z = conv(x, kernel), y and the statistics as above; z in channels_last."""
    spec = conv_spec(x, kernel, stride, padding)
    if not statistics_in_epilogue(spec):
        z = torch.ops.aten.convolution(x, kernel, None, stride, padding, [1, 1], False, [0, 0], 1)
        z = z.contiguous(memory_format=torch.channels_last)
        y, mean, var = forward(z, weight, bias, eps, torch.channels_last)
        return y, z, mean, var
    shape = (spec.n, spec.oc, spec.oh, spec.ow)
    z = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    with _on(x):
        packed = convolve.pack([Part(kernel, None, None, (padding[0], padding[1]), False)], x.dtype, x.device)
        config = triton_gpu.chooser(x.device)(spec)
        launches, parts = norms.conv_with_statistics("conv", spec, triton_gpu.nhwc(x), packed, _map(z), config)
        y, mean, var = _normalised(z, launches, parts, weight, bias, eps, torch.channels_last)
    return y, z, mean, var


def statistics_in_epilogue(spec: ConvSpec) -> bool:
    """Whether our convolution, which leaves its statistics, goes before cuDNN's and a reading of its result."""
    products = spec.kh * spec.kw * spec.c
    return spec.dtype != "float32" and LEAST_CHANNELS <= spec.c and products <= PRODUCTS


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics, eps: float) -> Three:
    """Gradients of x (laid out as x), weight and bias."""
    pitch = pixel_pitch(grad)
    if pitch is None or grad.dtype is not x.dtype:
        grad, pitch = grad.to(x.dtype).contiguous(memory_format=torch.channels_last), x.shape[1]
    dx = torch.empty_like(x)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    of = norms.Norm(*(value.contiguous() for value in (weight, bias, *statistics)))
    with _on(x):
        _run(norms.backward(_map(grad, pitch), _map(x), of, eps, _map(dx), dweight, dbias))
    return dx, dweight, dbias


def conv_spec(x: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int]) -> ConvSpec:
    """A convolution without epilogue, padded by (vertical, horizontal)."""
    (n, c, h, w), (oc, _, kh, kw) = x.shape, kernel.shape
    sides = (padding[0], padding[0], padding[1], padding[1])
    dtype = str(x.dtype).removeprefix("torch.")
    return ConvSpec(n, h, w, c, oc, kh, kw, (stride[0], stride[1]), sides, relu=False, dtype=dtype)


def _normalised(
    z: Tensor,
    launches: list[Launch],
    parts: norms.Parts,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    memory_format: torch.memory_format,
) -> Three:
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device, memory_format=memory_format)
    merges, both = norms.merged(parts, _map(z).rows, moments=True)
    mean, var = both[0], both[1]
    with _on(z):
        _run([*launches, *merges, *norms.forward(_map(z), _map(y), _norm(weight, bias, mean, var), eps)])
    return y, mean.clone(), var.clone()  # results of an operator share no memory


def _norm(*values: Tensor) -> norms.Norm:
    return norms.Norm(*(value.contiguous() for value in values))


def _map(x: Tensor, pitch: int | None = None) -> Map:
    """x [n, c, h, w], channels side by side, as its memory has it."""
    n, c, h, w = x.shape
    if pitch is None:
        return dense(x.permute(0, 2, 3, 1))
    reach = (n * h * w - 1) * pitch + c
    return Map(x.as_strided((reach,), (1,)), n, h, w, c, pitch)


def _run(launches: Sequence[Launch]) -> None:
    for one in launches:
        one.run()


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
