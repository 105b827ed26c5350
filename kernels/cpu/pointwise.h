// Steps that treat every pixel by itself: import, eltwise, local response normalisation, L2 normalisation.
#pragma once

#include "pool.h"
#include "spec.h"

#include <math.h>

namespace inception_fast::cpu {
namespace {

inline Isa::V power(Isa::V base, float exponent) {
  if (exponent == 0.75f) {
    Isa::V root = Isa::sqrt(base);
    return root * Isa::sqrt(root);
  }
  if (exponent == 0.5f)
    return Isa::sqrt(base);
  if (exponent == 1.0f)
    return base;
  float values[Isa::lanes];
  Isa::store(values, base);
  for (float &value : values)
    value = powf(value, exponent);
  return Isa::load(values);
}

// y = act(residual + residual_scale * (scale * x + shift)), each part optional.
void eltwise(const EltwiseOp &op, const Call &call, const Worker &worker) {
  int64_t end = op.pixels * (worker.index + 1) / worker.count;
  int32_t c = op.x.channels;
  for (int64_t pixel = op.pixels * worker.index / worker.count; pixel < end; ++pixel) {
    const float *x = call.bases[op.x.buffer] + op.x.offset + pixel * op.x.pitch;
    const float *residual = op.residual.buffer < 0
                                ? nullptr
                                : call.bases[op.residual.buffer] + op.residual.offset + pixel * op.residual.pitch;
    float *y = call.bases[op.y.buffer] + op.y.offset + pixel * op.y.pitch;
    for (int32_t i = 0; i < c; i += Isa::lanes) {
      int count = c - i;
      Isa::V value = read_some(x + i, count);
      if (op.scale)
        value = value * read_some(op.scale + i, count);
      if (op.shift)
        value = value + read_some(op.shift + i, count);
      if (residual)
        value = Isa::fma(Isa::set(op.residual_scale), value, read_some(residual + i, count));
      if (op.relu)
        value = Isa::relu(value);
      write_some(y + i, value, count);
    }
  }
}

// One row of the map: x is [w, c] with element strides, y is dense in c.
template <class T>
inline void import_row(const ImportOp &op, const T *x, int64_t stride_w, int64_t stride_c, float *y) {
  constexpr int32_t STEP = 16; // pixels whose channels are written while their cache lines are at hand
  int32_t c = op.y.channels;
  for (int32_t i0 = 0; i0 < op.w; i0 += STEP) {
    int32_t i1 = i0 + STEP < op.w ? i0 + STEP : op.w;
    if (stride_c == 1) {
      for (int32_t i = i0; i < i1; ++i)
        for (int32_t k = 0; k < c; ++k)
          y[int64_t(i) * op.y.pitch + k] = static_cast<float>(x[i * stride_w + k]);
    } else {
      for (int32_t k = 0; k < c; ++k)
        for (int32_t i = i0; i < i1; ++i)
          y[int64_t(i) * op.y.pitch + k] = static_cast<float>(x[i * stride_w + k * stride_c]);
    }
    if (!op.scale && !op.shift)
      continue;
    for (int32_t i = i0; i < i1; ++i)
      for (int32_t k = 0; k < c; ++k) {
        float &value = y[int64_t(i) * op.y.pitch + k];
        value = (op.scale ? op.scale[k] * value : value) + (op.shift ? op.shift[k] : 0.0f);
      }
  }
}

// y = scale * x + shift per channel, from the caller's tensor.
void import(const ImportOp &op, const Call &call, const Worker &worker) {
  const Input &input = call.inputs[op.source];
  int64_t rows = int64_t(op.n) * op.h, end = rows * (worker.index + 1) / worker.count;
  for (int64_t row = rows * worker.index / worker.count; row < end; ++row) {
    int64_t at = row / op.h * input.n + row % op.h * input.h;
    float *y = call.bases[op.y.buffer] + op.y.offset + row * op.w * op.y.pitch;
    if (input.bytes)
      import_row(op, static_cast<const uint8_t *>(input.data) + at, input.w, input.c, y);
    else
      import_row(op, static_cast<const float *>(input.data) + at, input.w, input.c, y);
  }
}

// y = x / (k + alpha / size * sum of x^2 over `size` channels) ** beta; the window reaches size / 2 channels back.
void lrn(const LrnOp &op, const Call &call, const Worker &worker) {
  float *squares = reinterpret_cast<float *>(worker.scratch);
  int32_t c = op.x.channels, back = op.size / 2, room = c + op.size + Isa::lanes;
  for (int32_t i = 0; i < room; ++i)
    squares[i] = 0.0f;
  float factor = op.alpha / static_cast<float>(op.size);
  int64_t end = op.pixels * (worker.index + 1) / worker.count;
  for (int64_t pixel = op.pixels * worker.index / worker.count; pixel < end; ++pixel) {
    const float *x = call.bases[op.x.buffer] + op.x.offset + pixel * op.x.pitch;
    float *y = call.bases[op.y.buffer] + op.y.offset + pixel * op.y.pitch;
    for (int32_t i = 0; i < c; i += Isa::lanes) {
      Isa::V value = read_some(x + i, c - i);
      write_some(squares + back + i, value * value, c - i);
    }
    for (int32_t i = 0; i < c; i += Isa::lanes) {
      Isa::V sum = Isa::zero();
      for (int32_t j = 0; j < op.size; ++j)
        sum = sum + Isa::load(squares + i + j);
      Isa::V base = Isa::fma(Isa::set(factor), sum, Isa::set(op.k));
      write_some(y + i, read_some(x + i, c - i) / power(base, op.beta), c - i);
    }
  }
}

// y = x / max(||x||_2, eps) over the channels of a pixel; a NaN norm stays NaN.
void normalize(const NormalizeOp &op, const Call &call, const Worker &worker) {
  int32_t c = op.x.channels;
  int64_t end = op.pixels * (worker.index + 1) / worker.count;
  for (int64_t pixel = op.pixels * worker.index / worker.count; pixel < end; ++pixel) {
    const float *x = call.bases[op.x.buffer] + op.x.offset + pixel * op.x.pitch;
    float *y = call.bases[op.y.buffer] + op.y.offset + pixel * op.y.pitch;
    Isa::V sum = Isa::zero();
    for (int32_t i = 0; i < c; i += Isa::lanes) {
      Isa::V value = read_some(x + i, c - i);
      sum = Isa::fma(value, value, sum);
    }
    float lanes[Isa::lanes], total = 0.0f;
    Isa::store(lanes, sum);
    for (float lane : lanes)
      total += lane;
    float norm = __builtin_sqrtf(total);
    Isa::V divisor = Isa::set(norm < op.eps ? op.eps : norm);
    for (int32_t i = 0; i < c; i += Isa::lanes)
      write_some(y + i, read_some(x + i, c - i) / divisor, c - i);
  }
}

} // namespace
} // namespace inception_fast::cpu
