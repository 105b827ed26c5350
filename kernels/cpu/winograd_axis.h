// Toom-Cook's algorithm along one axis: M outputs of an R-tap correlation by M + R - 1 products.
//
// y = A'[(G w) . (B' x)]: a polynomial product at the points 0, +a, -a of every `a` below, and infinity. With
// Z(t) = t * prod(t^2 - a^2), a row of B' is Z(t) / (t - p), that of infinity Z(t); a row of G is (1, p, p^2, ...)
// over Z'(p), that of infinity (0, ..., 0, 1); a column of A' is (1, p, p^2, ...), that of infinity (0, ..., 0, 1).
// All points are dyadic and few bits long, so that A' and B' are exact in float32 and G alone is rounded, with the
// weights. tests/test_winograd_transforms.py proves the identity in rational numbers.
//
// Of the points tried for each length, multiples of 1/8 up to 5/2, these gave the smallest errors; of five pairs, up to
// 7/2, the smallest growth of the rounding error in numerics.py among those with exact coefficients.
#pragma once

#include "spec.h"

namespace inception_fast::cpu {
namespace {

template <int Pairs> struct Points;
template <> struct Points<0> {
  static constexpr double a[1] = {};
};
template <> struct Points<1> {
  static constexpr double a[1] = {1};
};
template <> struct Points<2> {
  static constexpr double a[2] = {0.75, 1.5};
};
template <> struct Points<3> {
  static constexpr double a[3] = {0.5, 1, 2};
};
template <> struct Points<4> {
  static constexpr double a[4] = {0.375, 0.75, 1.25, 2.5};
};
template <> struct Points<5> {
  static constexpr double a[5] = {0.375, 0.625, 1, 1.5, 2.875};
};

// The coefficients of prod(z - a_i^2) over all pairs but `without`, from z^0 on.
template <int Pairs> struct Even {
  double of[Pairs + 1] = {1};

  constexpr explicit Even(int without) {
    int degree = 0;
    for (int i = 0; i < Pairs; ++i) {
      if (i == without)
        continue;
      double root = Points<Pairs>::a[i] * Points<Pairs>::a[i];
      of[degree + 1] = of[degree];
      for (int k = degree; k > 0; --k)
        of[k] = of[k - 1] - root * of[k];
      of[0] *= -root;
      ++degree;
    }
  }
};

// Products in the order 0, +a_0, -a_0, +a_1, ..., infinity. M = R = 1 is the axis along which nothing happens.
template <int M_, int R_> struct Axis {
  static constexpr int M = M_, R = R_, n = M + R - 1, pairs = n > 1 ? n / 2 - 1 : 0;
  static_assert(n == 1 || n % 2 == 0, "points other than 0 and infinity come in pairs");

  // Of w along this axis, at product `p`: the row of G.
  static constexpr double g(int p, int tap) {
    if (n == 1)
      return 1;
    if (p == n - 1)
      return tap == R - 1;
    if (p == 0)
      return tap == 0 ? 1 / Even<pairs>(-1).of[0] : 0;
    int pair = (p - 1) / 2;
    double a = Points<pairs>::a[pair], slope = 2 * a * a, power = 1;
    for (int i = 0; i < pairs; ++i)
      if (i != pair)
        slope *= a * a - Points<pairs>::a[i] * Points<pairs>::a[i];
    for (int i = 0; i < tap; ++i)
      power *= p % 2 ? a : -a;
    return power / slope;
  }

  // Tables, so that no kernel computes a coefficient.
  struct Coefficients {
    float ends[pairs + 1] = {};            // of the even inputs for point 0, and of the odd ones for infinity
    float even[pairs + 1][pairs + 1] = {}; // of the even inputs from the second on for the points of a pair
    float odd[pairs + 1][pairs + 1] = {};  // of the odd ones, times a
    float power[pairs + 1][M] = {};        // a^i
    float zero = 0;                        // of the first weight, for point 0
    float weight[pairs + 1][R] = {};       // of the weights, for the point a of a pair
  };
  static constexpr Coefficients coefficients() {
    Coefficients found;
    for (int i = 0; i <= pairs; ++i)
      found.ends[i] = static_cast<float>(Even<pairs>(-1).of[i]);
    for (int pair = 0; pair < pairs; ++pair) {
      double a = Points<pairs>::a[pair], power = 1;
      const Even<pairs> even(pair);
      for (int i = 0; i < pairs; ++i) {
        found.even[pair][i] = static_cast<float>(even.of[i]);
        found.odd[pair][i] = static_cast<float>(a * even.of[i]);
      }
      for (int i = 0; i < M; ++i, power *= a)
        found.power[pair][i] = static_cast<float>(power);
      for (int tap = 0; tap < R; ++tap)
        found.weight[pair][tap] = static_cast<float>(g(2 * pair + 1, tap));
    }
    found.zero = static_cast<float>(g(0, 0));
    return found;
  }
  static constexpr Coefficients table = coefficients();
};

// Calls `use` with the axes of the operator's kernel and tile; winograd_tiles() are all that there are.
template <class Op, class Use> inline auto with_axes(const Op &op, Use use) {
  using One = Axis<1, 1>;
  if (op.kh == 1 && op.kw == 3)
    return use(One{}, Axis<4, 3>{});
  if (op.kw == 1 && op.kh == 3)
    return use(Axis<4, 3>{}, One{});
  if (op.kh == 1)
    return op.tile_w == 4 ? use(One{}, Axis<4, 7>{}) : use(One{}, Axis<6, 7>{});
  if (op.kw == 1)
    return op.tile_h == 4 ? use(Axis<4, 7>{}, One{}) : use(Axis<6, 7>{}, One{});
  if (op.kh == 5)
    return op.tile_h == 2 ? use(Axis<2, 5>{}, Axis<2, 5>{}) : use(Axis<4, 5>{}, Axis<4, 5>{});
  if (op.tile_h == 2)
    return use(Axis<2, 3>{}, Axis<2, 3>{});
  return op.tile_h == 4 ? use(Axis<4, 3>{}, Axis<4, 3>{}) : use(Axis<6, 3>{}, Axis<6, 3>{});
}

} // namespace
} // namespace inception_fast::cpu
