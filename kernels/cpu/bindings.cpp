// The only file that knows Python. Plans arrive step by step from __init__.py; arrays are float32, C-contiguous but for
// weights.
#include "batch_norm_op.h"
#include "build.h"
#include "handover.h"
#include "openmp.h"
#include "train_conv.h"
#include "train_pool_op.h"
#include "update.h"
#include "weight_gradient_op.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <tuple>

#include <unistd.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace py = pybind11;
using namespace inception_fast::cpu;

namespace {

using Array = py::array_t<float>;
using Arrays = std::vector<Array>;
using ViewTuple = std::tuple<int32_t, int32_t, int32_t>;
using OutputTuple = std::tuple<int32_t, int32_t, int32_t, bool>;
// Sizes, stride, padding, groups, weights, scale, shift.
using ConvTuple =
    std::tuple<std::array<int32_t, 7>, std::array<int32_t, 2>, std::array<int32_t, 4>, int32_t, Arrays, Array, Array>;
using InputTuple = std::tuple<uintptr_t, std::string, std::array<int64_t, 4>>;

bool interpreter_ends() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// Python's lock given back while native code runs. Where the interpreter has begun to end meanwhile, a daemon's thread
// sleeps until the process is gone: Python would end it by unwinding, which a destructor turns into an abort.
class Unlocked {
public:
  Unlocked() : ends_(interpreter_ends()), state_(PyEval_SaveThread()) {}
  ~Unlocked() {
    while (!ends_ && interpreter_ends())
      ::pause();
    PyEval_RestoreThread(state_);
  }
  Unlocked(const Unlocked &) = delete;
  Unlocked &operator=(const Unlocked &) = delete;

private:
  bool ends_; // then this is the thread that ends it
  PyThreadState *state_;
};

ViewSpec view_of(const ViewTuple &v) { return {std::get<0>(v), std::get<1>(v), std::get<2>(v)}; }

std::optional<ViewSpec> view_of(const std::optional<ViewTuple> &v) {
  return v ? std::optional<ViewSpec>(view_of(*v)) : std::nullopt;
}

void expect_dense(const Array &array, const char *role) {
  if (!(array.flags() & py::array::c_style))
    throw std::invalid_argument(std::string(role) + " is not C-contiguous; allowed: C-contiguous float32");
}

Vector vector_of(const std::optional<Array> &array, const char *role) {
  if (!array)
    return {};
  expect_dense(*array, role);
  if (array->ndim() != 1)
    throw std::invalid_argument(std::string(role) + " has " + std::to_string(array->ndim()) +
                                " dimensions; allowed: 1");
  return {array->data(), array->size()};
}

ConvSpec spec_of(const std::array<int32_t, 7> &sizes, std::array<int32_t, 2> stride, std::array<int32_t, 4> padding,
                 int32_t groups) {
  const auto &[n, h, w, c, oc, kh, kw] = sizes;
  return {n, h, w, c, oc, kh, kw, stride, padding, groups, {}};
}

WeightArray weights_of(const Array &array) {
  WeightArray out{array.data(), {array.shape(), array.shape() + array.ndim()}, {}};
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    if (array.strides(i) % py::ssize_t(sizeof(float)) != 0)
      throw std::invalid_argument("weight with a stride of " + std::to_string(array.strides(i)) +
                                  " bytes; allowed: multiples of 4");
    out.strides.push_back(array.strides(i) / py::ssize_t(sizeof(float)));
  }
  return out;
}

ConvArrays arrays_of(const Arrays &weights, const Array &scale, const Array &shift) {
  ConvArrays out{{}, vector_of(scale, "scale"), vector_of(shift, "shift")};
  for (const Array &weight : weights)
    out.weights.push_back(weights_of(weight));
  return out;
}

std::vector<OutputSpec> outputs_of(const std::vector<OutputTuple> &outputs) {
  std::vector<OutputSpec> specs;
  for (const auto &[buffer, offset, channels, relu] : outputs)
    specs.push_back({{buffer, offset, channels}, relu});
  return specs;
}

const Tier &tier_named(const std::string &name) {
  std::string allowed;
  for (const Tier *tier : runnable_tiers()) {
    if (name == tier->name)
      return *tier;
    allowed += (allowed.empty() ? "" : ", ") + std::string(tier->name);
  }
  for (const Tier *tier : emulated_tiers())
    if (name == tier->name)
      return *tier;
  throw std::invalid_argument("tier '" + name + "'; this machine can run: " + allowed);
}

