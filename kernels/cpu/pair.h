// y = conv(conv(x)), each with its scale, shift and activation: an asymmetric pair as one operator.
//
// Shapes, layouts and numbers are those of the two convolutions in conv.h, to the bit. Every thread takes a range of
// the lines of all images, columns where the second kernel is nx1, rows where it is 1xn: whole images, and strips of
// others. It computes the first convolution's strip into its own memory and the second from there, so that the
// intermediate stays in the level 2 cache, is never shared, and the two need no barrier between them. Strips need no
// halo of each other.
#pragma once

#include "conv.h"

namespace inception_fast::cpu {
namespace {

// The pair on the strip [low, high) of one image.
inline void narrow(const PairOp &op, int64_t image, int32_t low, int32_t high, ConvOp &first, ConvOp &second) {
  first = op.first;
  second = op.second;
  first.n = second.n = 1;
  first.x_image = second.y_image = static_cast<int32_t>(image);
  if (op.rows) {
    first.oh = second.h = second.oh = high - low;
    first.top -= low * first.stride_h;
    second.y_start = low * second.y_row;
  } else {
    first.ow = second.w = second.ow = high - low;
    first.left -= low * first.stride_w;
    second.y_start = low;
  }
  first.y_row = first.ow;
  first.y_map = int64_t(first.oh) * first.ow;
}

template <void (*conv)(const ConvOp &, const Call &, const Worker &)>
void pair(const PairOp &op, const Call &call, const Worker &worker) {
  Call inner{call.bases, call.inputs, worker.scratch};
  Worker alone{0, 1, worker.scratch + op.local_bytes};
  auto run = [&](int64_t image, int32_t low, int32_t high) {
    ConvOp first, second;
    narrow(op, image, low, high, first, second);
    conv(first, inner, alone);
    conv(second, inner, alone);
  };
  int32_t extent = op.rows ? op.second.oh : op.second.ow;
  int64_t lines = int64_t(op.second.n) * extent;
  int64_t line = lines * worker.index / worker.count, end = lines * (worker.index + 1) / worker.count;
  while (line < end) {
    int32_t low = static_cast<int32_t>(line % extent);
    int32_t high = static_cast<int32_t>(lesser(extent, low + end - line));
    run(line / extent, low, high);
    line += high - low;
  }
}

} // namespace
} // namespace inception_fast::cpu
