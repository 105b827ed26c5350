"""The emulated device itself: kernels with known results, and mistakes that it must notice."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from emulated import EARLY, HERE, LATE, MODES, Device, EmulationError, Mode, build
from numerics import integers

K = 256


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Device:
    return Device(build(tmp_path_factory.mktemp("tiny"), [HERE / "tiny.cpp"]))


@pytest.fixture
def device(library: Device) -> Iterator[Device]:
    with library.memory():
        library.configure(Mode())
        yield library


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def product(device: Device, mistake: int = 0, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether y = a * b^T of a pipeline with wgmma is exact; raises EmulationError on a fault."""
    a, b = device.like(integers(64, K, seed=1, dtype=dtype)), device.like(integers(48, K, seed=2, dtype=dtype))
    y = device.empty(64, 48, dtype=torch.float32)
    half = int(dtype == torch.float16)
    device.check(device.lib.tiny_product(address(a), address(b), address(y), K, half, mistake))
    return torch.equal(y, a.float() @ b.float().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_pipeline_is_exact_whatever_comes_first(device: Device, mode: Mode, dtype: torch.dtype) -> None:
    device.configure(mode)
    assert product(device, dtype=dtype)


# What each mistake of tiny.cpp looks like, a part of the fault's text or "" for a wrong result; and modes that see it.
DEADLOCK = "deadlock: no thread can run; CTA (0, 0, 0) threads 0..127 (128): mbarrier at shared offset"
MISTAKES = {
    1: ("a stage is read before it is there", "", {Mode(EARLY, EARLY), Mode(LATE, EARLY)}),
    2: ("a stage is overwritten while in use", "more than 1 arrivals in a phase", {Mode(LATE, LATE)}),
    3: ("the other phase", DEADLOCK, {Mode(LATE, LATE), Mode(EARLY, EARLY)}),
    4: ("too few bytes expected", DEADLOCK, set(MODES[:4])),
    5: ("too many bytes expected", DEADLOCK, set(MODES[:4])),
    6: ("no fence before products", "without wgmma_fence", set(MODES)),
    7: ("no commit", "ended with a wgmma that nobody waited for", set(MODES)),
    8: ("no wait for products", "ended with a wgmma that nobody waited for", set(MODES)),
    9: ("a stage let go while products read it", "", {Mode(EARLY, LATE), Mode(LATE, LATE)}),
    10: ("another swizzle than the map's", "", set(MODES)),
    11: ("barriers unknown to TMA", "was not fenced after its initialisation", set(MODES)),
    12: ("two arrivals for one", "deadlock", {Mode(LATE, LATE)}),
    13: ("a store behind y", "just outside of a block of global memory", set(MODES)),
    14: ("half a warpgroup at a barrier", "barrier 1, 64 of 128 threads there", set(MODES)),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda number: MISTAKES[number][0])
def test_mistake_is_noticed(device: Device, mistake: int) -> None:
    _, said, modes = MISTAKES[mistake]
    for mode in modes:
        device.configure(mode)
        if said:
            with pytest.raises(EmulationError) as error:
                product(device, mistake)
            assert said in str(error.value)
        else:
            assert not product(device, mistake)


def map_of(
    size: tuple[int, ...], box: tuple[int, ...], swizzle: int = 0, step: tuple[int, ...] = (),
    lower: tuple[int, int] = (0, 0), upper: tuple[int, int] = (0, 0), im2col: tuple[int, int] | None = None,
) -> list[int]:  # fmt: skip
    """The numbers of a dense tensor's map, innermost dimension first."""
    five = lambda values, rest: [*values, *[rest] * (5 - len(values))]  # noqa: E731
    strides = list(itertools.accumulate(size, lambda a, b: a * b, initial=2))[1:]
    kind = [len(size), int(im2col is not None), swizzle]
    walk = [*lower, *upper, *(im2col or (0, 0))]
    return [*kind, *five(size, 0), *five(strides[: len(size) - 1], 0)[:4], *five(box, 0), *five(step or (), 1), *walk]


def loaded(
    device: Device, x: Tensor, numbers: list[int], at: tuple[int, ...], count: int, tap: tuple[int, int] = (0, 0)
) -> Tensor:
    """What a load leaves in shared memory."""
    y = device.empty(count, dtype=torch.int16)
    fields = (ctypes.c_int64 * len(numbers))(*numbers)
    first = (ctypes.c_int * 5)(*at)
    device.check(device.lib.tiny_copy(address(x), fields, first, *tap, address(y), 2 * count))
    return y.clone()


def filled(device: Device, *shape: int) -> Tensor:
    return device.like(torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.int16).view(shape))


