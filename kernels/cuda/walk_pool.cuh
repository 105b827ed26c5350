// y = act(pool(x) + shift) for items of 8 channels of a pixel (walk_api.h). Nothing is kept between items.
#pragma once

#include <cmath>

#include "conv.cuh"
#include "walk_schedule.h"

namespace inception_fast::hopper {

// NaN of either is the result.
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

template <class T> __device__ __forceinline__ void gather(float (&sums)[8], uint4 eight, bool maximum) {
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack<T>(words[i]);
    sums[2 * i] = maximum ? larger(sums[2 * i], two.x) : sums[2 * i] + two.x;
    sums[2 * i + 1] = maximum ? larger(sums[2 * i + 1], two.y) : sums[2 * i + 1] + two.y;
  }
}

// The item's sums or maxima over the elements first, first + each, ... of the window.
template <class T>
__device__ __forceinline__ void gather_window(float (&sums)[8], const HopperPool &pool, const Window &window,
                                              int channel, int first, int each) {
  const bool maximum = pool.kind == HOPPER_POOL_MAX;
  const int taps = pool.kh * pool.kw, kw = pool.kw, map_h = pool.h, map_w = pool.w;
  const uint32_t pitch = 2 * static_cast<uint32_t>(pool.x_pitch);
  const uint64_t x = pool.x + 2 * static_cast<uint64_t>(channel);
  const float start = maximum ? -INFINITY : 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    sums[i] = start;
  constexpr int AT_ONCE = 9;                                    // loads that are on their way together
  int tap = first, h = window.top + first / kw, w = first % kw; // kept up by hand: a division takes long
  while (tap < taps) {
    uint4 value[AT_ONCE];
    uint32_t inside = 0;
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int column = window.left + w;
      if (tap < taps && h >= 0 && h < map_h && column >= 0 && column < map_w) {
        const uint32_t pixel = static_cast<uint32_t>((window.n * map_h + h) * map_w + column);
        value[i] = load_device_16(reinterpret_cast<const uint4 *>(x + static_cast<uint64_t>(pixel) * pitch));
        inside |= 1u << i;
      }
      tap += each;
      for (w += each; w >= kw; w -= kw)
        ++h;
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (inside >> i & 1)
        gather<T>(sums, value[i], maximum);
  }
}

template <class T>
__device__ __forceinline__ void store_item(const float (&sums)[8], const HopperPool &pool, const Window &window,
                                           int pixel, int channel) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 two = make_float2(sums[2 * i], sums[2 * i + 1]);
    if (pool.kind != HOPPER_POOL_MAX)
      two = make_float2(two.x / window.divisor, two.y / window.divisor);
    if (pool.shift) {
      const float2 shift = load_constant_8(pool.shift + 4 * static_cast<uint64_t>(channel + 2 * i));
      two = make_float2(two.x + shift.x, two.y + shift.y);
    }
    words[i] = pack<T>(two.x, two.y);
    if (pool.relu)
      words[i] = relu_pair(words[i], 0xffffffffu);
  }
  store_global_16(reinterpret_cast<void *>(
                      pool.y + 2 * static_cast<uint64_t>(static_cast<int64_t>(pixel) * pool.y_pitch + channel)),
                  make_uint4(words[0], words[1], words[2], words[3]));
}

// The pool's unit number `piece`, by a warpgroup: an item a thread, or, where windows are large, an item to POOL_LANES
// neighbours, whose sums meet in the warp's staging memory and are added in their order.
template <class T>
__device__ __forceinline__ void pool_piece(const HopperPool &pool, int piece, int thread, uint32_t staged) {
  const int groups = pool.c / 8, items = pool.n * pool.oh * pool.ow * groups, lanes = pool_lanes(pool);
  const int lane = thread % 32, part = lanes == 1 ? 0 : thread % POOL_LANES;
  const int item = piece * pool_items(pool) + (lanes == 1 ? thread : thread / POOL_LANES);
  const int pixel = item / groups, channel = (item - pixel * groups) * 8;
  const Window window = window_of(pool, pixel);
  float sums[8] = {};
  if (item < items)
    gather_window<T>(sums, pool, window, channel, part, lanes);
  if (lanes > 1) {
    store_shared_16(staged + 32 * lane, make_float4(sums[0], sums[1], sums[2], sums[3]));
    store_shared_16(staged + 32 * lane + 16, make_float4(sums[4], sums[5], sums[6], sums[7]));
    sync_warp();
    if (part == 0)
      for (int other = 1; other < lanes; ++other) {
        const float4 low = load_shared_floats(staged + 32 * (lane + other));
        const float4 high = load_shared_floats(staged + 32 * (lane + other) + 16);
        const float more[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 8; ++i)
          sums[i] = pool.kind == HOPPER_POOL_MAX ? larger(sums[i], more[i]) : sums[i] + more[i];
      }
  }
  if (part == 0 && item < items)
    store_item<T>(sums, pool, window, pixel, channel);
}

} // namespace inception_fast::hopper
