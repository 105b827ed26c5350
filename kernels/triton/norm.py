"""y = relu(weight * (x - mean) / sqrt(var + eps) + bias) over NHWC memory in training, and its gradients.

x, y, dx and grad [rows, c] with pitches of their own; weight, bias, mean, var, dweight, dbias float32 [c]. var is
divided by the count. All is computed in float32 and rounded once, at the store; the ReLU's mask is computed again.

Sums over rows have a fixed order and no atomics. A tile of BLOCK_M rows leaves one part, a group of GROUP parts becomes
one, level by level, until one is left. Parts of statistics are a mean and the sum of squared deviations from it, so
that a mean far from zero does not cancel; parts of gradients are two sums. Parts are float32 [tiles, 2, part_pitch].

What all pixels of a channel share is rounded to nearest, for its error does not average out: a unit in the last place
of a mean can move the gradient in front, which cancels, by 4e-6. So quotients are div_rn (`/` errs by two units), and a
mean is corrected once by the mean of what it leaves.
"""

import triton
import triton.language as tl

from .tile import rectified


@triton.jit
def store_moments(x, m_ok, tile, column, columns, part_ptr, part_pitch, y_ptr, BLOCK_N: tl.constexpr):
    """The part of one tile x [BLOCK_M, BLOCK_N] float32, of whose rows m_ok count; of the values that y would hold."""
    x, kept = x.to(y_ptr.dtype.element_ty).to(tl.float32), m_ok[:, None]
    count = tl.sum(m_ok.to(tl.float32), 0)
    mean = tl.div_rn(tl.sum(tl.where(kept, x, 0.0), 0), count)
    if y_ptr.dtype.element_ty == tl.float32:  # the roundings of narrower values hide what this takes away
        mean += tl.div_rn(tl.sum(tl.where(kept, x - mean[None, :], 0.0), 0), count)
    off = tl.where(kept, x - mean[None, :], 0.0)
    store_pair(mean, tl.sum(off * off, 0), tile, column, columns, part_ptr, part_pitch, BLOCK_N)


@triton.jit
def store_pair(first, second, tile, column, columns, part_ptr, part_pitch, BLOCK_N: tl.constexpr):
    """Two rows [BLOCK_N] of a part."""
    lane = tl.arange(0, BLOCK_N)
    at = part_ptr + tile.to(tl.int64) * 2 * part_pitch + column + lane
    tl.store(at, first, mask=lane < columns)
    tl.store(at + part_pitch, second, mask=lane < columns)


@triton.jit
def load_tile(x_ptr, m, m_ok, k, c, pitch):
    """[BLOCK_M, BLOCK_N] of a map in float32, zeros outside."""
    at = x_ptr + (m.to(tl.int64) * pitch)[:, None] + k[None, :]
    return tl.load(at, mask=m_ok[:, None] & (k < c)[None, :], other=0.0).to(tl.float32)


@triton.jit
def scale_of(weight_ptr, var_ptr, k, c, eps):
    """weight / sqrt(var + eps), and 1 / sqrt(var + eps)."""
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var_ptr + k, mask=k < c, other=1.0) + eps))
    return tl.load(weight_ptr + k, mask=k < c, other=0.0) * inverse, inverse


