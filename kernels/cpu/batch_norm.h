// Batch norm in training with the ReLU behind it, one reading for the sums and one for the result in each direction.
//
//   forward    mean, var of x;  y = relu(z), z = scale (x - mean) + bias
//   backward   g = grad where z > 0;  sums of g and of g (x - mean);  dx = scale g + slope (x - mean) + offset
//
// Shapes: see batch_norm_op.h. Numbers: a block's deviations are taken from the block's own mean while the block is in
// the cache, so little cancels; sums inside a block are float, eight pixels at a time, across blocks double. z is
// computed again in the backward, in the same order, so that neither y nor a mask has to be kept.
// Algorithm: a worker takes a row of blocks, the same for both readings, and reads it backwards the second time: what
// it read last is in the caches still.
#pragma once

#include "batch_norm_op.h"
#include "some.h"

namespace inception_fast::cpu {
namespace {

constexpr int STEP = 8; // pixels summed in registers before they reach a block's sums
constexpr int ROWS = 4; // pixels written for one reading of the parameters

// Reads a vector, and asks for the one `AHEAD` pixels later: the loops go down columns of a few pixels each, an order
// that hardware does not foresee.
constexpr int AHEAD = 16;
template <class T> inline Isa::V read_ahead(const T *p, int64_t pitch, int count) {
  __builtin_prefetch(p + AHEAD * pitch);
  return read_some(p, count);
}

struct Blocks {
  int64_t first, end;
};

inline Blocks blocks_of(const BatchNormOp &op, const Worker &worker) {
  return {op.blocks * worker.index / worker.count, op.blocks * (worker.index + 1) / worker.count};
}

inline int64_t pixels_of(const BatchNormOp &op, int64_t block) {
  int64_t left = op.pixels - block * op.block;
  return left < op.block ? left : op.block;
}

inline void clear(float *sums, int32_t count) {
  for (int32_t i = 0; i < count; ++i)
    sums[i] = 0.0f;
}

// Adds N pixels of x, `c` apart, to sums [c].
template <int N, class T> inline void add_pixels(const T *x, int32_t c, float *sums) {
  for (int32_t i = 0; i < c; i += Isa::lanes) {
    int count = c - i;
    Isa::V part[N];
#pragma GCC unroll 8
    for (int p = 0; p < N; ++p)
      part[p] = read_ahead(x + int64_t(p) * c + i, c, count);
#pragma GCC unroll 3
    for (int half = N / 2; half > 0; half /= 2)
#pragma GCC unroll 4
      for (int p = 0; p < half; ++p)
        part[p] = part[p] + part[p + half];
    write_some(sums + i, read_some(sums + i, count) + part[0], count);
  }
}

template <int N, class T> inline void add_squares(const T *x, int32_t c, const float *mean, float *squares) {
  for (int32_t i = 0; i < c; i += Isa::lanes) {
    int count = c - i;
    Isa::V centre = read_some(mean + i, count), part = Isa::zero();
#pragma GCC unroll 8
    for (int p = 0; p < N; ++p) {
      Isa::V d = read_some(x + int64_t(p) * c + i, count) - centre;
      part = Isa::fma(d, d, part);
    }
    write_some(squares + i, read_some(squares + i, count) + part, count);
  }
}

template <class T> void block_statistics(const BatchNormOp &op, const Worker &worker) {
  auto [first, end] = blocks_of(op, worker);
  int32_t c = op.c;
  for (int64_t block = first; block < end; ++block) {
    const T *x = static_cast<const T *>(op.x) + block * op.block * c;
    float *mean = op.partial + block * 2 * c, *squares = mean + c;
    int64_t count = pixels_of(op, block), p = 0;
    clear(mean, 2 * c);
    for (; p + STEP <= count; p += STEP)
      add_pixels<STEP>(x + p * c, c, mean);
    for (; p < count; ++p)
      add_pixels<1>(x + p * c, c, mean);
    for (int32_t i = 0; i < c; ++i)
      mean[i] /= static_cast<float>(count);
    for (p = 0; p + STEP <= count; p += STEP)
      add_squares<STEP>(x + p * c, c, mean, squares);
    for (; p < count; ++p)
      add_squares<1>(x + p * c, c, mean, squares);
  }
}

template <int N, class T> inline void apply_pixels(const BatchNormOp &op, const T *x, T *y) {
  int32_t c = op.c;
  for (int32_t i = 0; i < c; i += Isa::lanes) {
    int count = c - i;
    Isa::V mean = read_some(op.mean + i, count), scale = read_some(op.scale + i, count);
    Isa::V bias = read_some(op.bias + i, count);
#pragma GCC unroll 4
    for (int p = 0; p < N; ++p) {
      Isa::V d = read_ahead(x + int64_t(p) * c + i, c, count) - mean;
      write_some(y + int64_t(p) * c + i, Isa::relu(Isa::fma(d, scale, bias)), count);
    }
  }
}

template <class T> void block_apply(const BatchNormOp &op, const Worker &worker) {
  auto [first, end] = blocks_of(op, worker);
  int32_t c = op.c;
  for (int64_t block = end; block-- > first;) {
    int64_t from = block * op.block * c, count = pixels_of(op, block), p = 0;
    const T *x = static_cast<const T *>(op.x) + from;
    T *y = static_cast<T *>(op.y) + from;
    for (; p + ROWS <= count; p += ROWS)
      apply_pixels<ROWS>(op, x + p * c, y + p * c);
    for (; p < count; ++p)
      apply_pixels<1>(op, x + p * c, y + p * c);
  }
}

// A channel vector's d = x - mean, and g = grad where the ReLU was open.
struct Open {
  Isa::V mean, scale, bias;