std::vector<std::string> tiers() {
  std::vector<std::string> names;
  for (const Tier *tier : runnable_tiers())
    names.emplace_back(tier->name);
  return names;
}

Type type_named(const std::string &name, const char *role, bool bytes);

// Multiply-adds a second on one core, over about `seconds`.
double peak(const std::string &tier, const std::string &dtype, double seconds) {
  using Clock = std::chrono::steady_clock;
  const Tier &found = tier_named(tier);
  Type type = type_named(dtype, "peak", false);
  Unlocked unlocked;
  float sink = 0;
  Clock::time_point start = Clock::now();
  int64_t rounds = 0, each = 0;
  double spent = 0;
  do {
    each = found.peak(type, 10000, &sink);
    rounds += 10000;
    spent = std::chrono::duration<double>(Clock::now() - start).count();
  } while (spent < seconds);
  return static_cast<double>(rounds * each) / spent;
}

double handed_over() {
  Unlocked unlocked;
  return handover();
}

Type type_named(const std::string &name, const char *role, bool bytes) {
  if (name == "float32")
    return Type::float32;
  if (name == "bfloat16")
    return Type::bfloat16;
  if (name == "uint8" && bytes)
    return Type::uint8;
  throw std::invalid_argument(std::string(role) + " of dtype " + name + "; allowed: float32, bfloat16" +
                              (bytes ? ", uint8" : ""));
}

Input input_of(const InputTuple &from) {
  const auto &[pointer, dtype, strides] = from;
  return {reinterpret_cast<const void *>(pointer),
          type_named(dtype, "input", true),
          strides[0],
          strides[1],
          strides[2],
          strides[3]};
}

void run(const Plan &plan, const std::vector<InputTuple> &inputs, const std::vector<uintptr_t> &outputs,
         uintptr_t arena, int threads, Plan::Times times) {
  std::vector<Input> from;
  for (const InputTuple &input : inputs)
    from.push_back(input_of(input));
  std::vector<void *> to;
  for (uintptr_t output : outputs)
    to.push_back(reinterpret_cast<void *>(output));
  Unlocked unlocked;
  plan.run(from, to, reinterpret_cast<void *>(arena), threads, times);
}

// Keeps the weight arrays alive until they are packed.
class PyBuilder {
public:
  PyBuilder(const std::string &tier, int64_t arena_bytes)
      : builder_(std::make_unique<Builder>(tier_named(tier), arena_bytes)) {}

  void input(int32_t n, int32_t c, int32_t h, int32_t w) { get().input({n, c, h, w}); }

  void buffer(int32_t n, int32_t h, int32_t w, int32_t c, const std::string &kind, int64_t position,
              const std::string &dtype) {
    BufferKind which = BufferKind::arena;
    if (kind == "input")
      which = BufferKind::input;
    else if (kind == "output")
      which = BufferKind::output;
    else if (kind == "local")
      which = BufferKind::local;
    else if (kind != "arena")
      throw std::invalid_argument("buffer of kind '" + kind + "'; allowed: arena, input, output, local");
    get().buffer({n, h, w, c, which, position, type_named(dtype, "buffer", false)});
  }

  void step(const std::string &name, int32_t images) { get().step(name, images); }

  void conv(const std::array<int32_t, 7> &sizes, std::array<int32_t, 2> stride, std::array<int32_t, 4> padding,
            int32_t groups, const ViewTuple &x, const Arrays &weights, const Array &scale, const Array &shift,
            const std::vector<OutputTuple> &outputs, const std::optional<ViewTuple> &residual, float residual_scale,
            std::array<int32_t, 2> tile) {
    auto left = view_of(residual);
    ConvSpec spec = spec_of(sizes, stride, padding, groups);
    spec.tile = tile;
    get().conv(spec, view_of(x), arrays_of(weights, scale, shift), outputs_of(outputs), left ? &*left : nullptr,
               residual_scale);
    keep(weights, scale, shift);
  }

