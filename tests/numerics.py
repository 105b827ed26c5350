"""Every tolerance of the tests, each with the sentence that derives it, and the draws that go with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# A float32 sum of K products in blocked order errs by about sqrt(log K) units of 2^-24 = 6e-8 relative to the norm of
# y: 0.7e-7 to 2.4e-7 measured over every Inception shape. Twice the worst, so that TF32 (3e-4) or one dropped tap
# (1e-2) cannot hide.
FP32_REL_L2 = 5e-7
# The worst single element of the same runs was 3.8e-7 of max|y|.
FP32_MAX = 1e-6
# One rounding to p significant bits of mantissas spread evenly in the logarithm errs by 2^-p * 0.43 in the root mean
# square: 1.66e-3 for bfloat16 (p = 8) and 2.08e-4 for float16 (p = 11). About 5 % on top; a second rounding costs 41 %.
BF16_REL_L2 = 1.75e-3
FP16_REL_L2 = 2.2e-4
# The worst element of one rounding is off by half a unit in the last place of the largest binade, 2^-p of max|y|, plus
# the float32 part.
BF16_MAX = 2**-8 + FP32_MAX
FP16_MAX = 2**-11 + FP32_MAX
# Cutting off at p = 8 bits errs by up to a whole unit, evenly: 2^-7 * 0.43 in the root mean square where rounding to
# nearest has 2^-8 * 0.43. Triton's interpreter stores bfloat16 so; hardware rounds.
BF16_CUT_REL_L2 = 2 * BF16_REL_L2
# float64 against float64 differs only by the order of the sum: sqrt(K) * 2^-53 with K <= 2^16 is 3e-14.
FP64_REL_L2 = 1e-13
FP64_MAX = 1e-12
# A float32 gradient is two float32 sums in a row (output to intermediate, intermediate to input): twice the forward
# budget.
GRAD_REL_L2 = 1e-6
# Where the sums of a float32 gradient cancel, two orders of the same sum err alike but not equally: by less than twice
# of each other.
CANCELLING = 2
# In front of batch norm a gradient cancels. `cancelling.budgets` moves all that float32 sums and stores by FP32_REL_L2,
# so many times, and allows the most that the gradient moved.
MOVES = 8
# A mean that is corrected once errs by the rounding of the result, 2^-24 of it: that of a tile, and one for each level
# in which means are merged; three in a row.
MEAN_MAX = 3 * 2**-24
# Two bfloat16 trainings of a three-layer net that round activations and gradients at other places: a dozen roundings
# of 1.66e-3 add in squares on either side, and sums over few pixels cancel a factor of three.
BF16_TRAINING_REL_L2 = 2e-2
# The variance of values whose mean is 1000 deviations away: a block's mean errs by some units of 2^-24 of it, 1e-4
# deviations, and meets the tenth of a deviation by which the means of blocks differ.
FAR_VARIANCE_REL_L2 = 1e-5

REL_L2 = {
    torch.float64: FP64_REL_L2,
    torch.float32: FP32_REL_L2,
    torch.bfloat16: BF16_REL_L2,
    torch.float16: FP16_REL_L2,
}
MAX = {torch.float64: FP64_MAX, torch.float32: FP32_MAX, torch.bfloat16: BF16_MAX, torch.float16: FP16_MAX}


def rel_l2(y: Tensor, expected: Tensor) -> float:
    """||y - expected|| / ||expected|| in float64."""
    wanted = expected.to(torch.float64)
    return ((y.to(torch.float64) - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


def max_error(y: Tensor, expected: Tensor) -> float:
    """max|y - expected| / max|expected| in float64."""
    wanted = expected.to(torch.float64)
    return ((y.to(torch.float64) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300)).item()


def assert_close_budget(y: Tensor, expected: Tensor, dtype: torch.dtype | None = None, roundings: int = 1) -> None:
    """Fails when y leaves the budget of `dtype` (default: y's own) round the float64 `expected`.

    `roundings`: how many times an activation is rounded on the way; independent rounding errors add in squares.
    """
    assert y.shape == expected.shape, f"shape {tuple(y.shape)}, expected {tuple(expected.shape)}"
    assert expected.abs().max() > 0, "a vacuous comparison: everything expected is zero"
    dtype = dtype or y.dtype
    norm, worst = rel_l2(y, expected), max_error(y, expected)
    allowed = REL_L2[dtype] * roundings**0.5
    assert norm <= allowed, f"relative L2 error {norm:.3g} over the {dtype} budget {allowed:.3g}"
    allowed = MAX[dtype] * roundings
    assert worst <= allowed, f"maximal error {worst:.3g} of max|y| over the {dtype} budget {allowed:.3g}"


def assert_close_gradient(gradient: Tensor | None, expected: Tensor | None) -> None:
    """Fails when a float32 gradient leaves its budget round the float64 one."""
    assert gradient is not None and expected is not None, "no gradient arrived"
    assert gradient.shape == expected.shape and expected.abs().max() > 0
    assert rel_l2(gradient, expected) <= GRAD_REL_L2, f"gradient error {rel_l2(gradient, expected):.3g}"


def assert_exact(y: Tensor, expected: Tensor) -> None:
    """Fails unless every element is equal to `expected`, of which some must be positive."""
    assert y.shape == expected.shape, f"shape {tuple(y.shape)}, expected {tuple(expected.shape)}"
    assert expected.abs().max() > 0, "a vacuous comparison: everything expected is zero"
    differing = int((y.to(torch.float64) != expected.to(torch.float64)).sum())
    assert differing == 0, f"{differing} of {y.numel()} elements differ"


def differences(y: Tensor, expected: Tensor) -> str:
    """Where and how y is not exactly `expected`, enough to find the cause without the machine; empty where it is."""
    if y.shape != expected.shape:
        return f"shape {tuple(y.shape)}, expected {tuple(expected.shape)}"
    mine, wanted = y.to(torch.float64), expected.to(torch.float64)
    places = (mine != wanted).nonzero()  # a NaN differs from everything
    if not len(places):
        return ""
    first = [tuple(place.tolist()) for place in places[:6]]
    values = ", ".join(f"{place} is {mine[place].item():g} for {wanted[place].item():g}" for place in first)
    spans = ", ".join(
        f"{len(axis.unique())} of {size} in {axis.min().item()}..{axis.max().item()}"
        for axis, size in zip(places.unbind(1), y.shape, strict=True)
    )
    return f"{len(places)} of {y.numel()} differ, {int(mine.isnan().sum())} are NaN; by axis {spans}; {values}"


def random(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, low: float = -1.0, high: float = 1.0
) -> Tensor:
    """Uniform in [low, high), the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(dtype)


def integers(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, limit: int = 1, density: float = 1.0
) -> Tensor:
    """Whole numbers in [-limit, limit], a share of 1 - `density` set to zero.

    A sum of K products of draws limited by a and b stays exact in float32 in any order while K * a * b <= 2^24; the
    caller chooses limits so that the rounded result is whole and at most 2^p too.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-limit, limit + 1, shape, generator=generator)
    kept = torch.rand(*shape, generator=generator) < density
    return (values * kept).to(dtype)


def powers_of_two(*shape: int, seed: int = 0, exponents: tuple[int, int] = (-2, 0)) -> Tensor:
    """float32 powers of two: scaling by them never rounds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.randint(exponents[0], exponents[1] + 1, shape, generator=generator).to(torch.float32))


