from collections.abc import Sequence

import numpy as np

CHUNK: int

_View = tuple[int, int, int]
_Output = tuple[int, int, int, bool]
_Conv = tuple[
    tuple[int, int, int, int, int, int, int],
    tuple[int, int],
    tuple[int, int, int, int],
    int,
    Sequence[np.ndarray],
    np.ndarray,
    np.ndarray,
]
_Input = tuple[int, str, tuple[int, int, int, int]]

def tiers() -> list[str]: ...
def peak(tier: str, dtype: str, seconds: float, /) -> float: ...
def handover() -> float: ...
def trim() -> None: ...
def leave_openmp() -> None: ...
def batch_norm_relu(
    tier: str,
    dtype: str,
    shape: tuple[int, int],
    x: int,
    parameters: tuple[int, int],
    eps: float,
    y: int,
    statistics: tuple[int, int],
    running: tuple[int, int, int],
    share: float,
    threads: int,
    /,
) -> None: ...
def batch_norm_relu_backward(
    tier: str,
    dtype: str,
    shape: tuple[int, int],
    x: int,
    parameters: tuple[int, int],
    eps: float,
    grad: int,
    grad_pitch: int,
    statistics: tuple[int, int],
    gradients: tuple[int, int, int],
    threads: int,
    /,
) -> None: ...
def conv_weight_gradient(
    tier: str,
    dtype: str,
    sizes: tuple[int, int, int, int, int, int, int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    tile: tuple[int, int],
    maps: tuple[tuple[int, int], tuple[int, int]],
    dw: int,
    threads: int,
    /,
) -> None: ...
def convolve_in_training(
    tier: str,
    dtype: str,
    sizes: tuple[int, int, int, int, int, int, int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    tile: tuple[int, int],
    maps: tuple[tuple[int, int], tuple[int, int]],
    weight: int,
    strides: tuple[int, int, int, int],
    threads: int,
    /,
) -> None: ...
def pool_in_training(
    tier: str,
    dtype: str,
    kind: str,
    backward: bool,
    sizes: tuple[int, int, int, int, int, int],
    window: tuple[int, int, int, int, int, int],
    map: tuple[int, int],
    y: int,
    taps: int,
    threads: int,
    /,
) -> None: ...
def rmsprop_update(
    parameters: Sequence[tuple[int, int, int, int, int]],
    rates: tuple[float, float, float, float, float],
    threads: int,
    /,
) -> None: ...

class Plan:
    def run(self, inputs: Sequence[_Input], outputs: Sequence[int], arena: int, threads: int, /) -> None: ...
    def run_timed(
        self, inputs: Sequence[_Input], outputs: Sequence[int], arena: int, threads: int, /
    ) -> list[float]: ...
    def run_shares(
        self, inputs: Sequence[_Input], outputs: Sequence[int], arena: int, threads: int, /
    ) -> list[float]: ...
    @property
    def tier(self) -> str: ...
    @property
    def packed_bytes(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...

class Builder:
    def __init__(self, tier: str, arena_bytes: int, /) -> None: ...
    def input(self, n: int, c: int, h: int, w: int, /) -> None: ...
    def buffer(self, n: int, h: int, w: int, c: int, kind: str, position: int, dtype: str, /) -> None: ...
    def step(self, name: str, images: int, /) -> None: ...
    def conv(
        self,
        *,
        sizes: tuple[int, int, int, int, int, int, int],
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        groups: int,
        x: _View,
        weights: Sequence[np.ndarray],
        scale: np.ndarray,
        shift: np.ndarray,
        outputs: Sequence[tuple[int, int, int, bool]],
        residual: _View | None,
        residual_scale: float,
        tile: tuple[int, int],
    ) -> None: ...
    def pair(
        self, first: _Conv, second: _Conv, x: _View, between: _View, between_relu: bool, outputs: Sequence[_Output], /
    ) -> None: ...
    def pool(
        self,
        sizes: tuple[int, int, int, int, int, int],
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        overhang: tuple[int, int],
        maximum: bool,
        count_include_pad: bool,
        x: _View,
        y: _View,
        shift: np.ndarray | None,
        relu: bool,
        /,
    ) -> None: ...
    def eltwise(
        self,
        x: _View,
        y: _View,
        scale: np.ndarray | None,
        shift: np.ndarray | None,
        relu: bool,
        residual: _View | None,
        residual_scale: float,
        /,
    ) -> None: ...
    def import_(self, source: int, y: _View, scale: np.ndarray | None, shift: np.ndarray | None, /) -> None: ...
    def lrn(self, x: _View, y: _View, size: int, alpha: float, beta: float, k: float, /) -> None: ...
    def normalize(self, x: _View, y: _View, eps: float, /) -> None: ...
    def build(self, like: Plan | None) -> Plan: ...