@triton.jit
def moments_kernel(
    x_ptr, part_ptr, rows, c, blocks, x_pitch, part_pitch, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The parts of a map that is there already; `conv_kernel` with STATS leaves the same beside its result."""
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    m, k = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
    x = load_tile(x_ptr, m, m < rows, k, c, x_pitch)
    store_moments(x, m < rows, tile, block * BLOCK_N, c - block * BLOCK_N, part_ptr, part_pitch, x_ptr, BLOCK_N)


@triton.jit
def merge_kernel(
    part_ptr, merged_ptr, tiles, rows, span, c, blocks, part_pitch, divisor,
    MOMENTS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """GROUP parts to one. With MOMENTS a part stands for `span` rows, the last for what is left of `rows`:

        mean = sum(count * mean) / sum(count);  squares = sum(squares + count * (part's mean - mean)^2)

    Else parts are added. The second row is divided by `divisor`, the count at the last level, which so leaves var.
    """
    block, group = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    tile, k = group.to(tl.int64) * GROUP + tl.arange(0, GROUP), block * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (tile < tiles)[:, None] & (k < c)[None, :]
    at = part_ptr + (tile * 2 * part_pitch)[:, None] + k[None, :]
    first, second = tl.load(at, mask=ok, other=0.0), tl.load(at + part_pitch, mask=ok, other=0.0)  # [GROUP, BLOCK_N]
    column = block * BLOCK_N
    if MOMENTS:
        count = tl.minimum(tl.maximum(rows - tile * span, 0), span).to(tl.float32)[:, None]
        merged = tl.div_rn(tl.sum(first * count, 0), tl.sum(count, 0))
        merged += tl.div_rn(tl.sum((first - merged[None, :]) * count, 0), tl.sum(count, 0))
        off = first - merged[None, :]
        second += count * off * off
    else:
        merged = tl.sum(first, 0)
    store_pair(
        merged, tl.div_rn(tl.sum(second, 0), divisor), group, column, c - column, merged_ptr, part_pitch, BLOCK_N
    )


@triton.jit
def batch_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, y_ptr, rows, c, blocks, x_pitch, y_pitch, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The formula, in one pass over x."""
    block, tile = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    m, k = tile * BLOCK_M + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
    scale, _ = scale_of(weight_ptr, var_ptr, k, c, eps)
    mean, bias = (
        tl.load(mean_ptr + k, mask=k < c, other=0.0),
        tl.load(bias_ptr + k, mask=k < c, other=0.0),
    )
    x = load_tile(x_ptr, m, m < rows, k, c, x_pitch)
    y = rectified((x - mean[None, :]) * scale[None, :] + bias[None, :])
    ok = (m < rows)[:, None] & (k < c)[None, :]
    tl.store(y_ptr + (m * y_pitch)[:, None] + k[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def gradient_sums_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, part_ptr,
    rows, c, blocks, grad_pitch, x_pitch, part_pitch, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The parts of sum(g) and sum(g * (x - mean)), g the gradient where the ReLU is open."""
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    m, k = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
    g, off, _, _ = opened(
        grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, m, k, rows, c, grad_pitch, x_pitch, eps
    )
    column = block * BLOCK_N
    store_pair(tl.sum(g, 0), tl.sum(g * off, 0), tile, column, c - column, part_ptr, part_pitch, BLOCK_N)


@triton.jit
def opened(grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, m, k, rows, c, grad_pitch, x_pitch, eps):
    """The gradient behind the ReLU, x - mean, weight / sqrt(var + eps) and 1 / sqrt(var + eps)."""
    m_ok = m < rows
    scale, inverse = scale_of(weight_ptr, var_ptr, k, c, eps)
    mean = tl.load(mean_ptr + k, mask=k < c, other=0.0)
    bias = tl.load(bias_ptr + k, mask=k < c, other=0.0)
    off = load_tile(x_ptr, m, m_ok, k, c, x_pitch) - mean[None, :]
    grad = load_tile(grad_ptr, m, m_ok, k, c, grad_pitch)
    return tl.where(off * scale[None, :] + bias[None, :] > 0, grad, 0.0), off, scale, inverse


@triton.jit
def gradient_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, sums_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, c, blocks, grad_pitch, x_pitch, dx_pitch, sums_pitch, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx = scale * (g - sum(g) / count - (x - mean) * sum(g * (x - mean)) / (var + eps) / count), g as above; the first
    tile leaves dbias = sum(g) and dweight = sum(g * (x - mean)) / sqrt(var + eps). sums [2, sums_pitch].
    """
    block, tile = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    m, k = tile * BLOCK_M + tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
    g, off, scale, inverse = opened(
        grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, m, k, rows, c, grad_pitch, x_pitch, eps
    )
    dbias = tl.load(sums_ptr + k, mask=k < c, other=0.0)
    dweight = tl.load(sums_ptr + sums_pitch + k, mask=k < c, other=0.0) * inverse
    if tile == 0:
        tl.store(dbias_ptr + k, dbias, mask=k < c)
        tl.store(dweight_ptr + k, dweight, mask=k < c)
    count = tl.cast(rows, tl.float32)  # one row is a constant, which has no .to
    mean_g, slope = tl.div_rn(dbias, count), tl.div_rn(inverse * dweight, count)
    dx = (g - mean_g[None, :] - off * slope[None, :]) * scale[None, :]
    ok = (m < rows)[:, None] & (k < c)[None, :]
    tl.store(dx_ptr + (m * dx_pitch)[:, None] + k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=ok)