def guarded(x: Tensor, margin: int = 64) -> tuple[Tensor, Tensor]:
    """A copy of x, strides kept, in the middle of a NaN-filled block, and that block.

    A read outside the copy turns the result into NaN; a write there is found by `assert_guarded`.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    block = torch.full((extent + 2 * margin,), float("nan"), dtype=x.dtype)
    inside = block.as_strided(x.shape, x.stride(), margin)
    inside.copy_(x)
    return inside, block


def assert_guarded(block: Tensor, margin: int = 64) -> None:
    """Fails when one of the two guard bands of `guarded` was written to."""
    assert block[:margin].isnan().all() and block[-margin:].isnan().all(), "a guard band was overwritten"


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every `torch.empty` inside holds NaN, so that an element nobody writes is seen."""
    was_on, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)
        torch.utils.deterministic.fill_uninitialized_memory = fill


# Layouts under which every op must give the same numbers.
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted")


def as_layout(x: Tensor, layout: str) -> Tensor:
    """x's values under a layout: "sliced" is every second column of a wider tensor, "permuted" a transposed map."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        n, c, h, w = x.shape
        wide = torch.full((n, c + 1, h, 2 * w), float("nan"), dtype=x.dtype)
        wide[:, 1:, :, ::2] = x
        return wide[:, 1:, :, ::2]
    if layout == "permuted":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x.contiguous()


# A whole network in float32, normalisation folded, against the same network layer by layer: the errors of up to 250
# layers that each stay within FP32_MAX add in squares, 250^0.5 * 6e-7.
NET_MAX = 1e-5
# A rewrite in float64 reorders sums of up to 2^15 products in up to 250 layers: 250^0.5 * FP64_REL_L2 / 2.
REWRITE_MAX = 1e-12
# Features of the FID network are means of 64 positive values out of 94 such layers: the same budget as the logits'.
FEATURES_MAX = NET_MAX
# In bfloat16 each of those layers rounds once, and independent errors add in squares: 94^0.5 * BF16_REL_L2.
BF16_FEATURES = 94**0.5 * BF16_REL_L2
# FID from the same float64 statistics: eigenvalues of S1 S2 by a general solver err by sqrt(width) * 2^-53 of the
# largest one, and a root makes 1e-15 of a small one 3e-8 of it; the traces cancel a further digit or two.
FID_REL = 1e-6
# KID and the Inception score in float64 differ by the order of sums of up to 1e4 terms, 1e-14, of which KID's
# difference of near-equal means cancels up to four digits.
SCORE_REL = 1e-9
# The same scores from two float32 nets whose features differ by 1e-6: KID multiplies differences by three (its
# kernel is a cube) and cancels two digits of near-equal means.
NET_SCORE_REL = 1e-3
# A whole network in bfloat16: up to 250 layers' roundings add in squares, 250^0.5 * BF16_REL_L2.
NET_BF16_REL_L2 = 2.8e-2
# One rounding to 8 bits is off by at most half a unit of the last place, 2^-9 of each value: whatever the values are.
BF16_ROUNDING = 2**-9 + FP32_REL_L2
# FID end to end, from files through two float32 nets whose features differ by 3e-7 in the worst element: 4e-7 of FID,
# and as much again for another order of sums on another machine.
NET_FID_REL = 1e-6
# A gradient through batch norm in training mode, by XLA against op by op, over 32 values a channel: differences of
# nearly equal means cancel two digits of the 1e-6 of a float32 sum.
XLA_GRADIENT_MAX = 1e-4

# Winograd's algorithm sums terms larger than their sum: of inputs and weights that are independent and of one size,
# each term A[i,p] (G w)[p] (B' x)[p] has the root mean square |A[i,p]| ||G[p]|| ||B[p]||, and the sum of r products has
# r^0.5. The root of the terms' summed squares over that is how much the error of a sum grows along an axis; along two
# axes it grows twice. By outputs and taps of an axis, root mean square over the outputs and the largest
# (test_winograd_transforms computes both).
WINOGRAD_GROWTH = {
    (1, 1): (1.0, 1.0),
    (2, 3): (1.30, 1.30),
    (4, 3): (2.28, 2.97),
    (6, 3): (4.55, 6.81),
    (2, 5): (2.39, 2.54),
    (4, 5): (4.37, 5.46),
    (4, 7): (10.5, 15.1),
    (6, 7): (24.2, 39.4),
}
# Logits of a whole network: the errors of its layers add in squares as in NET_MAX, each grown as above. On images of 75
# pixels that is 4.0 in the root mean square over v3's convolutions and 2.5 over Inception-ResNet-v2's; on those of 299,
# where more layers take larger tiles, up to 18 (v4).
NET_WINOGRAD_MAX = 4 * NET_MAX


def winograd_budget(kernel: tuple[int, int], tile: tuple[int, int]) -> tuple[float, float]:
    """L2 error and maximal error that a float32 convolution by these tiles may have, relative to r^0.5 of its terms.

    That is the root of the convolution of the operands' squares (`Conv.terms`), and the norm of y where products are
    independent. Where they cancel y is smaller, and the error is not.
    """
    (mean_h, worst_h), (mean_w, worst_w) = (WINOGRAD_GROWTH[axis] for axis in zip(tile, kernel, strict=True))
    return FP32_REL_L2 * mean_h * mean_w, FP32_MAX * worst_h * worst_w
