"""The fused pair's own source on the emulated device, against the float64 reference.

Small integers give exact float32 sums, and whole intermediates that its dtype holds, so results equal the reference
rounded once, bit for bit. x and y are slices among channels of NaN: what is read beside x or written beside y shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from emulated import KERNELS, MODES, EmulationError, Mode, build, spoilt
from emulated_pair import SOURCES, HopperPair, PairDevice, Shape, case
from native.mutants import Mutant
from numerics import assert_close_budget, assert_exact
from pair_mutants import MUTANTS

NARROW, NARROW_TWO, WIDE, WIDE_TWO = range(4)  # configurations: 3 or 4 warpgroups, one or two blocks a cluster
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> PairDevice:
    return PairDevice(build(tmp_path_factory.mktemp("pair"), SOURCES))


@pytest.fixture
def device(library: PairDevice) -> Iterator[PairDevice]:
    with library.memory():
        library.configure(Mode())
        yield library


def check_exact(device: PairDevice, shape: Shape, config: int, dtype: torch.dtype, blocks: int = 0) -> None:
    one = case(device, shape, dtype)
    device.launch(one.pair, dtype, config, blocks)
    assert_exact(one.result(), one.expected(dtype).to(dtype))
    beside = torch.cat([one.whole[..., :8], one.whole[..., -8:]])
    assert beside.isnan().all(), "channels beside y were written"


# What each line adds: the pairs of v3, with a warpgroup that has half of its channels or none; both orders; kernels of
# 3 and 5; channels that end inside a chunk of 32; two blocks that share weights, the last cluster with one image; a
# block that takes several images; the widest pair of v4.
EXACT = {
    "v3 128-128-192": (Shape(1, 128, 128, 192), NARROW, BF16),
    "v3 160-160-160, nx1 first": (Shape(1, 160, 160, 160, wide_first=False), NARROW, FP16),
    "v3 192-192-192": (Shape(1, 192, 192, 192), NARROW, BF16),
    "n of 3": (Shape(2, 32, 64, 48, 3), NARROW, BF16),
    "n of 5, nx1 first": (Shape(1, 32, 224, 64, 5, False), WIDE, FP16),
    "channels inside a chunk": (Shape(2, 40, 32, 16), NARROW, BF16),
    "no ReLU": (Shape(1, 32, 32, 32, relu=(False, False)), NARROW, FP16),
    "one ReLU": (Shape(1, 32, 32, 32, relu=(False, True)), NARROW, FP16),
    "two blocks and three images": (Shape(3, 32, 96, 80, wide_first=False), NARROW_TWO, BF16),
    "several images a block": (Shape(3, 32, 64, 16), NARROW, FP16),
    "v4 224-224-256": (Shape(1, 224, 224, 256), WIDE, BF16),
    "wide in two blocks": (Shape(2, 32, 32, 208), WIDE_TWO, BF16),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_on_integers(device: PairDevice, name: str) -> None:
    shape, config, dtype = EXACT[name]
    check_exact(device, shape, config, dtype, blocks=2)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("config", [NARROW, NARROW_TWO])
def test_no_order_of_events_changes_a_bit(device: PairDevice, mode: Mode, config: int) -> None:
    device.configure(mode)
    check_exact(device, Shape(3, 64, 64, 80), config, BF16, blocks=2)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("wide_first", [True, False])
def test_random_values_stay_within_the_budget(device: PairDevice, dtype: torch.dtype, wide_first: bool) -> None:
    one = case(device, Shape(1, 64, 64, 48, wide_first=wide_first), dtype, whole_numbers=False)
    device.launch(one.pair, dtype, NARROW)
    assert_close_budget(one.result(), one.expected(torch.float64), dtype, roundings=2)


def test_the_intermediate_is_rounded_once(device: PairDevice) -> None:
    """As in two convolutions: beside the reference whose intermediate is rounded to its dtype, one rounding is left."""
    one = case(device, Shape(1, 64, 64, 48), BF16, whole_numbers=False)
    device.launch(one.pair, BF16, NARROW)
    assert_close_budget(one.result(), one.expected(BF16), BF16, roundings=1)


def test_weights_do_not_wait_for_the_earlier_grid(device: PairDevice) -> None:
    """With programmatic launches they fill the ring meanwhile; that x and y do wait is checked at every access."""
    check_exact(device, Shape(1, 64, 32, 16), NARROW, BF16)
    assert device.lib.emulated_early_loads() == 2 * (2 + 1) * 7, "two passes over three chunks of seven taps"


def test_an_image_alone_and_in_a_batch_has_the_same_bits(device: PairDevice) -> None:
    batch = case(device, Shape(3, 32, 32, 32), FP16, whole_numbers=False)
    device.launch(batch.pair, FP16, NARROW_TWO)
    whole = batch.result().clone()
    batch.y.fill_(float("nan"))
    last = HopperPair.from_buffer_copy(batch.pair)
    last.x += 2 * 2 * 17 * 17 * last.x_pitch
    last.n = 1
    device.launch(last, FP16, NARROW)
    assert torch.equal(batch.result()[0], whole[2])


def test_what_does_not_fit_is_refused_in_words(device: PairDevice) -> None:
    sound = case(device, Shape(1, 32, 32, 32), BF16).pair
    assert device.reasons(sound) == []

    def said(config: int = NARROW, type: int = 0, **changes: int) -> str:
        spoilt = HopperPair.from_buffer_copy(sound)
        for name, value in changes.items():
            setattr(spoilt, name, value)
        return "\n".join(device.reasons(spoilt, config, type))

    assert said(h=8, w=8) == (
        "a map of 8x8; allowed: 17x17; at 8x8 two convolutions are the better form, since a tile of theirs spans "
        "several images"
    )
    assert said(h=35) == "a map of 35x17; allowed: 17x17"
    assert said(taps=3) == "taps 3; allowed: 7 to 7"
    assert said(mid=200) == "mid 200; allowed: multiples of 32 up to 192"
    assert said(mid=256, config=WIDE) == "mid 256; allowed: multiples of 32 up to 224"
    assert said(oc=208, y_pitch=208) == "oc 208; allowed: multiples of 16 up to 192"
    assert said(oc=208, y_pitch=208, config=WIDE) == ""
    assert said(c=36) == "c 36; allowed: multiples of 8 up to 1048576"
    assert said(x_pitch=24) == "pitch of x 24; allowed: multiples of 8 from its 32 channels to 2^24"
    assert said(w1=8) == "address 8 of w1; allowed: multiples of 16 that are not 0"
    assert said(n=0) == "n 0; allowed: 1 to 7430739"
    assert said(config=4) == "config 4; allowed: 0 to 3"
    assert said(type=2) == "type 2; allowed: 0 to 1"


def test_every_configuration_fits_a_multiprocessor(library: PairDevice) -> None:
    assert [(one.groups, one.cluster, one.middle) for one in library.configs] == [
        (3, 1, 192), (3, 2, 192), (4, 1, 224), (4, 2, 224)
    ]  # fmt: skip
    assert all(200_000 < one.shared_bytes <= 227 * 1024 for one in library.configs)


def right_in(device: PairDevice, mode: Mode) -> bool:
    with device.memory():
        device.configure(mode)
        one = case(device, Shape(2, 64, 96, 80), BF16)
        try:
            device.launch(one.pair, BF16, NARROW, blocks=1)
        except EmulationError:
            return False
        return torch.equal(one.result(), one.expected(BF16).to(BF16))


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory, library: PairDevice) -> Iterator[dict[Mutant, Future[Path]]]:
    """The library with each mistake, two compiled at a time."""
    sound = {file.name: file.read_text() for file in KERNELS.glob("pair*.*h")}

    def made(mutant: Mutant) -> Path:
        headers = {**sound, mutant.file: mutant.applied(sound[mutant.file])}
        return spoilt(tmp_path_factory.mktemp("mutant"), SOURCES, headers, "-DONE_INSTANCE")

    with ThreadPoolExecutor(2) as pool:
        yield {mutant: pool.submit(made, mutant) for mutant in MUTANTS}


def test_the_sound_kernel_passes_where_mutants_fail(library: PairDevice) -> None:
    assert all(right_in(library, mode) for mode in MODES)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutants: dict[Mutant, Future[Path]], mutant: Mutant) -> None:
    """In one of the modes the spoilt kernel has a fault or a wrong result."""
    spoilt = PairDevice(mutants[mutant].result())
    assert not all(right_in(spoilt, mode) for mode in MODES), f"{mutant.name}: right whatever comes first"
