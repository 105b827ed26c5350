// What every convolution does with its sums: scale, shift, residual, ReLU, the one rounding and the store.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {
namespace {

inline void *base_of(const Call &call, const View &view) {
  return view.buffer == LOCAL ? call.local : call.bases[view.buffer];
}

// What becomes of a panel's sums.
template <class Y> struct Sink {
  const float *scale, *shift;
  Y *y;
  const void *residual;
  int64_t y_pitch, residual_pitch;
  float residual_scale;
  int width;
  bool relu, residual_half;
};

// `tail` is the panel's row of scale, which its row of shift follows.
template <class Y> inline Sink<Y> sink_of(const ConvOp &op, const Call &call, const Panel &panel, const float *tail) {
  Sink<Y> sink;
  sink.scale = tail;
  sink.shift = tail + int64_t(panel.vectors) * Isa::lanes;
  sink.y = static_cast<Y *>(base_of(call, panel.y)) + panel.y.offset;
  sink.y_pitch = panel.y.pitch;
  sink.residual = nullptr;
  sink.residual_half = op.residual.type == Type::bfloat16;
  if (op.residual.buffer >= 0) {
    int64_t offset = (op.residual.offset + panel.column) * (sink.residual_half ? sizeof(bf16) : sizeof(float));
    sink.residual = static_cast<const char *>(call.bases[op.residual.buffer]) + offset;
  }
  sink.residual_pitch = op.residual.pitch;
  sink.residual_scale = op.residual_scale;
  sink.width = panel.width;
  sink.relu = panel.relu;
  return sink;
}

template <class T> inline Isa::V read(const T *p, int v, int width) {
  int count = width - v * Isa::lanes;
  return count < Isa::lanes ? Isa::load_some(p + v * Isa::lanes, count) : Isa::load(p + v * Isa::lanes);
}

template <class Y> inline Isa::V residual_at(const Sink<Y> &sink, int64_t pixel, int v) {
  int64_t at = pixel * sink.residual_pitch;
  return sink.residual_half ? read(static_cast<const bf16 *>(sink.residual) + at, v, sink.width)
                            : read(static_cast<const float *>(sink.residual) + at, v, sink.width);
}

// Asks for a pixel's residual ahead of its use: pixels lie too far apart for the processor to do it unasked.
template <class Y> inline void ask_residual(const Sink<Y> &sink, int64_t pixel) {
  int64_t item = sink.residual_half ? sizeof(bf16) : sizeof(float);
  const char *p = static_cast<const char *>(sink.residual) + pixel * sink.residual_pitch * item;
  __builtin_prefetch(p, 0, 2);
  __builtin_prefetch(p + (sink.width - 1) * item, 0, 2);
}

// The vectors of a panel's scale or shift.
template <int NV> struct Columns {
  Isa::V v[NV];

  Columns() : v{} {}
  explicit Columns(const float *p) {
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i)
      v[i] = Isa::load(p + i * Isa::lanes);
  }
};

// With `Residual` false, of a sink that has none.
template <int NV, class Y, bool Residual = true>
inline void finish(const Sink<Y> &sink, int64_t pixel, const Isa::V (&sum)[NV], const Columns<NV> &scale,
                   const Columns<NV> &shift) {
  Y *y = sink.y + pixel * sink.y_pitch;
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    Isa::V value = Isa::fma(sum[v], scale.v[v], shift.v[v]);
    if (Residual && sink.residual)
      value = Isa::fma(Isa::set(sink.residual_scale), value, residual_at(sink, pixel, v));
    if (sink.relu)
      value = Isa::relu(value);
    int count = sink.width - v * Isa::lanes;
    if (count < Isa::lanes)
      Isa::store_some(y + v * Isa::lanes, value, count);
    else
      Isa::store(y + v * Isa::lanes, value);
  }
}

// `finish_rows` of a whole panel with a residual of type R, without its questions at every vector.
template <class R, int NV, class Y>
inline void finish_whole(const Sink<Y> &sink, const int64_t *pixels, const float *sums, int rows) {
  const Columns<NV> scale(sink.scale), shift(sink.shift);
  const Isa::V factor = Isa::set(sink.residual_scale);
  const R *residual = static_cast<const R *>(sink.residual);
  for (int r = 0; r < rows; ++r, sums += NV * Isa::lanes) {
    Y *y = sink.y + pixels[r] * sink.y_pitch;
    const R *old = residual + pixels[r] * sink.residual_pitch;
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      Isa::V value = Isa::fma(Isa::load(sums + v * Isa::lanes), scale.v[v], shift.v[v]);
      value = Isa::fma(factor, value, Isa::load(old + v * Isa::lanes));
      Isa::store(y + v * Isa::lanes, sink.relu ? Isa::relu(value) : value);
    }
  }
}

// Finishes `rows` pixels, whose sums are [rows][NV vectors].
template <int NV, class Y>
__attribute__((noinline)) void finish_rows(const Sink<Y> &sink, const int64_t *pixels, const float *sums, int rows) {
  if (sink.residual && sink.width == NV * Isa::lanes)
    return sink.residual_half ? finish_whole<bf16, NV>(sink, pixels, sums, rows)
                              : finish_whole<float, NV>(sink, pixels, sums, rows);
  for (int r = 0; r < rows; ++r) {
    Columns<NV> row(sums + r * NV * Isa::lanes);
    finish<NV, Y>(sink, pixels[r], row.v, Columns<NV>(sink.scale), Columns<NV>(sink.shift));
  }
}

} // namespace
} // namespace inception_fast::cpu
