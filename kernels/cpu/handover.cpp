#include "handover.h"

#include "parallel.h"
#include "team.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>

namespace inception_fast::cpu {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int RUNS = 4, ROUNDS = 256;
constexpr int64_t OVER = -1;
constexpr double LIMIT = 0.02; // seconds in all: fifty times what it takes where nobody else has the cores

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct Ball {
  alignas(128) std::atomic<int64_t> hits{0}; // odd: it is the second thread's turn
  alignas(128) double best = std::numeric_limits<double>::infinity();
};

// Waits for another value than `old`, but the one who serves no longer than the limit.
int64_t wait(const Ball &ball, int64_t old, const Clock::time_point *began) {
  for (int i = 1;; ++i) {
    int64_t hits = ball.hits.load(std::memory_order_acquire);
    if (hits != old)
      return hits;
    if (began && i % 1024 == 0 && since(*began) > LIMIT)
      return OVER;
  }
}

void serve(Ball &ball) {
  const Clock::time_point began = Clock::now();
  int64_t hits = 0;
  for (int run = 0; run < RUNS && hits != OVER; ++run) {
    Clock::time_point start = Clock::now();
    for (int i = 0; i < ROUNDS && hits != OVER; ++i) {
      ball.hits.store(hits + 1, std::memory_order_release);
      hits = wait(ball, hits + 1, &began);
    }
    if (hits != OVER)
      ball.best = std::min(ball.best, since(start) / (2 * ROUNDS));
  }
  ball.hits.store(OVER, std::memory_order_release);
}

void give_back(Ball &ball) {
  for (int64_t hits = 0; (hits = wait(ball, hits, nullptr)) != OVER; ++hits)
    if (int64_t seen = hits; !ball.hits.compare_exchange_strong(seen, hits + 1, std::memory_order_acq_rel))
      return; // over meanwhile
}

void play(void *pointer, const Worker &worker, const Meeting &meet) {
  Ball &ball = *static_cast<Ball *>(pointer);
  meet();
  if (worker.count < 2)
    return;
  worker.index == 0 ? serve(ball) : give_back(ball);
}

} // namespace

double handover() {
  Ball ball;
  if (available_cores() > 1)
    run_shared(2, play, &ball);
  return ball.best < std::numeric_limits<double>::infinity() ? ball.best : std::numeric_limits<double>::quiet_NaN();
}

} // namespace inception_fast::cpu
