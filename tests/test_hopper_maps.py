"""Every index map of the Hopper convolution, at the sizes that the networks have.

The schedule, the corners of tiles, the steps through K and the addresses of results come from the header that the
kernel itself includes; the copies by TMA and the products are NumPy, in float64, and the result is compared with the
reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from inception_fast.kernels import reference
from inception_fast.kernels.cuda import abi
from numpy.typing import NDArray

from conv_shapes import CONV_SHAPES, ConvShape
from kernel_maps import built, every_config, pointer
from numerics import FP64_MAX

Floats = NDArray[np.float64]
Integers = NDArray[np.int32]
HALO = 2  # `turns` of halo tiles, from here on
SHAPES = [shape for shape in CONV_SHAPES if shape.groups == 1 and shape.c % 8 == 0 and shape.oc % 8 == 0]


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return built(tmp_path_factory.mktemp("maps"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small products: a pool of threads would spend its time meeting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def configurations(maps: ctypes.CDLL) -> list[abi.Config]:
    """Those whose tiles are pixels of y, gathered tap by tap; halo tiles stand behind them."""
    configs = list(every_config(maps))
    plain = [one for one in configs if one.turns < HALO]
    assert configs[: len(plain)] == plain
    return plain


def described(shape: ConvShape, n: int, splits: int = 1) -> abi.Conv:
    """A convolution with three destinations in a made-up memory, where oc allows."""
    top, bottom, left, right = shape.padding
    oh = (shape.h + top + bottom - shape.kh) // shape.stride + 1
    ow = (shape.w + left + right - shape.kw) // shape.stride + 1
    conv = abi.Conv(
        x=1 << 20, weights=1 << 21, scale=1 << 22, shift=1 << 22, x_pitch=shape.c + 24, n=n, h=shape.h, w=shape.w,
        c=shape.c, oc=shape.oc, kh=shape.kh, kw=shape.kw, stride_h=shape.stride, stride_w=shape.stride, top=top,
        left=left, oh=oh, ow=ow, splits=splits,
    )  # fmt: skip
    parts = [8, shape.oc - 24, 16] if shape.oc > 24 else [shape.oc]
    conv.outputs, address = len(parts), 1 << 30
    for index, channels in enumerate(parts):
        conv.output[index] = abi.Output(address, channels + 8 * index, channels, index % 2)
        address += 1 << 32
    return conv


def tiles_of(maps: ctypes.CDLL, convs: Sequence[abi.Conv], config: int, cluster: int) -> Integers:
    group = (abi.Conv * len(convs))(*convs)
    units = maps.maps_tiles(group, len(convs), config, None, ctypes.c_int64(0))
    assert units == maps.hopper_conv_units(group, len(convs), config)
    rows = np.zeros((units * cluster, 9), np.int32)
    maps.maps_tiles(group, len(convs), config, pointer(rows), ctypes.c_int64(len(rows)))
    return rows


def walk(x_map: NDArray[np.int64], corner: Integers) -> tuple[NDArray[np.int64], ...]:
    """(n, h, w) of the windows that one im2col copy takes: along w, then h, then n, between the map's corners."""
    (_, width, height, _), steps = x_map[:4], x_map[12:16]
    lower_w, lower_h, upper_w, upper_h = x_map[16:20]
    wide, high = (width + upper_w - lower_w - 1) // steps[1] + 1, (height + upper_h - lower_h - 1) // steps[2] + 1
    n, h, w = map(int, corner)
    first = (n * high + (h - lower_h) // steps[2]) * wide + (w - lower_w) // steps[1]
    index = first + np.arange(x_map[21])
    return index // (wide * high), lower_h + index // wide % high * steps[2], lower_w + index % wide * steps[1]


def copied(x: Floats, windows: tuple[NDArray[np.int64], ...], tap: tuple[int, int], channels: slice) -> Floats:
    """[pixels, channels] at one tap, zero outside of the map and behind the last image."""
    n, h, w = windows[0], windows[1] + tap[0], windows[2] + tap[1]
    inside = (n < x.shape[0]) & (h >= 0) & (h < x.shape[1]) & (w >= 0) & (w < x.shape[2])
    found: Floats = x[np.where(inside, n, 0), np.where(inside, h, 0), np.where(inside, w, 0), channels]
    return found * inside[:, None]


def convolved(maps: ctypes.CDLL, conv: abi.Conv, config: int, cut: abi.Config, x: Floats, packed: Floats) -> Floats:
    """[pixels, oc] of sums, each tile by its own copies and steps; parts of K add up."""
    x_map, weight_map = np.zeros(22, np.int64), np.zeros(22, np.int64)
    maps.maps_of(ctypes.byref(conv), config, pointer(x_map), pointer(weight_map))
    assert list(x_map[:4]) == [conv.c, conv.w, conv.h, conv.n] and x_map[20] == cut.depth
    assert list(x_map[4:7]) == [2 * conv.x_pitch * size for size in (1, conv.w, conv.w * conv.h)]
    assert list(weight_map[8:11]) == [cut.depth, cut.columns // cut.cluster, 1]
    pixels = conv.n * conv.oh * conv.ow
    y: Floats = np.zeros((pixels, conv.oc))
    stages: dict[tuple[int, int, int], Floats] = {}  # the tiles of a row take the same copies of x
    for _, row, column, _, first, last, *corner in tiles_of(maps, [conv], config, cut.cluster):
        if row * cut.rows >= pixels:
            continue
        steps = np.zeros((last - first, 3), np.int32)
        maps.maps_steps(ctypes.byref(conv), config, int(first), int(last), pointer(steps))
        rows = slice(row * cut.rows, min((row + 1) * cut.rows, pixels))
        columns = slice(column * cut.columns, min((column + 1) * cut.columns, conv.oc))
        windows = tuple(axis[: rows.stop - rows.start] for axis in walk(x_map, np.array(corner, np.int32)))
        for tap, chunk, count in steps:
            channels = slice(chunk * cut.depth, chunk * cut.depth + min(16 * count, cut.depth))
            key = int(row), int(tap), int(chunk)
            if key not in stages:
                stages = stages if next(iter(stages), key)[0] == row else {}
                stages[key] = copied(x, windows, divmod(int(tap), conv.kw), channels)
            weights = np.ascontiguousarray(packed[tap, columns, channels])
            y[rows, columns] += (torch.from_numpy(stages[key]) @ torch.from_numpy(weights).T).numpy()
    return y


@pytest.mark.parametrize("part", range(8))
def test_every_convolution_of_the_networks(maps: ctypes.CDLL, part: int) -> None:
    """Each with another of the configurations, in one to three parts of K."""
    configs, random = configurations(maps), np.random.default_rng(part)
    for index, shape in list(enumerate(SHAPES))[part::8]:
        config = index * 37 % len(configs)  # 37 is prime to their number: all of them come up
        cut = configs[config]
        n = 1 if shape.h > 20 else 2
        iterations = shape.kh * shape.kw * -(-shape.c // cut.depth)
        conv = described(shape, n, 1 if cut.behind else min(1 + index % 3, iterations))
        x = random.integers(-3, 4, (n, shape.h, shape.w, shape.c)).astype(np.float64)
        weight = random.integers(-3, 4, (shape.oc, shape.c, shape.kh, shape.kw)).astype(np.float64)
        packed = weight.transpose(2, 3, 0, 1).reshape(-1, shape.oc, shape.c)
        y = convolved(maps, conv, config, cut, x, packed)
        wanted = reference.conv(
            torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(weight), stride=(shape.stride,) * 2,
            padding=shape.padding, relu=False,
        ).permute(0, 2, 3, 1).numpy().reshape(y.shape)  # fmt: skip
        assert np.abs(y - wanted).max() <= FP64_MAX * np.abs(wanted).max(), f"{shape} {config}"


@pytest.mark.parametrize("turns", [0, 1], ids=["tiles of 128", "tiles of 64"])
def test_products_of_padding_alone_are_too_few_to_skip(maps: ctypes.CDLL, turns: int) -> None:
    """All pixels of a tile see padding at a tap in 0.8 or 1.4 % of the products of all layers, at batch 1, where most
    are: the rest of a tile behind the last image is padding, too.
    """
    keys = [(one.turns, one.depth, one.cluster) for one in configurations(maps)]
    config = keys.index((turns, 64, 1))
    idle = total = 0.0
    for shape in SHAPES:
        conv, x_map, unused = described(shape, 1), np.zeros(22, np.int64), np.zeros(22, np.int64)
        maps.maps_of(ctypes.byref(conv), config, pointer(x_map), pointer(unused))
        corners = {tuple(row[6:]) for row in tiles_of(maps, [conv], config, 1)}
        total += len(corners) * shape.kh * shape.kw * shape.c * shape.oc
        for corner in corners if any(shape.padding) else ():
            n, h, w = (axis[:, None, None] for axis in walk(x_map, np.array(corner)))
            h, w = h + np.arange(shape.kh)[:, None], w + np.arange(shape.kw)
            inside = (n < 1) & (h >= 0) & (h < shape.h) & (w >= 0) & (w < shape.w)
            idle += np.count_nonzero(~inside.any(0)) * shape.c * shape.oc
    assert 0.005 < idle / total < 0.02


def test_four_images_of_8x8_share_their_weights(maps: ctypes.CDLL) -> None:
    """The 256 pixels are two blocks of a cluster, each of which loads half of the weights for both. As one block of 256
    rows they would be 64 tiles at batch 128, for 132 multiprocessors.
    """
    (shape,) = {one for one in SHAPES if (one.h, one.w, one.c, one.oc, one.kh, one.kw) == (8, 8, 384, 384, 1, 3)}
    keys = [(one.rows, one.columns, one.depth, one.cluster) for one in configurations(maps)]
    config, conv, weight_map = keys.index((128, 192, 64, 2)), described(shape, 128), np.zeros(22, np.int64)
    maps.maps_of(ctypes.byref(conv), config, pointer(np.zeros(22, np.int64)), pointer(weight_map))
    assert 2 * weight_map[9] == 192
    units = tiles_of(maps, [conv], config, 2).reshape(-1, 2, 9)
    assert (units[:, 0, 2] == units[:, 1, 2]).all(), "both blocks of a cluster have the same columns"
    first = sorted(map(tuple, units[:, :, 6].tolist()))
    assert first == sorted((n, n + 2) for n in range(0, 128, 4) for _ in range(2))
    assert units.shape[0] * 2 == 128


def test_all_configurations_occur(maps: ctypes.CDLL) -> None:
    count = len(configurations(maps))
    assert len({index * 37 % count for index in range(len(SHAPES))}) == count


def test_a_group_is_covered_once(maps: ctypes.CDLL) -> None:
    """Each tile and each part of K of every convolution is one unit's, and parts cover K without a gap."""
    chosen = [shape for shape in SHAPES if shape.h in (8, 17)]
    for config, cut in enumerate(configurations(maps)):
        shapes = [chosen[(config * 5 + i * 11) % len(chosen)] for i in range(config % 8 + 1)]
        convs = [described(shape, 1 + config % 3, 1 + (config + i) % 4) for i, shape in enumerate(shapes)]
        text = ctypes.create_string_buffer(1000)
        group = (abi.Conv * len(convs))(*convs)
        for conv in group:
            conv.splits = 1 if cut.behind else min(conv.splits, conv.kh * conv.kw * -(-conv.c // cut.depth))
        assert maps.hopper_conv_reasons(group, len(convs), 0, config, text, 1000) == 0, text.value
        seen = [tuple(row) for row in tiles_of(maps, list(group), config, cut.cluster)[:, :6]]
        expected = []
        for index, conv in enumerate(group):
            rows = -(-conv.n * conv.oh * conv.ow // cut.rows)
            k = conv.kh * conv.kw * -(-conv.c // cut.depth)
            for row in range(-(-rows // cut.cluster) * cut.cluster):
                for column in range(-(-conv.oc // cut.columns)):
                    edges = [k * split // conv.splits for split in range(conv.splits + 1)]
                    assert all(a < b for a, b in pairwise(edges))
                    expected += [(index, row, column, i, edges[i], edges[i + 1]) for i in range(conv.splits)]
        assert sorted(seen) == sorted(expected)


def test_every_element_has_its_own_place(maps: ctypes.CDLL) -> None:
    """Columns go to the output whose range they are in, 64-bit addresses apart."""
    shape = next(one for one in SHAPES if one.oc == 320 and one.h == 8)
    conv = described(shape, 5)
    pixels, columns = np.meshgrid(np.arange(5 * conv.oh * conv.ow), np.arange(conv.oc), indexing="ij")
    pixels, columns = (np.ascontiguousarray(axis.ravel(), np.int32) for axis in (pixels, columns))
    addresses, outputs = np.zeros(len(pixels), np.uint64), np.zeros(len(pixels), np.int32)
    maps.maps_addresses(
        ctypes.byref(conv), 0, ctypes.c_int64(len(pixels)), *map(pointer, (pixels, columns, addresses, outputs))
    )
    wanted, begin = np.zeros_like(addresses), 0
    for output in conv.output[: conv.outputs]:
        mine = (columns >= begin) & (columns < begin + output.channels)
        offsets = pixels[mine].astype(np.uint64) * np.uint64(output.pitch) + (columns[mine] - begin).astype(np.uint64)
        wanted[mine] = np.uint64(output.y) + np.uint64(2) * offsets
        begin += output.channels
    assert (addresses == wanted).all() and len(set(addresses.tolist())) == len(addresses)


def test_a_skipped_tile_leaves_the_ring_where_a_walked_one_does(maps: ctypes.CDLL) -> None:
    counts = np.random.default_rng(0).integers(1, 40, 300).astype(np.int32)
    for stages in range(2, 13):
        rows = np.zeros((len(counts), 4), np.int32)
        maps.maps_ring(stages, len(counts), pointer(counts), pointer(rows))
        assert (rows[:, :2] == rows[:, 2:]).all()


def test_a_tile_fits_a_multiprocessor(maps: ctypes.CDLL) -> None:
    """At least three stages, so that a copy and a product overlap, and no more memory than a block may have."""
    for cut in configurations(maps):
        assert cut.stages >= 3 and cut.shared_bytes <= 227 * 1024
        assert cut.shared_bytes >= 1024 + 2 * cut.depth * (cut.rows + cut.columns) * cut.stages + 16 * 1024
    for cut in every_config(maps):
        assert cut.shared_bytes <= 227 * 1024


def halo_tiles(maps: ctypes.CDLL, conv: abi.Conv, config: int, positions: int) -> tuple[Integers, Integers, Integers]:
    """(first row, rows, offset) of each tile, the pixel of each position, and (pitch, rows an image) of the map."""
    count = maps.maps_halo(ctypes.byref(conv), config, None, None, None)
    tiles, pixels = np.zeros((count, 3), np.int32), np.zeros((count, positions), np.int32)
    sizes = np.zeros(4, np.int32)
    maps.maps_halo(ctypes.byref(conv), config, pointer(tiles), pointer(pixels), pointer(sizes))
    return tiles, pixels, sizes


def padded_rows(x: Floats, conv: abi.Conv, first: int, count: int, pitch: int, image_rows: int) -> Floats:
    """[count * pitch, c]: what the copies of a tile's rows bring, zero outside of the maps."""
    rows = first + np.arange(count)
    image, h, w = rows // image_rows, rows % image_rows - conv.top, np.arange(pitch) - conv.left
    inside = ((image < conv.n) & (h >= 0) & (h < conv.h))[:, None] & (w >= 0) & (w < conv.w)
    image, h, w = np.clip(image, 0, conv.n - 1), np.clip(h, 0, conv.h - 1), np.clip(w, 0, conv.w - 1)
    return (x[image[:, None], h[:, None], w] * inside[..., None]).reshape(count * pitch, -1)


def test_every_halo_tile_sees_its_windows(maps: ctypes.CDLL) -> None:
    """All convolutions of the networks that halo tiles take, each with another of the configurations: a tap of a tile
    is the rows that it holds from another pixel on, and every pixel of y is stored once.
    """
    configs, random, seen = every_config(maps), np.random.default_rng(0), set()
    halo = [index for index, one in enumerate(configs) if one.turns >= HALO and not one.pooled]
    for index, shape in enumerate(SHAPES):
        config = halo[index % len(halo)]
        conv, cut = described(shape, 1 if shape.h > 20 else 3), configs[config]
        text = ctypes.create_string_buffer(1000)
        if maps.hopper_conv_reasons(ctypes.byref(conv), 1, 0, config, text, 1000):
            assert "halo tile" in text.value.decode()
            continue
        seen.add(config)
        c = min(shape.c, 8)  # rows of memory are the same for all channels
        x = random.integers(-3, 4, (conv.n, shape.h, shape.w, c)).astype(np.float64)
        weight = random.integers(-3, 4, (4, c, shape.kh, shape.kw)).astype(np.float64)
        tiles, pixels, (pitch, image_rows, x_bytes, stages) = halo_tiles(maps, conv, config, cut.rows)
        assert pitch * 2 * cut.depth % 128 == 0 and stages >= 2
        y: Floats = np.full((conv.n * conv.oh * conv.ow, 4), np.nan)
        for (first, count, offset), to in zip(tiles, pixels, strict=True):
            assert count * pitch * 2 * cut.depth <= x_bytes
            held = padded_rows(x, conv, first, count, pitch, image_rows)
            sums: Floats = np.zeros((cut.rows, 4))
            for tap in range(shape.kh * shape.kw):
                begin = offset + tap // shape.kw * pitch + tap % shape.kw
                assert begin + cut.rows <= len(held), "an operand stays inside of its rows"
                sums += held[begin : begin + cut.rows] @ weight[:, :, tap // shape.kw, tap % shape.kw].T
            assert np.isnan(y[to[to >= 0]]).all(), "no pixel is stored twice"
            y[to[to >= 0]] = sums[to >= 0]
        wanted = reference.conv(
            torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(weight), padding=shape.padding, relu=False
        ).permute(0, 2, 3, 1).numpy().reshape(y.shape)  # fmt: skip
        assert (y == wanted).all(), f"{shape} {cut.rows}x{cut.columns}"
    assert seen == set(halo)
