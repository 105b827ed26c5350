#include "update.h"

#include "parallel.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace inception_fast::cpu {

namespace {

constexpr int64_t PIECE = 16384; // values a worker takes at a time

struct Job {
  const std::vector<RmspropPart> &parts;
  float lr, decay, rest, momentum, epsilon, weight_decay;
  int64_t pieces;
};

// Plain loops: memory bounds this, and the compiler's vectors are wide enough for it.
void update(const Job &job, const RmspropPart &part, int64_t from, int64_t to) {
  float *__restrict p = part.p, *__restrict square = part.square, *__restrict momentum = part.momentum;
  const float *__restrict grad = part.grad;
  const float lr = job.lr, decay = job.decay, rest = job.rest, rate = job.momentum, epsilon = job.epsilon;
  const float weight_decay = job.weight_decay;
  for (int64_t i = from; i < to; ++i) {
    float g = grad[i] + weight_decay * p[i];
    float s = decay * square[i] + rest * g * g;
    float m = rate * momentum[i] + lr * (g / std::sqrt(s + epsilon));
    square[i] = s;
    momentum[i] = m;
    p[i] -= m;
  }
}

void body(void *pointer, const Worker &worker, const Meeting &) {
  const Job &job = *static_cast<const Job *>(pointer);
  int64_t low = job.pieces * worker.index / worker.count, high = job.pieces * (worker.index + 1) / worker.count;
  int64_t piece = 0;
  for (const RmspropPart &part : job.parts) {
    int64_t count = (part.length + PIECE - 1) / PIECE;
    int64_t first = std::max(low - piece, int64_t(0)), end = std::min(high - piece, count);
    if (first < end)
      update(job, part, first * PIECE, std::min(end * PIECE, part.length));
    piece += count;
  }
}

} // namespace

void rmsprop(const std::vector<RmspropPart> &parts, const RmspropRates &rates, int threads) {
  int64_t pieces = 0;
  for (const RmspropPart &part : parts)
    pieces += (part.length + PIECE - 1) / PIECE;
  if (threads < 1)
    throw std::invalid_argument(std::to_string(threads) + " threads; allowed: 1 or more");
  auto f = [](double value) { return static_cast<float>(value); };
  Job job{parts,
          f(rates.lr),
          f(rates.decay),
          f(1 - rates.decay),
          f(rates.momentum),
          f(rates.epsilon),
          f(rates.weight_decay),
          pieces};
  run_shared(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, pieces))), body, &job);
}

} // namespace inception_fast::cpu
