// Builds a plan from its description, refusing every step that does not fit its buffers.
#pragma once

#include "pack.h"
#include "plan.h"

#include <array>
#include <memory>
#include <string>
#include <vector>

namespace inception_fast::cpu {

// As in plan.py; the pitch comes from the buffer.
struct ViewSpec {
  int32_t buffer, offset, channels;
};

// Values for `length` channels, or nothing.
struct Vector {
  const float *data = nullptr;
  int64_t length = 0;
};

struct ConvSpec {
  int32_t n, h, w, c, oc, kh, kw;
  std::array<int32_t, 2> stride;
  std::array<int32_t, 4> padding; // top, bottom, left, right
  int32_t groups;
  std::array<int32_t, 2> tile{}; // of Winograd's algorithm: one of winograd_tiles(), or none
};

struct PoolSpec {
  int32_t n, h, w, c, kh, kw;
  std::array<int32_t, 2> stride;
  std::array<int32_t, 4> padding;
  std::array<int32_t, 2> overhang;
  bool maximum, count_include_pad;
};

struct OutputSpec {
  ViewSpec view;
  bool relu;
};

// Weights of some output channels, as the caller has them: sizes to be compared with the spec, strides in floats.
struct WeightArray {
  const float *data;
  std::vector<int64_t> shape, strides;
};

// Several arrays of weights follow each other along the output channels.
struct ConvArrays {
  std::vector<WeightArray> weights;
  Vector scale, shift;
};

class Builder {
public:
  Builder(const Tier &tier, int64_t arena_bytes);

  void input(Shape shape);
  void buffer(Buffer buffer);
  // The operators that follow belong to this step, which runs so many images at a time (order.h), or all: 0. Then
  // every buffer has the batch in front; else as many images as the most that a step holds in it at a time.
  void step(std::string name, int32_t images = 0);

  // The arrays must stay where they are until build().
  void conv(const ConvSpec &spec, ViewSpec x, const ConvArrays &arrays, const std::vector<OutputSpec> &outputs,
            const ViewSpec *residual, float residual_scale);
  // The second convolution reads the first's output, a buffer of kind local that no other operator names.
  void pair(const ConvSpec &first, const ConvSpec &second, ViewSpec x, ViewSpec between, bool between_relu,
            const ConvArrays &first_arrays, const ConvArrays &second_arrays, const std::vector<OutputSpec> &outputs);
  void pool(const PoolSpec &spec, ViewSpec x, ViewSpec y, Vector shift, bool relu);
  void eltwise(ViewSpec x, ViewSpec y, Vector scale, Vector shift, bool relu, const ViewSpec *residual,
               float residual_scale);
  void import(int32_t source, ViewSpec y, Vector scale, Vector shift);
  void lrn(ViewSpec x, ViewSpec y, int32_t size, float alpha, float beta, float k);
  void normalize(ViewSpec x, ViewSpec y, float eps);

  // Packs the weights, or takes those of `like`: a plan for the same tier and the same weights, at another size. Only
  // that they fit is checked. The builder is empty afterwards.
  std::unique_ptr<Plan> build(const Plan *like);

private:
  struct Packing {
    size_t op;
    int part; // of a pair: 0 its first convolution, 1 its second
    size_t panels;
    int64_t position;
    Weights from;
  };

  [[noreturn]] void refuse(const std::string &seen, const std::string &allowed) const;
  void expect(bool condition, const std::string &seen, const std::string &allowed) const;
  View view(const ViewSpec &spec, const std::string &role) const;
  void expect_map(const View &view, const std::string &role, int32_t n, int32_t h, int32_t w, int32_t c) const;
  int32_t images_of(const View &view) const;
  int64_t pixels_of(const View &view) const;
  void expect_same_map(const View &x, const View &y) const;
  void expect_conv(const ConvSpec &spec, const ConvArrays &arrays) const;
  void expect_weights(const ConvSpec &spec, const std::vector<WeightArray> &weights) const;
  void expect_tile(const ConvSpec &spec) const;
  std::vector<Range> ranges_of(const ConvOp &op, const std::vector<OutputSpec> &outputs) const;
  ConvOp conv_op(const ConvSpec &spec, const View &x) const;
  void schedule(ConvOp &op, const ConvSpec &spec, const std::vector<Range> &ranges);
  void queue_packing(const ConvOp &op, int part, const ConvArrays &from);
  ConvOp &packed_op(const Packing &packing) const;
  const float *constant(Vector values, int32_t channels, const std::string &role);
  void add(Op op, const std::vector<View> &reads, const std::vector<View> &writes, bool in_place, int64_t work);
  std::vector<int64_t> packing() const;
  void pack_all();
  void point_at_weights();

  void order();

  std::unique_ptr<Plan> plan_;
  std::vector<Accesses> accesses_; // of every operator
  int32_t images_ = 0;             // of the step at hand
  std::vector<Packing> packings_;
  int64_t packed_ = 0;
};

} // namespace inception_fast::cpu