  void pair(const ConvTuple &first, const ConvTuple &second, const ViewTuple &x, const ViewTuple &between,
            bool between_relu, const std::vector<OutputTuple> &outputs) {
    const auto &[sizes1, stride1, padding1, groups1, weights1, scale1, shift1] = first;
    const auto &[sizes2, stride2, padding2, groups2, weights2, scale2, shift2] = second;
    get().pair(spec_of(sizes1, stride1, padding1, groups1), spec_of(sizes2, stride2, padding2, groups2), view_of(x),
               view_of(between), between_relu, arrays_of(weights1, scale1, shift1), arrays_of(weights2, scale2, shift2),
               outputs_of(outputs));
    keep(weights1, scale1, shift1);
    keep(weights2, scale2, shift2);
  }

  void pool(const std::array<int32_t, 6> &sizes, std::array<int32_t, 2> stride, std::array<int32_t, 4> padding,
            std::array<int32_t, 2> overhang, bool maximum, bool count_include_pad, const ViewTuple &x,
            const ViewTuple &y, const std::optional<Array> &shift, bool relu) {
    const auto &[n, h, w, c, kh, kw] = sizes;
    get().pool({n, h, w, c, kh, kw, stride, padding, overhang, maximum, count_include_pad}, view_of(x), view_of(y),
               vector_of(shift, "shift"), relu);
  }

  void eltwise(const ViewTuple &x, const ViewTuple &y, const std::optional<Array> &scale,
               const std::optional<Array> &shift, bool relu, const std::optional<ViewTuple> &residual,
               float residual_scale) {
    auto left = view_of(residual);
    get().eltwise(view_of(x), view_of(y), vector_of(scale, "scale"), vector_of(shift, "shift"), relu,
                  left ? &*left : nullptr, residual_scale);
  }

  void import(int32_t source, const ViewTuple &y, const std::optional<Array> &scale,
              const std::optional<Array> &shift) {
    get().import(source, view_of(y), vector_of(scale, "scale"), vector_of(shift, "shift"));
  }

  void lrn(const ViewTuple &x, const ViewTuple &y, int32_t size, float alpha, float beta, float k) {
    get().lrn(view_of(x), view_of(y), size, alpha, beta, k);
  }

  void normalize(const ViewTuple &x, const ViewTuple &y, float eps) { get().normalize(view_of(x), view_of(y), eps); }

  std::unique_ptr<Plan> build(const Plan *like) {
    std::unique_ptr<Plan> plan;
    Builder &builder = get();
    {
      Unlocked unlocked;
      plan = builder.build(like);
    }
    builder_.reset();
    arrays_.clear();
    return plan;
  }

private:
  Builder &get() {
    if (!builder_)
      throw std::runtime_error("the plan is built; a builder serves once");
    return *builder_;
  }

  void keep(const Arrays &weights, const Array &scale, const Array &shift) {
    arrays_.insert(arrays_.end(), weights.begin(), weights.end());
    arrays_.insert(arrays_.end(), {scale, shift});
  }

  std::unique_ptr<Builder> builder_;
  Arrays arrays_;
};

template <class T> T *at(uintptr_t address) { return reinterpret_cast<T *>(address); }

// What both directions of batch norm share: the map [pixels, c], its parameters and statistics.
BatchNormOp batch_norm_of(const std::string &dtype, std::array<int64_t, 2> shape, uintptr_t x,
                          std::array<uintptr_t, 2> parameters, std::array<uintptr_t, 2> statistics, double eps) {
  BatchNormOp op{};
  op.type = type_named(dtype, "map", false);
  op.pixels = shape[0];
  op.c = static_cast<int32_t>(shape[1]);
  op.x = at<const void>(x);
  op.weight = at<const float>(parameters[0]);
  op.bias = at<const float>(parameters[1]);
  op.mean = at<float>(statistics[0]);
  op.var = at<float>(statistics[1]);
  op.eps = eps;
  return op;
}

void batch_norm_forward(const std::string &tier, const std::string &dtype, std::array<int64_t, 2> shape, uintptr_t x,
                        std::array<uintptr_t, 2> parameters, double eps, uintptr_t y,
                        std::array<uintptr_t, 2> statistics, std::array<uintptr_t, 3> running, double share,
                        int threads) {
  BatchNormOp op = batch_norm_of(dtype, shape, x, parameters, statistics, eps);
  op.y = at<void>(y);
  op.running_mean = at<float>(running[0]), op.running_var = at<float>(running[1]);
  op.batches = at<int64_t>(running[2]), op.share = share;
  const Tier &on = tier_named(tier);
  Unlocked unlocked;
  batch_norm_relu(on, op, threads);
}

