// Steps that treat every pixel by itself: import, eltwise, local response normalisation, L2 normalisation.
#pragma once

#include "as_float.h"
#include "some.h"
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

// The channels of one pixel, of either type.
struct Pixel {
  void *at;
  bool half;

  Isa::V read(int32_t i, int count) const {
    return half ? read_some(static_cast<const bf16 *>(at) + i, count)
                : read_some(static_cast<const float *>(at) + i, count);
  }
  void write(int32_t i, Isa::V value, int count) const {
    half ? write_some(static_cast<bf16 *>(at) + i, value, count)
         : write_some(static_cast<float *>(at) + i, value, count);
  }
};

inline Pixel pixel_at(const Call &call, const View &view, int64_t pixel) {
  bool half = view.type == Type::bfloat16;
  int64_t at = view.offset + pixel * view.pitch;
  return {static_cast<char *>(call.bases[view.buffer]) + at * (half ? sizeof(bf16) : sizeof(float)), half};
}

// y = act(residual + residual_scale * (scale * x + shift)), each part optional.
void eltwise(const EltwiseOp &op, const Call &call, const Worker &worker) {
  int64_t end = op.pixels * (worker.index + 1) / worker.count;
  int32_t c = op.x.channels;
  bool add = op.residual.buffer >= 0;
  for (int64_t pixel = op.pixels * worker.index / worker.count; pixel < end; ++pixel) {
    Pixel x = pixel_at(call, op.x, pixel), y = pixel_at(call, op.y, pixel);
    Pixel residual = add ? pixel_at(call, op.residual, pixel) : x;
    for (int32_t i = 0; i < c; i += Isa::lanes) {
      int count = c - i;
      Isa::V value = x.read(i, count);
      if (op.scale)
        value = value * read_some(op.scale + i, count);
      if (op.shift)
        value = value + read_some(op.shift + i, count);
      if (add)
        value = Isa::fma(Isa::set(op.residual_scale), value, residual.read(i, count));
      if (op.relu)
        value = Isa::relu(value);
      y.write(i, value, count);
    }
  }
}

// Pixels of three planes, what images mostly are: constant strides let the compiler shuffle whole vectors.
template <class T>
inline void interleave(const ImportOp &op, const T *x, int64_t plane, int32_t count, float *__restrict y) {
  const T *x1 = x + plane, *x2 = x1 + plane;
  float scale[3] = {1, 1, 1}, shift[3] = {0, 0, 0};
  for (int k = 0; k < 3; ++k) {
    scale[k] = op.scale ? op.scale[k] : 1.0f;
    shift[k] = op.shift ? op.shift[k] : 0.0f;
  }
  for (int32_t i = 0; i < count; ++i) {
    y[3 * i] = scale[0] * as_float(x[i]) + shift[0];
    y[3 * i + 1] = scale[1] * as_float(x1[i]) + shift[1];
    y[3 * i + 2] = scale[2] * as_float(x2[i]) + shift[2];
  }
}

// Some pixels of a row: x is [count, c] with element strides, y is [count, c] with the pixels `pitch` apart.
template <class T>
inline void import_pixels(const ImportOp &op, const T *x, const Input &from, int32_t count, float *y, int64_t pitch) {
  int32_t c = op.y.channels;
  if (c == 3 && pitch == 3 && from.w == 1)
    return interleave(op, x, from.c, count, y);
  if (from.c == 1) {
    for (int32_t i = 0; i < count; ++i)
      for (int32_t k = 0; k < c; ++k)
        y[i * pitch + k] = as_float(x[i * from.w + k]);
  } else {
    for (int32_t k = 0; k < c; ++k)
      for (int32_t i = 0; i < count; ++i)
        y[i * pitch + k] = as_float(x[i * from.w + k * from.c]);
  }
  if (!op.scale && !op.shift)
    return;
  for (int32_t i = 0; i < count; ++i)
    for (int32_t k = 0; k < c; ++k) {
      float &value = y[i * pitch + k];
      value = (op.scale ? op.scale[k] * value : value) + (op.shift ? op.shift[k] : 0.0f);
    }
}

