#include "fuzz.h"

#include "gradient.h"
#include "scene.h"
#include "staged.h"
#include "trained_conv.h"
#include "trained_pool.h"
#include "winograd_pack.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <memory>
#include <stdexcept>

namespace native_driver {

namespace {

constexpr double EXACT = 1 << 24; // float32 holds every integer up to here

int pick(Rng &rng, std::initializer_list<int> values) {
  return values.begin()[rng.between(0, static_cast<int>(values.size()) - 1)];
}

Type any_type(Rng &rng) { return rng.one_in(2) ? Type::float32 : Type::bfloat16; }

Values maybe(Rng &rng, int count, int low, int high) {
  return rng.one_in(2) ? rng.integers(count, low, high) : Values{};
}

// Sometimes between other channels of its buffer.
Map near(Scene &scene, Rng &rng, int n, int h, int w, int c, Type type) {
  bool slice = rng.one_in(2);
  return scene.room(n, h, w, c, type, slice ? rng.between(0, 5) : 0, slice ? rng.between(0, 5) : 0);
}

Map brought(Scene &scene, Rng &rng, int n, int h, int w, int c, Type type, int special = 0) {
  int source = scene.input({n, c, h, w}, rng.one_in(4) ? Type::bfloat16 : Type::float32, special);
  Map y = near(scene, rng, n, h, w, c, type);
  scene.import(source, y, {}, {});
  return y;
}

struct ConvOptions {
  int64_t least = 0, most = 100'000; // multiply-adds, about
  bool groups = false, deep = false, scatter = false;
  int special = 0;
  bool depthwise = false;
};

ConvSpec any_conv(Rng &rng, const ConvOptions &o) {
  ConvSpec s{};
  s.n = rng.one_in(16) ? 0 : pick(rng, {1, 1, 1, 2, 3});
  s.h = rng.between(1, 11), s.w = rng.between(1, 11);
  s.c = pick(rng, {1, 2, 3, 5, 8, 15, 16, 21, 32, 48}), s.oc = pick(rng, {1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 70});
  s.kh = pick(rng, {1, 1, 2, 3, 3, 5, 7}), s.kw = pick(rng, {1, 1, 3, 3, 4, 7});
  s.stride = {pick(rng, {1, 1, 1, 2, 3}), pick(rng, {1, 1, 1, 2, 3})};
  bool same = rng.one_in(2);
  s.padding = same ? std::array<int32_t, 4>{s.kh / 2, s.kh / 2, s.kw / 2, s.kw / 2}
                   : std::array<int32_t, 4>{rng.between(0, s.kh), rng.between(0, s.kh), rng.between(0, s.kw),
                                            rng.between(0, s.kw)};
  s.groups = 1;
  if (o.groups) {
    s.groups = pick(rng, {2, 3, 4});
    s.c = s.groups * rng.between(1, 9), s.oc = s.groups * rng.between(1, 20);
  }
  if (o.deep)
    s.c = pick(rng, {288, 289, 300, 577, 600, 1153}), s.kh = rng.between(1, 2), s.kw = rng.between(1, 2);
  if (o.least > 0)
    s.n = pick(rng, {1, 2}), s.h = rng.between(9, 17), s.w = rng.between(9, 17), s.stride = {1, 1};
  if (o.depthwise) {
    s.groups = s.c = pick(rng, {2, 3, 5, 8, 16, 17, 33, 70});
    s.oc = s.c * pick(rng, {1, 1, 2, 3, 8, 19, 35});
    s.w = pick(rng, {1, 7, 33, 66, 90, 130}); // strips are at most 32 results wide
    if (rng.one_in(4))
      s.kh = rng.between(11, 19), s.kw = rng.between(15, 29); // several chunks; strips of few rows
  }
  s.h = std::max(s.h, s.kh - s.padding[0] - s.padding[1]);
  s.w = std::max(s.w, s.kw - s.padding[2] - s.padding[3]);
  auto work = [&] {
    int64_t oh = (s.h + s.padding[0] + s.padding[1] - s.kh) / s.stride[0] + 1,
            ow = (s.w + s.padding[2] + s.padding[3] - s.kw) / s.stride[1] + 1;
    return std::max(1, s.n) * oh * ow * s.kh * s.kw * (s.c / s.groups) * s.oc;
  };
  while (work() > o.most && s.oc / s.groups > 1)
    s.oc = (s.oc / s.groups + 1) / 2 * s.groups;
  while (work() < o.least)
    s.oc += 17 * s.groups;
  return s;
}

// Small enough that every partial sum is exact, whatever the order.
ConvStep step_of(Rng &rng, const ConvSpec &s, int special) {
  int64_t count = int64_t(s.oc) * (s.c / s.groups) * s.kh * s.kw;
  ConvStep step{s, rng.integers(count, -3, 3), rng.integers(s.oc, 1, 3), rng.integers(s.oc, -9, 9), 1};
  for (int i = 0; i < special; ++i)
    step.weight[rng.between(0, static_cast<int>(count) - 1)] = std::numeric_limits<float>::infinity();
  return step;
}

double bound_of(const ConvSpec &s, double x) { return 3 * (3 * x * s.kh * s.kw * (s.c / s.groups)) + 9; }

std::pair<int, int> size_of(const ConvSpec &s) {
  return {(s.h + s.padding[0] + s.padding[1] - s.kh) / s.stride[0] + 1,
          (s.w + s.padding[2] + s.padding[3] - s.kw) / s.stride[1] + 1};
}

Map conv_of(Scene &scene, Rng &rng, const Map &x, const ConvSpec &s, const ConvOptions &o) {
  auto [oh, ow] = size_of(s);
  ConvStep step = step_of(rng, s, o.special > 0 && rng.one_in(2) ? 1 : 0);
  double bound = bound_of(s, x.bound);
  if (o.scatter) {
    std::vector<Target> targets;
    Map whole = scene.room(s.n, oh, ow, s.oc + 9, any_type(rng)), last = whole;
    for (int left = s.oc, at = s.oc + 7; left > 0;) {
      int width = rng.between(1, left);
      at -= width;
      View slice = whole.view;
      slice.offset = at, slice.channels = width;
      last = rng.one_in(3) ? scene.output(s.n, oh, ow, width, any_type(rng)) : whole;
      targets.push_back({last.view.buffer == whole.view.buffer ? slice : last.view, rng.one_in(2)});
      left -= width;
    }
    scene.conv(std::move(step), x, targets, nullptr);
    return whole;
  }
  Type type = any_type(rng);
  bool relu = rng.one_in(2);
  if (rng.one_in(2)) {
    Map residual = brought(scene, rng, s.n, oh, ow, s.oc, type, o.special);
    step.residual_scale = static_cast<float>(pick(rng, {-2, 1, 2, 3}));
    Map y = rng.one_in(2) ? residual : near(scene, rng, s.n, oh, ow, s.oc, type);
    scene.conv(std::move(step), x, {{y.view, relu}}, &residual);
    y.bound = 3 * bound + residual.bound;
    return y;
  }
  Map y = rng.one_in(3) ? scene.output(s.n, oh, ow, s.oc, type) : near(scene, rng, s.n, oh, ow, s.oc, type);
  scene.conv(std::move(step), x, {{y.view, relu}}, nullptr);
  y.bound = bound;
  return y;
}

// Ranges of the columns to slices of one buffer, from its end backwards, or to outputs.
std::vector<Target> scattered(Scene &scene, Rng &rng, const ConvSpec &s, bool several, Type type) {
  auto [oh, ow] = size_of(s);
  std::vector<Target> targets;
  Map whole = scene.room(s.n, oh, ow, s.oc + 9, type);
  for (int left = s.oc, at = s.oc + 7; left > 0;) {
    int width = several ? rng.between(1, left) : left;
    at -= width;
    View slice = whole.view;
    slice.offset = at, slice.channels = width;
    bool outside = rng.one_in(3);
    targets.push_back({outside ? scene.output(s.n, oh, ow, width, type).view : slice, rng.one_in(2)});
    left -= width;
  }
  return targets;
}

// Two convolutions of which the second has no extent along one axis, so small that both are exact.
void pair_any(Scene &scene, Rng &rng) {
  bool rows = rng.one_in(2);
  int k = pick(rng, {1, 2, 3, 5, 7}), before = rng.between(0, k - 1), after = rng.between(0, k - 1);
  ConvSpec a{}, b{};
  a.n = rng.one_in(16) ? 0 : rng.between(1, 5), a.h = rng.between(1, 11), a.w = rng.between(1, 11);
  a.c = pick(rng, {1, 3, 8, 17, 33}), a.oc = pick(rng, {1, 2, 7, 16, 20}), a.groups = 1;
  a.kh = rows ? pick(rng, {1, 3, 7}) : 1, a.kw = rows ? 1 : pick(rng, {1, 3, 7});
  if (rng.one_in(3)) // enough for threads to share it
    a.c = 33, a.oc = 20, a.h = rng.between(9, 15), a.w = rng.between(9, 15);
  if (rng.one_in(4))
    std::swap(a.kh, a.kw);
  if (rng.one_in(4))
    a.kh = a.kw = 3;
  a.stride = {rng.one_in(6) ? 2 : 1, rng.one_in(6) ? 2 : 1};
  a.padding = {a.kh / 2, a.kh / 2, a.kw / 2, a.kw / 2};
  auto [h, w] = size_of(a);
  b.n = a.n, b.h = h, b.w = w, b.c = a.oc, b.oc = pick(rng, {1, 8, 15, 33, 40}), b.groups = 1;
  b.kh = rows ? 1 : k, b.kw = rows ? k : 1;
  int more = std::max(0, k - (rows ? w : h) - before - after);
  b.stride = {rows || rng.one_in(2) ? 1 : 2, rows && rng.one_in(2) ? 2 : 1};
  b.padding =
      rows ? std::array<int32_t, 4>{0, 0, before + more, after} : std::array<int32_t, 4>{before + more, after, 0, 0};
  Map x = brought(scene, rng, a.n, a.h, a.w, a.c, any_type(rng));
  std::vector<Target> targets = scattered(scene, rng, b, rng.one_in(3), any_type(rng));
  scene.pair(step_of(rng, a, 0), step_of(rng, b, 0), x, any_type(rng), rng.one_in(2), targets);
}

// With tiles of 2x2 every number is exact. With the others a sum is wrong by a few units of 1e-5: rounding to bfloat16
// takes that off where no value is near zero, between 36 and 164.
void winograd_any(Scene &scene, Rng &rng) {
  const std::vector<WinogradTile> &tiles = winograd_tiles();
  const WinogradTile &t = tiles[rng.between(0, static_cast<int>(tiles.size()) - 1)];
  bool exact = t.kh == 3 && t.h == 2;
  ConvSpec s{};
  s.n = rng.one_in(16) ? 0 : rng.between(1, 3), s.h = rng.between(1, 19), s.w = rng.between(1, 19);
  s.c = pick(rng, {1, 3, 8, 15, 16, 17, 33}), s.oc = pick(rng, {1, 8, 15, 17, 33, 48, 70});
  if (rng.one_in(3)) // few tiles and many products: threads share the panels
    s.n = 1, s.h = rng.between(1, 2 * t.h), s.w = rng.between(1, 2 * t.w), s.c = 33, s.oc = 70;
  s.kh = t.kh, s.kw = t.kw, s.stride = {1, 1}, s.groups = 1, s.tile = {t.h, t.w};
  for (int i = 0; i < 4; ++i)
    s.padding[i] = rng.one_in(2) ? (i < 2 ? s.kh : s.kw) / 2 : rng.between(0, (i < 2 ? s.kh : s.kw) - 1);
  s.h = std::max(s.h, s.kh - s.padding[0] - s.padding[1]);
  s.w = std::max(s.w, s.kw - s.padding[2] - s.padding[3]);
  Map x = brought(scene, rng, s.n, s.h, s.w, s.c, any_type(rng));
  ConvStep step = step_of(rng, s, 0);
  int taps = s.c * s.kh * s.kw;
  if (!exact) {
    std::fill(step.weight.begin(), step.weight.end(), 0.0f);
    for (int oc = 0; oc < s.oc; ++oc)
      for (int i = 0; i < 8; ++i)
        step.weight[int64_t(oc) * taps + rng.between(0, taps - 1)] = rng.one_in(2) ? 1.0f : -1.0f;
    step.scale = rng.integers(s.oc, 1, 2), step.shift = rng.integers(s.oc, 100, 100);
  }
  if (exact && rng.one_in(3)) {
    auto [oh, ow] = size_of(s);
    Map y = brought(scene, rng, s.n, oh, ow, s.oc, any_type(rng));
    step.residual_scale = static_cast<float>(pick(rng, {-2, 1, 3}));
    scene.conv(std::move(step), x, {{y.view, rng.one_in(2)}}, &y);
    return;
  }
  std::vector<Target> targets = scattered(scene, rng, s, rng.one_in(3), exact ? any_type(rng) : Type::bfloat16);
  scene.conv(std::move(step), x, targets, nullptr);
}

void one_conv(Scene &scene, Rng &rng, const ConvOptions &o) {
  ConvSpec s = any_conv(rng, o);
  conv_of(scene, rng, brought(scene, rng, s.n, s.h, s.w, s.c, any_type(rng), o.special), s, o);
}

// A kernel of one row on maps of more pixels than a block of tiles, which walk down their columns.
void conv_in_columns(Scene &scene, Rng &rng) {
  ConvSpec s{};
  s.n = rng.between(1, 2), s.h = rng.between(15, 29), s.w = rng.between(15, 29), s.c = pick(rng, {3, 8, 15, 16, 21});
  s.oc = pick(rng, {1, 9, 16, 17}), s.kh = 1, s.kw = pick(rng, {3, 4, 7}), s.groups = 1;
  s.stride = {rng.one_in(4) ? 2 : 1, rng.one_in(4) ? 2 : 1};
  s.padding = {rng.one_in(4), 0, rng.between(1, s.kw - 1), rng.between(0, s.kw - 1)};
  conv_of(scene, rng, brought(scene, rng, s.n, s.h, s.w, s.c, any_type(rng)), s, {});
}

// Kernels of several rows and columns on channels for a tile unit, sometimes on more pixels than a block of tiles.
void conv_by_lines(Scene &scene, Rng &rng) {
  ConvSpec s{};
  bool large = rng.one_in(8);
  s.n = rng.between(1, 2), s.h = rng.between(1, 20), s.w = rng.between(6, 40), s.c = pick(rng, {16, 17, 24, 32, 48});
  s.oc = pick(rng, {1, 16, 33, 64}), s.kh = rng.between(2, 5), s.kw = rng.between(2, 5), s.groups = 1;
  if (large)
    s.n = 1, s.h = rng.between(40, 50), s.w = rng.between(50, 60), s.c = 16, s.oc = 16, s.kh = 2, s.kw = 2;
  s.stride = {rng.between(1, 2), large ? 1 : rng.between(1, 2)};
  s.padding = {rng.between(0, s.kh), rng.between(0, s.kh), rng.between(0, s.kw), rng.between(0, s.kw)};
  s.h = std::max(s.h, s.kh), s.w = std::max(s.w, s.kw);
  conv_of(scene, rng, brought(scene, rng, s.n, s.h, s.w, s.c, Type::bfloat16, rng.one_in(6) ? 1 : 0), s, {});
}

// Few and odd channels of bfloat16, which straddle the taps of a row.
void conv_of_joined_taps(Scene &scene, Rng &rng) {
  ConvSpec s{};
  s.n = rng.between(1, 2), s.h = rng.between(1, 24), s.w = rng.between(1, 40), s.c = pick(rng, {1, 3, 3, 5, 15});
  s.oc = pick(rng, {1, 9, 16, 17}), s.kh = pick(rng, {2, 3, 4, 7}), s.kw = pick(rng, {2, 3, 4, 7}), s.groups = 1;
  s.stride = {rng.between(1, 2), rng.between(1, 3)};
  int most = rng.between(0, s.kw + 1);
  s.padding = {rng.between(0, s.kh), rng.between(0, s.kh), rng.between(0, most), rng.between(0, most)};
  s.h = std::max(s.h, s.kh), s.w = std::max(s.w, s.kw);
  conv_of(scene, rng, brought(scene, rng, s.n, s.h, s.w, s.c, Type::bfloat16, rng.one_in(8) ? 1 : 0), s, {});
}

PoolSpec any_pool(Rng &rng, int n, int h, int w, int c, bool maximum) {
  PoolSpec s{};
  s.n = n, s.h = h, s.w = w, s.c = c;
  s.kh = rng.between(1, std::min(h, 4)), s.kw = rng.between(1, std::min(w, 5));
  if (rng.one_in(6))
    s.kh = h, s.kw = w;
  s.stride = {rng.between(1, 3), rng.between(1, 3)};
  s.padding = {rng.between(0, s.kh - 1), rng.between(0, s.kh - 1), rng.between(0, s.kw - 1), rng.between(0, s.kw - 1)};
  // The last window starts on the map or on its padding before, never in what hangs over.
  s.overhang = {rng.between(0, s.stride[0] - 1), rng.between(0, s.stride[1] - 1)};
  auto fit = [&](int size, int kernel, int stride, int before, int after, int &over) {
    int last = (size + before + after + over - kernel) / stride * stride - before;
    if (last >= size)
      over = 0;
  };
  fit(h, s.kh, s.stride[0], s.padding[0], s.padding[1], s.overhang[0]);
  fit(w, s.kw, s.stride[1], s.padding[2], s.padding[3], s.overhang[1]);
  s.maximum = maximum, s.count_include_pad = rng.one_in(2);
  return s;
}

Map pool_of(Scene &scene, Rng &rng, const Map &x, bool maximum, bool shifts) {
  PoolSpec s = any_pool(rng, x.n, x.h, x.w, x.view.channels, maximum);
  int oh = (s.h + s.padding[0] + s.padding[1] + s.overhang[0] - s.kh) / s.stride[0] + 1,
      ow = (s.w + s.padding[2] + s.padding[3] + s.overhang[1] - s.kw) / s.stride[1] + 1;
  Map y = near(scene, rng, x.n, oh, ow, s.c, any_type(rng));
  scene.pool(s, x, y, shifts ? maybe(rng, s.c, -9, 9) : Values{}, rng.one_in(3));
  y.bound = x.bound + 9;
  y.integers = x.integers && maximum;
  return y;
}

Map some_map(Scene &scene, Rng &rng, bool large, int special = 0) {
  if (large)
    return brought(scene, rng, pick(rng, {1, 2}), rng.between(11, 17), rng.between(11, 17), rng.between(40, 90),
                   any_type(rng), special);
  return brought(scene, rng, rng.one_in(16) ? 0 : rng.between(1, 3), rng.between(1, 9), rng.between(1, 9),
                 pick(rng, {1, 3, 4, 7, 16, 17, 31, 33, 64, 65, 130}), any_type(rng), special);
}

Map eltwise_of(Scene &scene, Rng &rng, const Map &x) {
  int c = x.view.channels;
  bool in_place = rng.one_in(3), adds = rng.one_in(2);
  Map y = in_place ? x : near(scene, rng, x.n, x.h, x.w, c, any_type(rng));
  Map residual = adds ? brought(scene, rng, x.n, x.h, x.w, c, any_type(rng)) : y;
  float residual_scale = static_cast<float>(pick(rng, {-1, 1, 2}));
  scene.eltwise(x, y, maybe(rng, c, 1, 3), maybe(rng, c, -9, 9), rng.one_in(2), adds ? &residual : nullptr,
                residual_scale);
  y.bound = 2 * (3 * x.bound + 9) + residual.bound;
  return y;
}

void import_any(Scene &scene, Rng &rng) {
  int n = rng.one_in(16) ? 0 : rng.between(1, 3), h = rng.between(1, 40), w = rng.between(1, 40),
      c = rng.one_in(2) ? 3 : rng.between(1, 20);
  int source = scene.input({n, c, h, w}, static_cast<Type>(rng.between(0, 2)), 0);
  for (int i = 0; i < 2; ++i) {
    Map y = near(scene, rng, n, h, w, c, any_type(rng));
    scene.import(source, y, maybe(rng, c, 1, 3), maybe(rng, c, -9, 9));
  }
}

void lrn_any(Scene &scene, Rng &rng) {
  Map x = some_map(scene, rng, rng.one_in(4)),
      y = rng.one_in(2) ? x : near(scene, rng, x.n, x.h, x.w, x.view.channels, x.view.type);
  int size = rng.between(1, 9);
  constexpr float BETA[] = {0.5f, 0.75f, 1.0f, 2.0f};
  scene.lrn(x, y, size, 0.25f * static_cast<float>(size), BETA[rng.between(0, 3)],
            static_cast<float>(rng.between(1, 3)));
}

void normalize_any(Scene &scene, Rng &rng) {
  Map x = some_map(scene, rng, rng.one_in(4)),
      y = rng.one_in(2) ? x : near(scene, rng, x.n, x.h, x.w, x.view.channels, x.view.type);
  scene.normalize(x, y, rng.one_in(2) ? 1e-12f : 7.0f);
}

// Steps that read, overwrite and replace each other's memory.
void mix(Scene &scene, Rng &rng) {
  std::vector<Map> maps{some_map(scene, rng, true)};
  for (int steps = rng.between(4, 9); steps > 0; --steps) {
    size_t which = rng.between(0, static_cast<int>(maps.size()) - 1);
    Map x = maps[which], y = x;
    ConvSpec s{x.n, x.h, x.w, x.view.channels, rng.between(20, 40), 1, pick(rng, {1, 3}), {1, 1}, {0, 0, 0, 0}, 1};
    s.padding[2] = s.padding[3] = s.kw / 2;
    if (x.integers && rng.one_in(2) && bound_of(s, x.bound) < EXACT / 4) {
      y = conv_of(scene, rng, x, s, {});
    } else if (x.integers && rng.one_in(2) && x.bound < EXACT / 64) {
      y = eltwise_of(scene, rng, x);
      if (y.view.buffer == x.view.buffer)
        maps.erase(maps.begin() + which);
    } else {
      y = pool_of(scene, rng, x, !x.integers || rng.one_in(2), x.integers);
    }
    if (maps.size() > 1 && rng.one_in(2)) {
      size_t dead = rng.between(0, static_cast<int>(maps.size()) - 1);
      scene.retire(maps[dead]);
      maps.erase(maps.begin() + dead);
    }
    maps.push_back(y);
  }
}

// An operation of training, which is no step of a plan.
struct Alone {
  virtual ~Alone() = default;
  virtual void check(const Tier &tier, const std::vector<int> &threads) const = 0;
};

template <class Made, auto... Options> struct AloneOf : Alone {
  Made made;
  explicit AloneOf(Rng &rng) : made(rng, Options...) {}
  void check(const Tier &tier, const std::vector<int> &threads) const override { made.check(tier, threads); }
};

template <class Made, auto... Options> std::unique_ptr<Alone> alone(Rng &rng) {
  return std::make_unique<AloneOf<Made, Options...>>(rng);
}

struct Test {
  const char *name, *about;
  void (*make)(Scene &, Rng &);
  int callers;
  std::unique_ptr<Alone> (*make_alone)(Rng &) = nullptr; // in the place of `make`
};

const Test TESTS[] = {
    {"conv", "any size, stride, padding, residual and type", [](Scene &s, Rng &r) { one_conv(s, r, {}); }, 1},
    {"groups", "grouped convolutions", [](Scene &s, Rng &r) { one_conv(s, r, {0, 100'000, true}); }, 1},
    {"deep", "sums of several chunks", [](Scene &s, Rng &r) { one_conv(s, r, {0, 200'000, false, true}); }, 1},
    {"long", "many channels of many pixels",
     [](Scene &s, Rng &r) { one_conv(s, r, {1'000'000, 8'000'000, false, true}); }, 1},
    {"scatter", "outputs to several places", [](Scene &s, Rng &r) { one_conv(s, r, {0, 100'000, false, false, true}); },
     1},
    {"specials", "infinities and NaN in maps and weights",
     [](Scene &s, Rng &r) {
       if (r.one_in(2))
         one_conv(s, r, {0, 50'000, false, false, false, 1});
       else
         pool_of(s, r, some_map(s, r, false, 3), r.one_in(2), true);
     },
     1},
    {"shared", "convolutions that threads share", [](Scene &s, Rng &r) { one_conv(s, r, {210'000, 500'000}); }, 1},
    {"maximum", "maximum pools", [](Scene &s, Rng &r) { pool_of(s, r, some_map(s, r, r.one_in(4)), true, true); }, 1},
    {"average", "average pools", [](Scene &s, Rng &r) { pool_of(s, r, some_map(s, r, r.one_in(4)), false, true); }, 1},
    {"eltwise", "scale, shift, residual, ReLU", [](Scene &s, Rng &r) { eltwise_of(s, r, some_map(s, r, r.one_in(4))); },
     1},
    {"import", "tensors of any strides and type", import_any, 1},
    {"lrn", "local response normalisation", lrn_any, 1},
    {"normalize", "L2 normalisation", normalize_any, 1},
    {"mix", "steps that wait for each other", mix, 1},
    {"callers", "one plan called by four threads at once", mix, 4},
    {"pair", "two convolutions as one operator", pair_any, 1},
    {"winograd", "tiles of Winograd's algorithm", winograd_any, 1},
    {"weight_gradient", "sums over pixels, for training", nullptr, 1, alone<Gradient, false>},
    {"gradient_tiles", "those sums by Winograd's tiles", nullptr, 1, alone<Gradient, true>},
    {"train_conv", "convolutions of bfloat16, for training", nullptr, 1, alone<TrainedConv, false>},
    {"train_tiles", "the same by Winograd's tiles", nullptr, 1, alone<TrainedConv, true>},
    {"train_pool", "pools that remember, and their gradients", nullptr, 1, alone<TrainedPool>},
    {"columns", "blocks of tiles that walk down the columns of maps", conv_in_columns, 1},
    {"stages", "steps that run few images at a time before others", nullptr, 1, alone<Staged>},
    {"joined", "few and odd channels of bfloat16", conv_of_joined_taps, 1},
    {"depthwise", "output channels that read one channel each",
     [](Scene &s, Rng &r) {
       one_conv(s, r, {r.one_in(3) ? 210'000 : 0, 400'000, false, false, r.one_in(4), r.one_in(8) ? 1 : 0, true});
     },
     1},
    {"lines", "rows of taps on channels of bfloat16 for a tile unit", conv_by_lines, 1},
};

} // namespace

std::vector<std::pair<std::string, std::string>> fuzz_tests() {
  std::vector<std::pair<std::string, std::string>> names;
  for (const Test &test : TESTS)
    names.emplace_back(test.name, test.about);
  return names;
}

// Those that run here, or the one named, which may be an emulation.
static std::vector<const Tier *> tiers_of(const std::string &name) {
  std::vector<const Tier *> found = runnable_tiers();
  if (name == "all")
    return found;
  found.insert(found.end(), emulated_tiers().begin(), emulated_tiers().end());
  found.erase(std::remove_if(found.begin(), found.end(), [&](const Tier *tier) { return name != tier->name; }),
              found.end());
  return found;
}

int fuzz(const Fuzz &options) {
  const std::vector<const Tier *> tiers = tiers_of(options.tier);
  int plans = 0;
  for (const Test &test : TESTS)
    for (int seed = options.seed; seed < options.seed + options.seeds; ++seed) {
      if (options.test != "all" && options.test != test.name)
        continue;
      Rng rng{std::mt19937(static_cast<unsigned>(seed * 64 + (&test - TESTS)))};
      Scene scene(rng);
      std::unique_ptr<Alone> operation = test.make_alone ? test.make_alone(rng) : nullptr;
      if (!operation)
        test.make(scene, rng);
      std::vector<int> threads{1, rng.one_in(4) ? rng.between(5, 17) : rng.between(2, 4)};
      for (const Tier *tier : tiers) {
        try {
          operation ? operation->check(*tier, threads) : scene.check(*tier, threads, test.callers);
        } catch (const std::exception &error) {
          throw std::runtime_error(std::string(test.name) + ", seed " + std::to_string(seed) + ", " + error.what());
        }
        ++plans;
      }
    }
  if (plans == 0)
    throw std::invalid_argument("no plan of test '" + options.test + "' and tier '" + options.tier + "' ran");
  return plans;
}

} // namespace native_driver