void batch_norm_backward(const std::string &tier, const std::string &dtype, std::array<int64_t, 2> shape, uintptr_t x,
                         std::array<uintptr_t, 2> parameters, double eps, uintptr_t grad, int64_t grad_pitch,
                         std::array<uintptr_t, 2> statistics, std::array<uintptr_t, 3> gradients, int threads) {
  BatchNormOp op = batch_norm_of(dtype, shape, x, parameters, statistics, eps);
  op.grad = at<const void>(grad);
  op.grad_pitch = grad_pitch;
  op.y = at<void>(gradients[0]);
  op.grad_weight = at<float>(gradients[1]);
  op.grad_bias = at<float>(gradients[2]);
  const Tier &on = tier_named(tier);
  Unlocked unlocked;
  batch_norm_relu_backward(on, op, threads);
}

// maps: x and grad as (pointer, pitch of a pixel); sizes: n, h, w, c, oc, kh, kw, oh, ow; tile: (0, 0) for the direct
// sum.
void conv_weight_gradient(const std::string &tier, const std::string &dtype, std::array<int32_t, 9> sizes,
                          std::array<int32_t, 2> stride, std::array<int32_t, 2> padding, std::array<int32_t, 2> tile,
                          std::array<std::tuple<uintptr_t, int64_t>, 2> maps, uintptr_t dw, int threads) {
  WeightGradientOp op{};
  op.type = type_named(dtype, "map", false);
  std::tie(op.n, op.h, op.w, op.c, op.oc, op.kh, op.kw, op.oh, op.ow) = std::tuple_cat(sizes);
  op.stride_h = stride[0], op.stride_w = stride[1], op.top = padding[0], op.left = padding[1];
  op.tile_h = tile[0], op.tile_w = tile[1];
  op.x = at<const void>(std::get<0>(maps[0])), op.x_pitch = std::get<1>(maps[0]);
  op.grad = at<const void>(std::get<0>(maps[1])), op.grad_pitch = std::get<1>(maps[1]);
  op.dw = at<float>(dw);
  const Tier &on = tier_named(tier);
  Unlocked unlocked;
  weight_gradient(on, op, threads);
}

// maps: x and y as (pointer, pitch of a pixel); sizes: n, h, w, c, oc, kh, kw, oh, ow; the weight's strides are those
// of output channels, channels, rows of taps and taps, and the pointer is that of the first of each.
void convolve_in_training(const std::string &tier, const std::string &dtype, std::array<int32_t, 9> sizes,
                          std::array<int32_t, 2> stride, std::array<int32_t, 2> padding, std::array<int32_t, 2> tile,
                          std::array<std::tuple<uintptr_t, int64_t>, 2> maps, uintptr_t weight,
                          std::array<int64_t, 4> strides, int threads) {
  TrainConvOp op{};
  op.type = type_named(dtype, "map", false);
  op.stride_h = stride[0], op.stride_w = stride[1];
  std::tie(op.n, op.h, op.w, op.c, op.oc, op.kh, op.kw, op.oh, op.ow) = std::tuple_cat(sizes);
  op.top = padding[0], op.left = padding[1], op.tile_h = tile[0], op.tile_w = tile[1];
  op.x = at<const void>(std::get<0>(maps[0])), op.x_pitch = std::get<1>(maps[0]);
  op.y = at<void>(std::get<0>(maps[1])), op.y_pitch = std::get<1>(maps[1]);
  op.weight = at<const float>(weight);
  std::tie(op.column, op.channel, op.row, op.tap) = std::tuple_cat(strides);
  const Tier &on = tier_named(tier);
  Unlocked unlocked;
  train_conv(on, op, threads);
}

// sizes: n, h, w, c, oh, ow; window: kernel, stride, padding, each of rows and columns; map: what is read, as (pointer,
// pitch of a pixel).
void pool_in_training(const std::string &tier, const std::string &dtype, const std::string &kind, bool backward,
                      std::array<int32_t, 6> sizes, std::array<int32_t, 6> window, std::tuple<uintptr_t, int64_t> map,
                      uintptr_t y, uintptr_t taps, int threads) {
  TrainPoolOp op{};
  op.type = type_named(dtype, "map", false);
  op.maximum = kind == "max", op.count_include_pad = kind == "mean_with_padding";
  if (!op.maximum && !op.count_include_pad && kind != "mean")
    throw std::invalid_argument("pool '" + kind + "'; allowed: max, mean, mean_with_padding");
  std::tie(op.n, op.h, op.w, op.c, op.oh, op.ow) = std::tuple_cat(sizes);
  std::tie(op.kh, op.kw, op.stride_h, op.stride_w, op.top, op.left) = std::tuple_cat(window);
  op.x = at<const void>(std::get<0>(map)), op.pitch = std::get<1>(map);
  op.y = at<void>(y), op.taps = at<unsigned char>(taps);
  const Tier &on = tier_named(tier);
  Unlocked unlocked;
  (backward ? train_pool_backward : train_pool)(on, op, threads);
}