@pytest.mark.parametrize("at", [(0, 0, -1, 1, 0), (0, -2, 3, 0, 1), (4, 0, 0, 1, 1)])
def test_boxes_are_filled_up_with_zeros(device: Device, at: tuple[int, ...]) -> None:
    x = filled(device, 2, 2, 5, 4, 8)  # [n, plane, slow, fast, 8]
    box = (8, 4, 7, 2, 1)
    padded = np.pad(x.numpy(), [(8, 8)] * 5)
    corner = [8 + start for start in reversed(at)]
    want = padded[tuple(slice(c, c + extent) for c, extent in zip(corner, reversed(box), strict=True))]
    found = loaded(device, x, map_of((8, 4, 5, 2, 2), box), at, want.size)
    assert torch.equal(found, torch.from_numpy(want.copy()).flatten())


@pytest.mark.parametrize(("swizzle", "span"), [(1, 128), (2, 64), (3, 32)])
def test_swizzles_exchange_pieces_of_16_bytes(device: Device, swizzle: int, span: int) -> None:
    columns = span // 2
    x = filled(device, 16, columns)
    found = loaded(device, x, map_of((columns, 16), (columns, 16), swizzle), (0, 0), 16 * columns)
    want = torch.empty_like(found)
    for at in range(0, 16 * span, 16):
        to = at ^ ((at >> 7 & (span // 16 - 1)) << 4)
        want[to // 2 : to // 2 + 8] = x.flatten()[at // 2 : at // 2 + 8]
    assert torch.equal(found, want) and not torch.equal(found, x.flatten())


@pytest.mark.parametrize("stride", [1, 2])
def test_columns_walk_over_rows_and_images(device: Device, stride: int) -> None:
    """A 3x3 convolution's windows, padding 1, one tap: as im2col in NumPy lists them."""
    n, h, w, c, pixels = 2, 5, 7, 8, 16
    x = filled(device, n, h, w, c)
    padded = np.pad(x.numpy(), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = [(i, y, z) for i in range(n) for y in range(0, h, stride) for z in range(0, w, stride)]
    numbers = map_of((c, w, h, n), (), step=(1, stride, stride), lower=(-1, -1), upper=(-1, -1), im2col=(c, pixels))
    start = len(rows) - 10  # the last of these fall off the last image
    for tap in ((0, 0), (2, 1)):
        image, y, z = rows[start]
        found = loaded(device, x, numbers, (0, z - 1, y - 1, image, 0), pixels * c, tap)
        want = np.zeros((pixels, c), np.int16)
        for row, (i, down, right) in enumerate(rows[start : start + pixels]):
            want[row] = padded[i, down + tap[1], right + tap[0]]
        assert torch.equal(found, torch.from_numpy(want).flatten())


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (map_of((8, 4), (8, 300)), "box 300"),
        (map_of((12, 4), (8, 4)), "stride 24"),
        (map_of((64, 4), (32, 4), 1), "a row of 64 bytes under a swizzle of 128"),
        (map_of((64, 400), (64, 4)), "not inside of one block"),
        (map_of((8, 4, 4, 1), (), lower=(-300, 0), im2col=(8, 8)), "a corner outside"),
    ],
)
def test_maps_that_the_driver_would_refuse(device: Device, numbers: list[int], said: str) -> None:
    with pytest.raises(EmulationError, match=said):
        loaded(device, filled(device, 16, 64), numbers, (0, 0), 64)


def passed(device: Device, mistake: int = 0) -> bool:
    x, y = device.like(integers(32, 64, seed=3, dtype=torch.bfloat16)), device.empty(64, 64, dtype=torch.bfloat16)
    device.check(device.lib.tiny_pass(address(x), address(y), mistake))
    return torch.equal(y, torch.cat([x, x]))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_cluster_shares_loads_and_stores_matrices(device: Device, mode: Mode) -> None:
    device.configure(mode)
    assert passed(device)


def test_mistakes_of_a_cluster_are_noticed(device: Device) -> None:
    for mode in MODES:
        device.configure(mode)
        assert not passed(device, 1), "stores that nobody published"
        with pytest.raises(EmulationError, match="deadlock"):
            passed(device, 3)
    device.configure(Mode(LATE, LATE))
    with pytest.raises(EmulationError, match="TMA store that nobody waited for"):
        passed(device, 2)
    device.configure(Mode(EARLY, EARLY))
    assert not passed(device, 4), "half of the bytes expected"


def test_writes_beside_a_block_are_noticed(library: Device) -> None:
    with pytest.raises(AssertionError, match="1 blocks of memory were written beside"), library.memory():
        y = library.empty(3, dtype=torch.float32)
        ctypes.c_float.from_address(y.data_ptr() + 12).value = 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roundings_are_torchs(device: Device, dtype: torch.dtype) -> None:
    bits = torch.arange(0, 1 << 32, 65521, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    found = torch.empty(values.shape, dtype=torch.int16)
    device.lib.tiny_round(address(values), address(found), len(values), int(dtype == torch.float16))
    want = values.to(dtype)
    nan = want.isnan()
    assert torch.equal(found.view(dtype).isnan(), nan)
    assert torch.equal(found[~nan], want.view(torch.int16)[~nan])
