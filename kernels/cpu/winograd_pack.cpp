#include "winograd_pack.h"

#include "winograd_axis.h"

#include <cmath>
#include <utility>

namespace inception_fast::cpu {

const std::vector<WinogradTile> &winograd_tiles() {
  static const std::vector<WinogradTile> tiles{{3, 3, 6, 6}, {3, 3, 4, 4}, {3, 3, 2, 2}, {5, 5, 4, 4},
                                               {5, 5, 2, 2}, {1, 3, 1, 4}, {3, 1, 4, 1}, {1, 7, 1, 4},
                                               {7, 1, 4, 1}, {1, 7, 1, 6}, {7, 1, 6, 1}};
  return tiles;
}

static int points(const ConvOp &op) { return (op.kh + op.tile_h - 1) * (op.kw + op.tile_w - 1); }

void lay_out_points(ConvOp &op) {
  op.row_taps = op.kh * op.kw;
  op.row_depth = int64_t(points(op)) * op.c;
}

// G as [n][taps].
template <class A> static std::vector<double> matrix() {
  std::vector<double> g;
  for (int p = 0; p < A::n; ++p)
    for (int tap = 0; tap < A::R; ++tap)
      g.push_back(A::g(p, tap));
  return g;
}

bool pack_points(const ConvOp &op, const Stretch &from, int width, float *to) {
  const auto [rows, columns] =
      with_axes(op, [](auto h, auto w) { return std::pair(matrix<decltype(h)>(), matrix<decltype(w)>()); });
  int nh = op.kh + op.tile_h - 1, nw = op.kw + op.tile_w - 1;
  const WeightBlock &block = *from.block;
  std::vector<double> half(nh * op.kw);
  bool finite = true;
  for (int c = 0; c < op.c; ++c)
    for (int i = 0; i < from.count; ++i) {
      const float *w = from.data + i * block.column + c * block.channel;
      for (int p = 0; p < nh; ++p)
        for (int kw = 0; kw < op.kw; ++kw) {
          double sum = 0;
          for (int kh = 0; kh < op.kh; ++kh)
            sum += rows[p * op.kh + kh] * w[kh * block.row + kw * block.tap];
          half[p * op.kw + kw] = sum;
        }
      for (int p = 0; p < nh; ++p)
        for (int q = 0; q < nw; ++q) {
          double sum = 0;
          for (int kw = 0; kw < op.kw; ++kw)
            sum += columns[q * op.kw + kw] * half[p * op.kw + kw];
          float u = static_cast<float>(sum);
          to[(int64_t(p * nw + q) * op.c + c) * width + from.column + i] = u;
          finite &= std::isfinite(u);
        }
    }
  return finite;
}

} // namespace inception_fast::cpu
