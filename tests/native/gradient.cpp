#include "gradient.h"

#include "winograd_pack.h"

#include <cmath>
#include <limits>
#include <stdexcept>

namespace native_driver {

static int pick(Rng &rng, std::initializer_list<int> values) {
  return values.begin()[rng.between(0, static_cast<int>(values.size()) - 1)];
}

static std::unique_ptr<Guarded> filled(Rng &rng, Type type, int64_t pixels, int c, int64_t pitch) {
  auto map = std::make_unique<Guarded>(((pixels - 1) * pitch + c) * size_of(type), rng.one_in(2));
  for (int64_t p = 0; p < pixels; ++p)
    for (int i = 0; i < c; ++i)
      put(type, map->data(), p * pitch + i, static_cast<float>(rng.between(-3, 3)));
  return map;
}

// One product after the other; what lies outside of the map is left out.
static double sum_of(const WeightGradientOp &op, int oc, int kh, int kw, int c) {
  double sum = 0;
  for (int n = 0; n < op.n; ++n)
    for (int oy = 0; oy < op.oh; ++oy)
      for (int ox = 0; ox < op.ow; ++ox) {
        int y = oy * op.stride_h - op.top + kh, x = ox * op.stride_w - op.left + kw;
        if (y < 0 || y >= op.h || x < 0 || x >= op.w)
          continue;
        double value = get(op.type, op.x, ((int64_t(n) * op.h + y) * op.w + x) * op.x_pitch + c);
        sum += value * get(op.type, op.grad, ((int64_t(n) * op.oh + oy) * op.ow + ox) * op.grad_pitch + oc);
      }
  return sum;
}

static void by_tiles(Rng &rng, WeightGradientOp &op) {
  const std::vector<WinogradTile> &tiles = winograd_tiles();
  const WinogradTile &t = tiles[rng.between(0, static_cast<int>(tiles.size()) - 1)];
  op.stride_h = op.stride_w = 1;
  op.kh = t.kh, op.kw = t.kw, op.tile_h = t.h, op.tile_w = t.w;
}

Gradient::Gradient(Rng &rng, bool tiles) : at_end_(rng.one_in(2)) {
  WeightGradientOp &op = op_;
  bool large = rng.one_in(3); // more than a stretch of pixels, or than a chunk
  op.type = rng.one_in(2) ? Type::float32 : Type::bfloat16;
  op.n = pick(rng, {1, 1, 2, 3});
  op.h = large ? rng.between(15, 29) : rng.between(1, 9), op.w = large ? rng.between(15, 29) : rng.between(1, 9);
  op.c = large ? rng.between(1, 5) : pick(rng, {1, 3, 7, 8, 9, 16, 17, 31, 32, 33, 48, 51});
  op.oc = large ? rng.between(1, 18) : pick(rng, {1, 3, 6, 7, 11, 12, 13, 14, 15, 17, 26, 33, 48});
  op.kh = large ? rng.between(1, 2) : pick(rng, {1, 2, 3, 5}), op.kw = large ? rng.between(1, 3) : pick(rng, {1, 3, 4});
  op.stride_h = pick(rng, {1, 1, 2, 3}), op.stride_w = pick(rng, {1, 1, 2, 3});
  if (large && rng.one_in(2))
    op.stride_h = op.stride_w = 1, op.n = 3;
  if (tiles)
    by_tiles(rng, op);
  op.top = rng.between(0, op.kh), op.left = rng.between(0, op.kw);
  op.h = std::max(op.h, op.kh - 2 * op.top), op.w = std::max(op.w, op.kw - 2 * op.left);
  op.oh = (op.h + 2 * op.top - op.kh) / op.stride_h + 1, op.ow = (op.w + 2 * op.left - op.kw) / op.stride_w + 1;
  op.x_pitch = op.c + (rng.one_in(2) ? rng.between(1, 9) : 0);
  op.grad_pitch = op.oc + (rng.one_in(2) ? rng.between(1, 9) : 0);
  x_ = filled(rng, op.type, int64_t(op.n) * op.h * op.w, op.c, op.x_pitch);
  grad_ = filled(rng, op.type, int64_t(op.n) * op.oh * op.ow, op.oc, op.grad_pitch);
  if (!tiles && rng.one_in(4)) { // by tiles they reach more of dw than by the sum
    float special = rng.one_in(2) ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
    int pixel = rng.between(0, op.n * op.h * op.w - 1);
    put(op.type, x_->data(), pixel * op.x_pitch + rng.between(0, op.c - 1), special);
  }
  op.x = x_->data(), op.grad = grad_->data();
  truth_ = std::make_unique<Guarded>(sizeof(float) * op.oc * op.kh * op.kw * op.c, false);
  int64_t at = 0;
  for (int oc = 0; oc < op.oc; ++oc)
    for (int kh = 0; kh < op.kh; ++kh)
      for (int kw = 0; kw < op.kw; ++kw)
        for (int c = 0; c < op.c; ++c)
          put(Type::float32, truth_->data(), at++, static_cast<float>(sum_of(op, oc, kh, kw, c)));
}

void Gradient::check(const Tier &tier, const std::vector<int> &threads) const {
  for (int count : threads) {
    Guarded dw(truth_->bytes(), at_end_);
    WeightGradientOp op = op_;
    op.dw = reinterpret_cast<float *>(dw.data());
    weight_gradient(tier, op, count);
    bool exact = op.tile_h == 0 || (op.tile_h == 2 && op.kh == 3);
    for (int64_t i = 0; !exact && i < int64_t(truth_->bytes() / sizeof(float)); ++i) // wrong by less than 1e-2
      op.dw[i] = std::nearbyint(op.dw[i]) + 0.0f;
    std::string wrong = difference(dw.data(), truth_->data(), truth_->bytes());
    if (!wrong.empty())
      throw std::runtime_error(std::string("tier ") + tier.name + ", " + std::to_string(count) + " threads: dw's " +
                               wrong);
  }
}

} // namespace native_driver
