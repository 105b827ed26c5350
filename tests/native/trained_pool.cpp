#include "trained_pool.h"

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

TrainedPool::TrainedPool(Rng &rng) : at_end_(rng.one_in(2)) {
  TrainPoolOp &op = forward_;
  op.type = rng.one_in(2) ? Type::float32 : Type::bfloat16;
  op.maximum = rng.one_in(2);
  op.kh = op.maximum ? rng.between(1, 4) : pick(rng, {1, 2, 4}),
  op.kw = op.maximum ? rng.between(1, 4) : pick(rng, {1, 2, 4});
  op.count_include_pad = !op.maximum && rng.one_in(2);
  bool padded = op.maximum || op.count_include_pad;
  op.top = padded ? rng.between(0, op.kh / 2) : 0, op.left = padded ? rng.between(0, op.kw / 2) : 0;
  op.stride_h = pick(rng, {1, 1, 2, 3}), op.stride_w = pick(rng, {1, 1, 2, 3});
  op.n = rng.between(1, 3), op.h = rng.between(op.kh, 9), op.w = rng.between(op.kw, 9);
  op.c = pick(rng, {1, 3, 4, 7, 8, 9, 16, 17, 31, 32, 33, 48});
  op.oh = (op.h + 2 * op.top - op.kh) / op.stride_h + 1, op.ow = (op.w + 2 * op.left - op.kw) / op.stride_w + 1;
  backward_ = op;
  op.pitch = op.c + (rng.one_in(2) ? rng.between(1, 9) : 0);
  backward_.pitch = op.c + (rng.one_in(2) ? rng.between(1, 9) : 0);
  x_ = filled(rng, op.type, int64_t(op.n) * op.h * op.w, op.c, op.pitch);
  grad_ = filled(rng, op.type, int64_t(op.n) * op.oh * op.ow, op.c, backward_.pitch);
  if (rng.one_in(4)) {
    float special = rng.one_in(2) ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
    int pixel = rng.between(0, op.n * op.h * op.w - 1);
    put(op.type, x_->data(), pixel * op.pitch + rng.between(0, op.c - 1), special);
  }
  op.x = x_->data(), backward_.x = grad_->data();
  make_truth();
}

// One window after the other: its largest value or its mean, and where its gradient goes.
void TrainedPool::make_truth() {
  const TrainPoolOp &op = forward_;
  int64_t results = int64_t(op.n) * op.oh * op.ow * op.c, values = int64_t(op.n) * op.h * op.w * op.c;
  y_ = std::make_unique<Guarded>(results * size_of(op.type), false);
  taps_ = std::make_unique<Guarded>(op.maximum ? results : 1, false);
  dx_ = std::make_unique<Guarded>(values * size_of(op.type), false);
  std::vector<float> dx(values, 0.0f);
  int64_t at = 0;
  for (int n = 0; n < op.n; ++n)
    for (int oy = 0; oy < op.oh; ++oy)
      for (int ox = 0; ox < op.ow; ++ox)
        for (int c = 0; c < op.c; ++c, ++at) {
          float best = -std::numeric_limits<float>::infinity(), sum = 0;
          float grad = get(op.type, backward_.x, at / op.c * backward_.pitch + c);
          int place = -1;
          for (int tap = 0; tap < op.kh * op.kw; ++tap) {
            int y = oy * op.stride_h - op.top + tap / op.kw, x = ox * op.stride_w - op.left + tap % op.kw;
            if (y < 0 || y >= op.h || x < 0 || x >= op.w)
              continue;
            int64_t pixel = (int64_t(n) * op.h + y) * op.w + x;
            float value = get(op.type, op.x, pixel * op.pitch + c);
            sum += value;
            if (place < 0 || value > best || value != value)
              best = value, place = tap;
            if (!op.maximum)
              dx[pixel * op.c + c] += grad / static_cast<float>(op.kh * op.kw);
          }
          put(op.type, y_->data(), at, op.maximum ? best : sum / static_cast<float>(op.kh * op.kw));
          if (!op.maximum)
            continue;
          taps_->data()[at] = static_cast<unsigned char>(place);
          int y = oy * op.stride_h - op.top + place / op.kw, x = ox * op.stride_w - op.left + place % op.kw;
          dx[((int64_t(n) * op.h + y) * op.w + x) * op.c + c] += grad;
        }
  for (int64_t i = 0; i < values; ++i)
    put(op.type, dx_->data(), i, dx[i]);
}

void TrainedPool::check(const Tier &tier, const std::vector<int> &threads) const {
  for (int count : threads) {
    Guarded y(y_->bytes(), at_end_), taps(taps_->bytes(), at_end_), dx(dx_->bytes(), at_end_);
    TrainPoolOp forward = forward_, backward = backward_;
    forward.y = y.data(), backward.y = dx.data();
    forward.taps = backward.taps = forward.maximum ? taps.data() : nullptr;
    train_pool(tier, forward, count);
    train_pool_backward(tier, backward, count);
    std::string wrong = difference(y.data(), y_->data(), y.bytes());
    if (wrong.empty() && forward.maximum)
      wrong = std::string(taps.data(), taps.data() + taps.bytes()) ==
                      std::string(taps_->data(), taps_->data() + taps.bytes())
                  ? ""
                  : "places differ";
    if (wrong.empty())
      wrong = difference(dx.data(), dx_->data(), dx.bytes());
    if (!wrong.empty())
      throw std::runtime_error(std::string("tier ") + tier.name + ", " + std::to_string(count) + " threads: a pool's " +
                               wrong);
  }
}

} // namespace native_driver
