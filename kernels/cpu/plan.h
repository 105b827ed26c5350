// A compiled plan: operators with packed weights, and the call that runs them all.
#pragma once

#include "order.h"
#include "spec.h"
#include "team.h"

#include <memory>
#include <string>
#include <variant>
#include <vector>

namespace inception_fast::cpu {

// Tiers this machine can run, slowest first.
const std::vector<const Tier *> &runnable_tiers();

// Tiers that compute what another machine's would, by name only.
const std::vector<const Tier *> &emulated_tiers();

// Memory in huge pages where the system has them.
class Memory {
public:
  explicit Memory(size_t bytes);
  float *data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

private:
  struct Free {
    void operator()(float *p) const;
  };
  std::unique_ptr<float, Free> data_;
  size_t bytes_;
};

struct Shape {
  int32_t n, c, h, w;
};

struct Op {
  std::variant<ConvOp, PairOp, PoolOp, EltwiseOp, ImportOp, LrnOp, NormalizeOp> kernel;
  int step;    // a step may be several operators
  bool fence;  // must see what the operators before it did
  bool serial; // too small to share out
};

class Plan {
public:
  // What a run adds up: the wall clock's time of every step, or what each thread computed in it, [threads][steps] of
  // the seconds that the system gave it a core for.
  struct Times {
    double *steps, *shares;
  };

  // Inputs and outputs as the plan's buffers count them; `arena` is 64-byte aligned; `times` may have neither. Raises
  // std::invalid_argument before anything is written. Any number of threads may call at once.
  void run(const std::vector<Input> &inputs, const std::vector<void *> &outputs, void *arena, int threads,
           Times times) const;

  const Tier &tier() const { return *tier_; }
  size_t packed_bytes() const { return packed_ ? packed_->bytes() : 0; }
  int64_t arena_bytes() const { return arena_bytes_; }
  int steps() const { return static_cast<int>(names_.size()); }

private:
  friend class Builder;
  struct Job;

  void check(const std::vector<Input> &inputs, const std::vector<void *> &outputs, const void *arena,
             int threads) const;
  static void body(void *job, const Worker &worker, Barrier &barrier);

  const Tier *tier_ = nullptr;
  int64_t arena_bytes_ = 0;
  std::vector<Buffer> buffers_;
  std::vector<Shape> inputs_;
  std::vector<std::string> names_;
  std::vector<Op> ops_;
  std::vector<Run> runs_;
  std::shared_ptr<Memory> packed_; // of this plan and of those that share its weights
  std::vector<int64_t> packing_;   // sizes and places of the weights in packed_
  std::vector<char> finite_;       // of every convolution: whether its weights are
  std::vector<std::vector<Panel>> panels_;
  std::vector<std::vector<Chunk>> chunks_;
  std::vector<std::unique_ptr<float[]>> constants_;
  size_t scratch_bytes_ = 0;
};

} // namespace inception_fast::cpu