template <class T> inline void import_row(const ImportOp &op, const T *x, const Input &from, void *to, float *scratch) {
  int32_t c = op.y.channels;
  for (int32_t i = 0; i < op.w; i += IMPORT_PIXELS) {
    int32_t count = op.w - i < IMPORT_PIXELS ? op.w - i : IMPORT_PIXELS;
    int64_t at = int64_t(i) * op.y.pitch;
    if (op.y.type == Type::float32) {
      import_pixels(op, x + i * from.w, from, count, static_cast<float *>(to) + at, op.y.pitch);
      continue;
    }
    import_pixels(op, x + i * from.w, from, count, scratch, c);
    bf16 *y = static_cast<bf16 *>(to) + at;
    // Without other channels between them the pixels are one run of values.
    int32_t runs = op.y.pitch == c ? 1 : count, length = op.y.pitch == c ? count * c : c;
    for (int32_t run = 0; run < runs; ++run)
      for (int32_t k = 0; k < length; k += Isa::lanes)
        write_some(y + run * op.y.pitch + k, read_some(scratch + run * c + k, length - k), length - k);
  }
}

// y = scale * x + shift per channel, from the caller's tensor.
void import(const ImportOp &op, const Call &call, const Worker &worker) {
  const Input &input = call.inputs[op.source];
  float *scratch = reinterpret_cast<float *>(worker.scratch);
  int64_t rows = int64_t(op.n) * op.h, end = rows * (worker.index + 1) / worker.count;
  for (int64_t row = rows * worker.index / worker.count; row < end; ++row) {
    int64_t at = row / op.h * input.n + row % op.h * input.h;
    void *y = pixel_at(call, op.y, row * op.w).at;
    if (input.type == Type::uint8)
      import_row(op, static_cast<const uint8_t *>(input.data) + at, input, y, scratch);
    else if (input.type == Type::bfloat16)
      import_row(op, static_cast<const bf16 *>(input.data) + at, input, y, scratch);
    else
      import_row(op, static_cast<const float *>(input.data) + at, input, y, scratch);
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
    Pixel x = pixel_at(call, op.x, pixel), y = pixel_at(call, op.y, pixel);
    for (int32_t i = 0; i < c; i += Isa::lanes) {
      Isa::V value = x.read(i, c - i);
      write_some(squares + back + i, value * value, c - i);
    }
    for (int32_t i = 0; i < c; i += Isa::lanes) {
      Isa::V sum = Isa::zero();
      for (int32_t j = 0; j < op.size; ++j)
        sum = sum + Isa::load(squares + i + j);
      Isa::V base = Isa::fma(Isa::set(factor), sum, Isa::set(op.k));
      y.write(i, x.read(i, c - i) / power(base, op.beta), c - i);
    }
  }
}

// y = x / max(||x||_2, eps) over the channels of a pixel; a NaN norm stays NaN.
void normalize(const NormalizeOp &op, const Call &call, const Worker &worker) {
  int32_t c = op.x.channels;
  int64_t end = op.pixels * (worker.index + 1) / worker.count;
  for (int64_t pixel = op.pixels * worker.index / worker.count; pixel < end; ++pixel) {
    Pixel x = pixel_at(call, op.x, pixel), y = pixel_at(call, op.y, pixel);
    Isa::V sum = Isa::zero();
    for (int32_t i = 0; i < c; i += Isa::lanes) {
      Isa::V value = x.read(i, c - i);
      sum = Isa::fma(value, value, sum);
    }
    float lanes[Isa::lanes], total = 0.0f;
    Isa::store(lanes, sum);
    for (float lane : lanes)
      total += lane;
    float norm = __builtin_sqrtf(total);
    Isa::V divisor = Isa::set(norm < op.eps ? op.eps : norm);
    for (int32_t i = 0; i < c; i += Isa::lanes)
      y.write(i, x.read(i, c - i) / divisor, c - i);
  }
}

} // namespace
} // namespace inception_fast::cpu
