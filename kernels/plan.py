"""A whole network as data: buffers and steps, in execution order, for one batch size. A backend compiles and runs it.

Activations are float32 or bfloat16, NHWC. A `Buffer` is [n, h, w, c] with c the channels of one pixel; a `View` is a
range of those channels, so a concatenation is one buffer that several steps write into. Weights are float32 NumPy
arrays, BN already folded into `scale` and `shift`, never into the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .spec import ITEM_BYTES, ConvSpec, PoolSpec

ALIGNMENT = 64  # bytes; every arena buffer starts on a cache line


@dataclass(frozen=True)
class Buffer:
    """[n, h, w, c] of dtype "float32" or "bfloat16".

    kind "arena": `position` is a byte offset; "output": the position among the call's outputs; "input": the position
    among the call's inputs, usable only where the caller hands a dense NHWC tensor of this dtype. Any other input
    enters through an `ImportStep`. "local": the intermediate of one fused pair, in the threads' own memory; `position`
    tells them apart.
    """

    n: int
    h: int
    w: int
    c: int
    kind: str
    position: int
    dtype: str = "float32"

    @property
    def bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * self.n * self.h * self.w * self.c


@dataclass(frozen=True)
class View:
    """Channels [offset, offset + channels) of the buffer with index `buffer`."""

    buffer: int
    offset: int
    channels: int


@dataclass(frozen=True)
class Output:
    """Where the next `view.channels` output channels of a convolution go, and whether they pass a ReLU."""

    view: View
    relu: bool


@dataclass(frozen=True)
class ImportStep:
    """y = scale * x + shift per channel, from input number `source`: [n, c, h, w] of any strides, float32, bfloat16 or
    uint8.
    """

    name: str
    source: int
    y: View
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None


@dataclass(frozen=True)
class ConvStep:
    """`ConvSpec`'s formula: the weights are rounded to x's dtype, sums are float32, y is rounded once.

    Consecutive column ranges go to `outputs`; a residual is allowed with exactly one output. A linear layer is a 1x1
    convolution of a 1x1 map. `spec.relu` is not read here: each output has its own. `tile`: outputs of a tile of
    Winograd's algorithm along h and w, which rounds otherwise; (0, 0) is the direct sum. Weights may be a tuple of
    arrays that follow each other along oc, as merged siblings' do, so that nobody needs to join them in a copy.
    """

    name: str
    spec: ConvSpec
    x: View
    weight: np.ndarray | tuple[np.ndarray, ...]  # [oc, c / groups, kh, kw]
    scale: np.ndarray  # [oc]
    shift: np.ndarray  # [oc]
    outputs: tuple[Output, ...]
    residual: View | None = None
    residual_scale: float = 1.0
    tile: tuple[int, int] = (0, 0)

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        return self.weight if isinstance(self.weight, tuple) else (self.weight,)

    @property
    def whole(self) -> np.ndarray:
        """The weights in one dense array, which is made now where they are none."""
        return np.ascontiguousarray(self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts))


@dataclass(frozen=True)
class PairStep:
    """An asymmetric pair ("chain": second reads first's only output) or a parallel split ("split": both read x).

    A chain whose intermediate is a buffer of kind "local" runs as one fused kernel. The second convolution then has
    kernel 1, stride 1 and no padding along the height or along the width.
    """

    name: str
    kind: str
    first: ConvStep
    second: ConvStep


@dataclass(frozen=True)
class PoolStep:
    """y = act(pool(x) + shift). Global average pooling is an average whose kernel is the map."""

    name: str
    spec: PoolSpec
    x: View
    y: View
    shift: np.ndarray | None = None
    relu: bool = False


@dataclass(frozen=True)
class EltwiseStep:
    """y = act(residual + residual_scale * (scale * x + shift)), each part optional. With none of them it is a copy."""

    name: str
    x: View
    y: View
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    relu: bool = False
    residual: View | None = None
    residual_scale: float = 1.0


@dataclass(frozen=True)
class LrnStep:
    """Local response normalisation: y = x / (k + alpha / size * sum of x^2 over `size` channels) ** beta."""

    name: str
    x: View
    y: View
    size: int
    alpha: float
    beta: float
    k: float


@dataclass(frozen=True)
class NormalizeStep:
    """y = x / max(||x||_2, eps), the norm over a pixel's channels."""

    name: str
    x: View
    y: View
    eps: float


Step = ImportStep | ConvStep | PairStep | PoolStep | EltwiseStep | LrnStep | NormalizeStep


@dataclass(frozen=True)
class Plan:
    """Steps in execution order over `buffers`. `inputs` are the logical [n, c, h, w] shapes that a call hands over.

    `images`: how many images each step runs at a time, empty where all run all. Each number divides the next one, the
    last one the batch, and a step runs whenever its images have come together: loops within loops, the first steps'
    innermost. Inputs and outputs have the batch, another buffer the most images that a step holds in it at a time.
    """

    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    inputs: tuple[tuple[int, int, int, int], ...]
    arena_bytes: int
    images: tuple[int, ...] = ()

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        found = sorted((b for b in self.buffers if b.kind == "output"), key=lambda b: b.position)
        return tuple(found)
