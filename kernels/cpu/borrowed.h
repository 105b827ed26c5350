// Kernels of one tier in the table of another, which has no better ones: `borrowed<avx512_bf16_tier, &Tier::pool>`.
// Called through the other's table, so nothing of it is compiled a second time.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {
namespace {

template <const Tier &tier, auto kernel, class Op> void borrowed(const Op &op, const Call &call, const Worker &worker) {
  (tier.*kernel)(op, call, worker);
}

template <const Tier &tier, auto scratch> size_t borrowed_scratch(const ConvOp &op) { return (tier.*scratch)(op); }

} // namespace
} // namespace inception_fast::cpu
