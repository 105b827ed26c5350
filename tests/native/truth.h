// Every operator of a plan one element after the other, in double where rounding is no part of its definition.
#pragma once

#include "build.h"
#include "memory.h"

namespace native_driver {

// What a plan's views lie in.
struct Maps {
  std::vector<void *> bases;
  std::vector<Input> inputs;
};

struct Target {
  View y;
  bool relu;
};

using Values = std::vector<float>; // empty: none

void conv(const Maps &maps, const ConvSpec &spec, const View &x, const Values &weight, const Values &scale,
          const Values &shift, const std::vector<Target> &targets, const View *residual, float residual_scale);
void pool(const Maps &maps, const PoolSpec &spec, const View &x, const View &y, const Values &shift, bool relu);
void eltwise(const Maps &maps, int64_t pixels, const View &x, const View &y, const Values &scale, const Values &shift,
             bool relu, const View *residual, float residual_scale);
void import(const Maps &maps, int source, const Shape &shape, const View &y, const Values &scale, const Values &shift);
void lrn(const Maps &maps, int64_t pixels, const View &x, const View &y, int size, float alpha, float beta, float k);
void normalize(const Maps &maps, int64_t pixels, const View &x, const View &y, float eps);

} // namespace native_driver
