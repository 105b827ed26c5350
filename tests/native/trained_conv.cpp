#include "trained_conv.h"

#include "winograd_pack.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace native_driver {

static int pick(Rng &rng, std::initializer_list<int> values) {
  return values.begin()[rng.between(0, static_cast<int>(values.size()) - 1)];
}

// Of the type in which the sum meets it.
static float weight_of(const TrainConvOp &op, int oc, int c, int kh, int kw) {
  float weight = op.weight[oc * op.column + c * op.channel + kh * op.row + kw * op.tap];
  unsigned char met[sizeof(float)];
  put(op.type, met, 0, weight);
  return get(op.type, met, 0);
}

// One product after the other; what lies outside of the map is left out.
static double sum_of(const TrainConvOp &op, int n, int oy, int ox, int oc) {
  double sum = 0;
  for (int kh = 0; kh < op.kh; ++kh)
    for (int kw = 0; kw < op.kw; ++kw) {
      int y = oy * op.stride_h - op.top + kh, x = ox * op.stride_w - op.left + kw;
      if (y < 0 || y >= op.h || x < 0 || x >= op.w)
        continue;
      int64_t pixel = (int64_t(n) * op.h + y) * op.w + x;
      for (int c = 0; c < op.c; ++c)
        sum += double(get(op.type, op.x, pixel * op.x_pitch + c)) * weight_of(op, oc, c, kh, kw);
    }
  return sum;
}

static void choose_sizes(Rng &rng, bool tiles, TrainConvOp &op) {
  bool deep = rng.one_in(4); // sums of several chunks
  op.n = pick(rng, {1, 1, 2, 3}), op.h = rng.between(1, deep ? 4 : 9), op.w = rng.between(1, deep ? 4 : 9);
  op.c = deep ? rng.between(120, 200) : pick(rng, {1, 2, 3, 8, 15, 16, 17, 31, 33, 65, 70});
  op.oc = deep ? rng.between(1, 20) : pick(rng, {1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 50});
  op.stride_h = op.stride_w = 1;
  if (tiles) {
    const std::vector<WinogradTile> &all = winograd_tiles();
    const WinogradTile &t = all[rng.between(0, static_cast<int>(all.size()) - 1)];
    op.kh = t.kh, op.kw = t.kw, op.tile_h = t.h, op.tile_w = t.w;
    if (t.kh == 3 && t.h == 2 && rng.one_in(2)) // of others a sum near the middle of two results may take either
      op.type = Type::bfloat16;
  } else {
    op.type = Type::bfloat16;
    op.kh = pick(rng, {1, 2, 3, 5}), op.kw = pick(rng, {1, 1, 3, 4});
    op.stride_h = pick(rng, {1, 1, 2, 3}), op.stride_w = pick(rng, {1, 1, 2, 3});
  }
  op.top = rng.between(0, op.kh - 1), op.left = rng.between(0, op.kw - 1);
  op.h = std::max(op.h, op.kh - 2 * op.top), op.w = std::max(op.w, op.kw - 2 * op.left);
  op.oh = (op.h + 2 * op.top - op.kh) / op.stride_h + 1, op.ow = (op.w + 2 * op.left - op.kw) / op.stride_w + 1;
  op.x_pitch = op.c + (rng.one_in(2) ? rng.between(1, 9) : 0);
  op.y_pitch = op.oc + (rng.one_in(2) ? rng.between(1, 9) : 0);
}

// Returns where, in floats, the first of the weights lies. Forward they are [oc, kh, kw, c] or [oc, c, kh, kw]; for a
// gradient the two kinds of channels change places and taps run backwards.
static int64_t lay_out(Rng &rng, TrainConvOp &op) {
  bool turned = rng.one_in(2), last = rng.one_in(2);
  int taps = op.kh * op.kw, inner = turned ? op.oc : op.c;
  int64_t outer_step = int64_t(taps) * inner, inner_step = last ? 1 : taps;
  op.column = turned ? inner_step : outer_step, op.channel = turned ? outer_step : inner_step;
  op.tap = last ? inner : 1, op.row = op.tap * op.kw;
  if (!turned)
    return 0;
  int64_t end = (op.kh - 1) * op.row + (op.kw - 1) * op.tap;
  op.row = -op.row, op.tap = -op.tap;
  return end;
}

TrainedConv::TrainedConv(Rng &rng, bool tiles) : at_end_(rng.one_in(2)) {
  TrainConvOp &op = op_;
  choose_sizes(rng, tiles, op);
  int64_t pixels = int64_t(op.n) * op.h * op.w, results = int64_t(op.n) * op.oh * op.ow;
  x_ = std::make_unique<Guarded>(((pixels - 1) * op.x_pitch + op.c) * size_of(op.type), rng.one_in(2));
  for (int64_t p = 0; p < pixels; ++p)
    for (int c = 0; c < op.c; ++c)
      put(op.type, x_->data(), p * op.x_pitch + c, static_cast<float>(rng.between(-3, 3)));
  int64_t weights = int64_t(op.oc) * op.c * op.kh * op.kw;
  weight_ = std::make_unique<Guarded>(sizeof(float) * weights, rng.one_in(2));
  float *weight = reinterpret_cast<float *>(weight_->data());
  for (int64_t i = 0; i < weights; ++i) // some of those that are rounded lie beside their integer
    weight[i] = static_cast<float>(rng.between(-3, 3)) * (!tiles && rng.one_in(3) ? 1 + 0x1p-10f : 1);
  op.x = x_->data(), op.weight = weight + lay_out(rng, op);
  truth_ = std::make_unique<Guarded>(((results - 1) * op.y_pitch + op.oc) * size_of(op.type),
                                     at_end_); // as y's will lie, so that poison meets poison
  for (int64_t p = 0; p < results; ++p)
    for (int oc = 0; oc < op.oc; ++oc) {
      int n = static_cast<int>(p / (op.oh * op.ow)), oy = static_cast<int>(p / op.ow % op.oh);
      double sum = sum_of(op, n, oy, static_cast<int>(p % op.ow), oc);
      put(op.type, truth_->data(), p * op.y_pitch + oc, static_cast<float>(sum));
    }
}

void TrainedConv::check(const Tier &tier, const std::vector<int> &threads) const {
  for (int count : threads) {
    Guarded y(truth_->bytes(), at_end_);
    TrainConvOp op = op_;
    op.y = y.data();
    train_conv(tier, op, count);
    bool exact = op.tile_h == 0 || (op.tile_h == 2 && op.kh == 3);
    float *values = reinterpret_cast<float *>(y.data());
    for (int64_t p = 0; !exact && p < int64_t(op.n) * op.oh * op.ow; ++p) // wrong by less than 1e-2
      for (int oc = 0; oc < op.oc; ++oc)
        values[p * op.y_pitch + oc] = std::nearbyint(values[p * op.y_pitch + oc]) + 0.0f;
    std::string wrong = difference(y.data(), truth_->data(), truth_->bytes());
    if (!wrong.empty())
      throw std::runtime_error(std::string("tier ") + tier.name + ", " + std::to_string(count) + " threads: y's " +
                               wrong);
  }
}

} // namespace native_driver