// Each parameter as pointers to itself, its gradient, square and momentum, and its length.
void rmsprop_update(const std::vector<std::array<int64_t, 5>> &parameters, std::array<double, 5> rates, int threads) {
  std::vector<RmspropPart> parts;
  for (const auto &[p, grad, square, momentum, length] : parameters)
    parts.push_back({at<float>(p), at<const float>(grad), at<float>(square), at<float>(momentum), length});
  auto [lr, decay, momentum, epsilon, weight_decay] = rates;
  Unlocked unlocked;
  rmsprop(parts, {lr, decay, momentum, epsilon, weight_decay}, threads);
}

void trim() {
#ifdef __GLIBC__
  Unlocked unlocked;
  malloc_trim(0);
#endif
}

} // namespace

PYBIND11_MODULE(_native, m) {
  m.def("tiers", &tiers);
  m.attr("CHUNK") = CHUNK;
  m.def("peak", &peak);
  m.def("handover", &handed_over);
  m.def("trim", &trim);
  m.def("leave_openmp", &leave_openmp);
  m.def("batch_norm_relu", &batch_norm_forward);
  m.def("batch_norm_relu_backward", &batch_norm_backward);
  m.def("conv_weight_gradient", &conv_weight_gradient);
  m.def("convolve_in_training", &convolve_in_training);
  m.def("pool_in_training", &pool_in_training);
  m.def("rmsprop_update", &rmsprop_update);

  py::class_<Plan>(m, "Plan")
      .def("run", [](const Plan &plan, const std::vector<InputTuple> &inputs, const std::vector<uintptr_t> &outputs,
                     uintptr_t arena, int threads) { run(plan, inputs, outputs, arena, threads, {}); })
      .def("run_timed",
           [](const Plan &plan, const std::vector<InputTuple> &inputs, const std::vector<uintptr_t> &outputs,
              uintptr_t arena, int threads) {
             std::vector<double> seconds(plan.steps());
             run(plan, inputs, outputs, arena, threads, {seconds.data(), nullptr});
             return seconds;
           })
      .def("run_shares",
           [](const Plan &plan, const std::vector<InputTuple> &inputs, const std::vector<uintptr_t> &outputs,
              uintptr_t arena, int threads) {
             std::vector<double> seconds(size_t(plan.steps()) * std::clamp(threads, 0, MAX_THREADS));
             run(plan, inputs, outputs, arena, threads, {nullptr, seconds.data()});
             return seconds;
           })
      .def_property_readonly("tier", [](const Plan &plan) { return plan.tier().name; })
      .def_property_readonly("packed_bytes", &Plan::packed_bytes)
      .def_property_readonly("arena_bytes", &Plan::arena_bytes);

  py::class_<PyBuilder>(m, "Builder")
      .def(py::init<const std::string &, int64_t>())
      .def("input", &PyBuilder::input)
      .def("buffer", &PyBuilder::buffer)
      .def("step", &PyBuilder::step)
      .def("conv", &PyBuilder::conv, py::arg("sizes"), py::arg("stride"), py::arg("padding"), py::arg("groups"),
           py::arg("x"), py::arg("weights").noconvert(), py::arg("scale").noconvert(), py::arg("shift").noconvert(),
           py::arg("outputs"), py::arg("residual"), py::arg("residual_scale"), py::arg("tile"))
      .def("pair", &PyBuilder::pair)
      .def("pool", &PyBuilder::pool)
      .def("eltwise", &PyBuilder::eltwise)
      .def("import_", &PyBuilder::import)
      .def("lrn", &PyBuilder::lrn)
      .def("normalize", &PyBuilder::normalize)
      .def("build", &PyBuilder::build, py::arg("like").none(true));
}