  Open(const BatchNormOp &op, int32_t i, int count)
      : mean(read_some(op.mean + i, count)), scale(read_some(op.scale + i, count)),
        bias(read_some(op.bias + i, count)) {}
  Isa::V through(Isa::V d, Isa::V grad) const { return Isa::fma(d, scale, bias) > Isa::zero() ? grad : Isa::zero(); }
};

template <int N, class T>
inline void add_gradients(const BatchNormOp &op, const T *x, const T *grad, float *sums, float *products) {
  int32_t c = op.c;
  for (int32_t i = 0; i < c; i += Isa::lanes) {
    int count = c - i;
    Open open(op, i, count);
    Isa::V sum = Isa::zero(), product = Isa::zero();
#pragma GCC unroll 8
    for (int p = 0; p < N; ++p) {
      Isa::V d = read_ahead(x + int64_t(p) * c + i, c, count) - open.mean;
      Isa::V g = open.through(d, read_ahead(grad + p * op.grad_pitch + i, op.grad_pitch, count));
      sum = sum + g;
      product = Isa::fma(g, d, product);
    }
    write_some(sums + i, read_some(sums + i, count) + sum, count);
    write_some(products + i, read_some(products + i, count) + product, count);
  }
}

template <class T> void block_gradient_sums(const BatchNormOp &op, const Worker &worker) {
  auto [first, end] = blocks_of(op, worker);
  int32_t c = op.c;
  for (int64_t block = first; block < end; ++block) {
    const T *x = static_cast<const T *>(op.x) + block * op.block * c;
    const T *grad = static_cast<const T *>(op.grad) + block * op.block * op.grad_pitch;
    float *sums = op.partial + block * 2 * c, *products = sums + c;
    int64_t count = pixels_of(op, block), p = 0;
    clear(sums, 2 * c);
    for (; p + STEP <= count; p += STEP)
      add_gradients<STEP>(op, x + p * c, grad + p * op.grad_pitch, sums, products);
    for (; p < count; ++p)
      add_gradients<1>(op, x + p * c, grad + p * op.grad_pitch, sums, products);
  }
}

template <int N, class T> inline void gradient_pixels(const BatchNormOp &op, const T *x, const T *grad, T *dx) {
  int32_t c = op.c;
  for (int32_t i = 0; i < c; i += Isa::lanes) {
    int count = c - i;
    Open open(op, i, count);
    Isa::V slope = read_some(op.slope + i, count), offset = read_some(op.offset + i, count);
#pragma GCC unroll 4
    for (int p = 0; p < N; ++p) {
      Isa::V d = read_ahead(x + int64_t(p) * c + i, c, count) - open.mean;
      Isa::V g = open.through(d, read_ahead(grad + p * op.grad_pitch + i, op.grad_pitch, count));
      write_some(dx + int64_t(p) * c + i, Isa::fma(g, open.scale, Isa::fma(d, slope, offset)), count);
    }
  }
}

template <class T> void block_gradient(const BatchNormOp &op, const Worker &worker) {
  auto [first, end] = blocks_of(op, worker);
  int32_t c = op.c;
  for (int64_t block = end; block-- > first;) {
    int64_t from = block * op.block * c, count = pixels_of(op, block), p = 0;
    const T *x = static_cast<const T *>(op.x) + from;
    const T *grad = static_cast<const T *>(op.grad) + block * op.block * op.grad_pitch;
    T *dx = static_cast<T *>(op.y) + from;
    for (; p + ROWS <= count; p += ROWS)
      gradient_pixels<ROWS>(op, x + p * c, grad + p * op.grad_pitch, dx + p * c);
    for (; p < count; ++p)
      gradient_pixels<1>(op, x + p * c, grad + p * op.grad_pitch, dx + p * c);
  }
}

void statistics(const BatchNormOp &op, const Worker &worker) {
  op.type == Type::float32 ? block_statistics<float>(op, worker) : block_statistics<bf16>(op, worker);
}

void apply(const BatchNormOp &op, const Worker &worker) {
  op.type == Type::float32 ? block_apply<float>(op, worker) : block_apply<bf16>(op, worker);
}

void gradient_sums(const BatchNormOp &op, const Worker &worker) {
  op.type == Type::float32 ? block_gradient_sums<float>(op, worker) : block_gradient_sums<bf16>(op, worker);
}

void gradient(const BatchNormOp &op, const Worker &worker) {
  op.type == Type::float32 ? block_gradient<float>(op, worker) : block_gradient<bf16>(op, worker);
}

} // namespace
} // namespace inception_fast::cpu
