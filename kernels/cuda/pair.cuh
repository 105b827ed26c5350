// a = act1(scale1 * conv(x, w1) + shift1), y = act2(scale2 * conv(a, w2) + shift2) on 17 x 17 maps: 1xn then nx1, or
// nx1 then 1xn, stride 1, SAME, in one kernel.
//
// x is [n, 17, 17, c] and y [n, 17, 17, oc] in T, pixels `pitch` elements apart; weights are [taps][oc][c], a is never
// in global memory. Sums are float32; a is rounded to T once and y once, as two convolutions would. K is summed in
// chunks of 32 channels, in each by taps, whatever the batch.
//
// A block has an image. Output channels are the rows of the products (64 a warpgroup), pixels their columns, in two
// passes, since the sums of 289 pixels do not fit into registers. A tap is the pixel operand shifted by rows of 17, so
// x crosses from L2 once a pass in place of once a tap, and groups of 8 columns that see padding alone are left out.
// Planes of 8 channels, 16 bytes a pixel, without swizzle, make every shift a legal address of a matrix descriptor. The
// first convolution writes a transposed, so that its other axis is slow, through stmatrix; TMA brings x with its zero
// rows, and weights through a ring. In a cluster of two blocks each loads half of the weights for both.
//
// Exact on an H200, at 569 TFLOP/s for 192 channels. So an operand without swizzle may begin at any row of 16 bytes and
// is read at a constant pitch from there (leading offset along K, stride offset 128 along rows), a tensor map takes
// strides that do not grow with the dimension, and boxes of 16 bytes fill shared memory fast enough.
#pragma once

#include "hopper.cuh"
#include "pair_schedule.h"
#include <utility>

namespace inception_fast::hopper {

struct PairGroup {
  TensorMap x, w1, w2;
  uint64_t scale1, shift1, scale2, shift2, y;
  int64_t pitch;
  int32_t n, c, mid, oc;
  int32_t slow, fast; // pixels of y between neighbours along the axes of the second convolution
  int32_t relu1, relu2;
  int32_t cluster; // 1 or 2
};

struct PairShared {
  uint8_t *weights, *input, *middle, *staged;
  Barrier *full, *empty, *input_full, *input_empty;
};

template <int GROUPS> __device__ __forceinline__ PairShared pair_shared() {
  PairShared s;
  s.weights = dynamic_shared();
  s.input = s.weights + weight_stages(GROUPS) * weight_bytes(GROUPS);
  s.middle = s.input + INPUT_STAGES * INPUT_PITCH;
  s.staged = s.middle + middle_channels(GROUPS) / 8 * MIDDLE_PLANE;
  s.full = reinterpret_cast<Barrier *>(s.staged + GROUPS * 4 * PAIR_STAGED);
  s.empty = s.full + MAX_WEIGHT_STAGES;
  s.input_full = s.empty + MAX_WEIGHT_STAGES;
  s.input_empty = s.input_full + INPUT_STAGES;
  return s;
}

// One warp: the weights of both convolutions, once a pass.
template <int TAPS, int GROUPS>
__device__ void load_weights(const PairGroup &p, const PairShared &s, int first, int step, int rank) {
  constexpr int STAGES = weight_stages(GROUPS), BYTES = weight_bytes(GROUPS);
  const int rows = 64 * GROUPS / p.cluster; // that this block loads
  Place place{0, 1};                        // nothing has been used yet: the first wait for an empty stage passes
  for (int image = first; image < p.n; image += step)
    for (int part = 0; part < 2 * passes(GROUPS); ++part) {
      const TensorMap *map = part < passes(GROUPS) ? &p.w1 : &p.w2;
      const int channels = part < passes(GROUPS) ? p.c : p.mid;
      for (int c = 0; c < channels; c += PAIR_DEPTH)
        for (int tap = 0; tap < TAPS; ++tap) {
          uint8_t *to = s.weights + place.stage * BYTES;
          Barrier *full = &s.full[place.stage];
          barrier_wait(&s.empty[place.stage], place.parity);
          barrier_expect(full, BYTES);
          if (p.cluster == 1)
            tma_load(to, map, full, c, 0, tap);
          else
            tma_load_multicast(to + rank * rows * WEIGHT_ROW, map, full, 3, c, rank * rows, tap);
          advance(place, STAGES);
        }
    }
}

// One warp: the channels of x, once a pass, each plane between two rows of zeros.
template <int GROUPS>
__device__ __forceinline__ void load_input(const PairGroup &p, const PairShared &s, int first, int step, int rank) {
  Place place{0, 1};
  for (int image = first; image < p.n; image += step)
    for (int pass = 0; pass < passes(GROUPS); ++pass)
      for (int c = 0; c < p.c; c += PAIR_DEPTH) {
        Barrier *full = &s.input_full[place.stage];
        barrier_wait(&s.input_empty[place.stage], place.parity);
        barrier_expect(full, INPUT_BYTES);
        tma_load(s.input + place.stage * INPUT_PITCH, &p.x, full, 0, 0, -1, c / 8, image + rank);
        advance(place, INPUT_STAGES);
      }
}

// What a consuming warp carries through the kernel.
struct PairWarp {
  uint32_t weights; // shared address of its warpgroup's rows in stage 0
  int warpgroup, warp, lane, cluster;
  Place place, input;
};

// Tells the producers of the cluster that this warp is done with a stage of weights.
__device__ __forceinline__ void release_weights(const PairShared &s, const PairWarp &w, int stage) {
  if (w.cluster == 1) {
    if (w.lane == 0)
      barrier_arrive(&s.empty[stage]);
  } else if (w.lane < w.cluster) {
    barrier_arrive_remote(&s.empty[stage], w.lane);
  }
}

// One tap of one chunk: d[low, high) += weights * pixels. `rows` is the address of the chunk's pixel 0, `plane` the
// bytes of a plane. Products of different shapes on the same registers may not be in flight together, so each tap waits
// for its own: the tensor cores have the other warpgroups' products meanwhile.
template <int TAPS, int GROUPS, int PASS, int TAP, class T>
__device__ __forceinline__ void multiply_tap(float (&d)[pass_sums(GROUPS)], const PairShared &s, PairWarp &w,
                                             uint32_t rows, uint32_t plane) {
  constexpr int LOW = tap_low(GROUPS, TAPS, PASS, TAP), COLUMNS = tap_high(GROUPS, TAPS, PASS, TAP) - LOW;
  constexpr int FIRST = pass_begin(GROUPS, PASS) + LOW + tap_shift(TAPS, TAP);
  constexpr int STAGES = weight_stages(GROUPS);
  static_assert(FIRST >= -MIDDLE_GUARD && FIRST + COLUMNS <= PIXELS + MIDDLE_GUARD, "a tap stays between the guards");
  const int stage = w.place.stage;
  barrier_wait(&s.full[stage], w.place.parity);
  const Descriptor a = matrix_descriptor(w.weights + stage * weight_bytes(GROUPS), 0, 8 * WEIGHT_ROW, Swizzle::bytes64);
  const Descriptor b = matrix_descriptor(rows + static_cast<uint32_t>(FIRST * 16), plane, 128, Swizzle::none);
  float (&sums)[COLUMNS / 2] = reinterpret_cast<float (&)[COLUMNS / 2]>(d[LOW / 2]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < PAIR_DEPTH / K_STEP; ++k)
    wgmma<COLUMNS, T>(sums, a + 2 * k, b + 2 * k * (plane >> 4), 1);
  wgmma_commit();
  wgmma_wait<0>();
  release_weights(s, w, stage);
  advance(w.place, STAGES);
}

template <int TAPS, int GROUPS, int PASS, class T, int... TAP>
__device__ __forceinline__ void multiply_taps(std::integer_sequence<int, TAP...>, float (&d)[pass_sums(GROUPS)],
                                              const PairShared &s, PairWarp &w, uint32_t rows, uint32_t plane) {
  (multiply_tap<TAPS, GROUPS, PASS, TAP, T>(d, s, w, rows, plane), ...);
}

// d = the sums of one pass over all channels. FIRST: of the first convolution, whose input comes through a ring.
template <int TAPS, int GROUPS, int PASS, bool FIRST, class T>
__device__ __forceinline__ void multiply_pass(float (&d)[pass_sums(GROUPS)], const PairShared &s, PairWarp &w,
                                              int channels) {
  constexpr std::make_integer_sequence<int, TAPS> ALL{};
#pragma unroll
  for (int i = 0; i < pass_sums(GROUPS); ++i)
    d[i] = 0;
  for (int c = 0; c < channels; c += PAIR_DEPTH) {
    if constexpr (FIRST) {
      barrier_wait(&s.input_full[w.input.stage], w.input.parity);
      const uint32_t rows = shared_address(s.input + w.input.stage * INPUT_PITCH) + SIDE * 16;
      multiply_taps<TAPS, GROUPS, PASS, T>(ALL, d, s, w, rows, INPUT_PLANE);
      if (w.lane == 0)
        barrier_arrive(&s.input_empty[w.input.stage]);
      advance(w.input, INPUT_STAGES);
    } else {
      const uint32_t rows = shared_address(s.middle) + c / 8 * MIDDLE_PLANE + MIDDLE_GUARD * 16;
      multiply_taps<TAPS, GROUPS, PASS, T>(ALL, d, s, w, rows, MIDDLE_PLANE);
    }
  }
  settle(d);
}

// What a warpgroup without output channels does in that time: it lets go of everything it is given.
template <int TAPS, int GROUPS, bool FIRST>
__device__ __forceinline__ void skip_pass(const PairShared &s, PairWarp &w, int channels) {
  for (int c = 0; c < channels; c += PAIR_DEPTH) {
    for (int tap = 0; tap < TAPS; ++tap) {
      barrier_wait(&s.full[w.place.stage], w.place.parity);
      sync_warp(); // no lane may still wait for a phase that the release lets go by
      release_weights(s, w, w.place.stage);
      advance(w.place, weight_stages(GROUPS));
    }
    if constexpr (FIRST) {
      barrier_wait(&s.input_full[w.input.stage], w.input.parity);
      sync_warp();
      if (w.lane == 0)
        barrier_arrive(&s.input_empty[w.input.stage]);
      advance(w.input, INPUT_STAGES);
    }
  }
}

// Scale and shift of the two output channels of a thread, and what its sums may not fall below.
struct Affine {
  float scale, shift, scale8, shift8, least;
};

__device__ __forceinline__ Affine affine_of(uint64_t scale, uint64_t shift, int channel, int relu) {
  const float *by = reinterpret_cast<const float *>(scale) + channel;
  const float *plus = reinterpret_cast<const float *>(shift) + channel;
  return {by[0], plus[0], by[8], plus[8], relu ? 0.0f : -INFINITY};
}

__device__ __forceinline__ float finished(float sum, float scale, float shift, float least) {
  const float v = fmaf(sum, scale, shift);
  return v < least ? least : v; // NaN stays
}

// 8 pixels of the warp's 16 channels: one 8 x 8 matrix for each 8 channels, a channel a row.
template <class T>
__device__ __forceinline__ void finish(const float *d, const Affine &a, uint32_t &low, uint32_t &high) {
  low = pack<T>(finished(d[0], a.scale, a.shift, a.least), finished(d[1], a.scale, a.shift, a.least));
  high = pack<T>(finished(d[2], a.scale8, a.shift8, a.least), finished(d[3], a.scale8, a.shift8, a.least));
}

// The sums of a pass of the first convolution into the intermediate, pixels with its other axis slow.
template <int GROUPS, int PASS, class T>
__device__ __forceinline__ void keep_pass(const float (&d)[pass_sums(GROUPS)], const Affine &a, uint32_t middle,
                                          int channel, int lane) {
  constexpr int BLOCKS = pass_columns(GROUPS, PASS) / 8;
  const uint32_t plane = middle + (channel / 8 + lane / 8 % 2) * MIDDLE_PLANE + MIDDLE_GUARD * 16;
#pragma unroll
  for (int block = 0; block < BLOCKS; block += 2) {
    const int next = block + 1 < BLOCKS ? block + 1 : block; // an odd last block is stored twice
    uint32_t m[4];
    finish<T>(&d[4 * block], a, m[0], m[1]);
    finish<T>(&d[4 * next], a, m[2], m[3]);
    const int pixel = pass_begin(GROUPS, PASS) + 8 * (lane < 16 ? block : next) + lane % 8;
    store_matrices_transposed(plane + (pixel % SIDE * SIDE + pixel / SIDE) * 16, m[0], m[1], m[2], m[3]);
  }
}

// The sums of a pass of the second convolution to y: 16 pixels at a time through the warp's staging memory, whose
// halves of 16 bytes change places every 4 rows, so that no two rows of a matrix meet in a bank.
template <int GROUPS, int PASS, class T>
__device__ __forceinline__ void store_pass(const float (&d)[pass_sums(GROUPS)], const Affine &a, const PairGroup &p,
                                           uint32_t staged, int image, int channel, int lane) {
  constexpr int BLOCKS = (pass_end(GROUPS, PASS) - pass_begin(GROUPS, PASS) + 7) / 8;
  const int row = lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
  const uint32_t to = staged + row * 32 + ((half ^ (row / 4 & 1)) << 4);
  const uint32_t from = staged + lane / 2 * 32 + ((lane % 2 ^ (lane / 8 & 1)) << 4);
#pragma unroll
  for (int block = 0; block < BLOCKS; block += 2) {
    const int next = block + 1 < BLOCKS ? block + 1 : block;
    uint32_t m[4];
    finish<T>(&d[4 * block], a, m[0], m[1]);
    finish<T>(&d[4 * next], a, m[2], m[3]);
    store_matrices_transposed(to, m[0], m[1], m[2], m[3]);
    sync_warp();
    const uint4 value = load_shared_16(from);
    const int pixel = pass_begin(GROUPS, PASS) + 8 * block + lane / 2;
    if (pixel < pass_end(GROUPS, PASS) && image < p.n) {
      const int64_t at = static_cast<int64_t>(image) * PIXELS + pixel / SIDE * p.slow + pixel % SIDE * p.fast;
      store_global_16(reinterpret_cast<void *>(p.y + 2 * static_cast<uint64_t>(at * p.pitch + channel + lane % 2 * 8)),
                      value);
    }
    sync_warp(); // the next 16 pixels may overwrite these
  }
}

// One pass of one convolution of an image by a consuming warp.
template <int TAPS, int GROUPS, int PASS, bool FIRST, class T>
__device__ __forceinline__ void run_pass(const PairGroup &p, const PairShared &s, PairWarp &w, int image) {
  const int out = FIRST ? p.mid : p.oc, in = FIRST ? p.c : p.mid;
  if (w.warpgroup * 64 >= out) {
    skip_pass<TAPS, GROUPS, FIRST>(s, w, in);
    return;
  }
  float d[pass_sums(GROUPS)];
  multiply_pass<TAPS, GROUPS, PASS, FIRST, T>(d, s, w, in);
  const int lane = renewed(w.lane), warp = renewed(w.warpgroup * 4 + w.warp), channel = 16 * warp;
  if (channel >= out)
    return; // rows of zeros below the weights
  const Affine a = FIRST ? affine_of(p.scale1, p.shift1, channel + lane / 4, p.relu1)
                         : affine_of(p.scale2, p.shift2, channel + lane / 4, p.relu2);
  if constexpr (FIRST)
    keep_pass<GROUPS, PASS, T>(d, a, shared_address(s.middle), channel, lane);
  else
    store_pass<GROUPS, PASS, T>(d, a, p, shared_address(s.staged) + warp * PAIR_STAGED, image, channel, lane);
}

template <int TAPS, int GROUPS, bool FIRST, class T, int... PASS>
__device__ __forceinline__ void run_passes(std::integer_sequence<int, PASS...>, const PairGroup &p, const PairShared &s,
                                           PairWarp &w, int image) {
  (run_pass<TAPS, GROUPS, PASS, FIRST, T>(p, s, w, image), ...);
}

// The guards of the intermediate, once: nothing else writes there.
template <int GROUPS> __device__ __forceinline__ void clear_guards(const PairShared &s, int thread) {
  constexpr int ROWS = 2 * MIDDLE_GUARD;
  for (int i = thread; i < middle_channels(GROUPS) / 8 * ROWS; i += GROUPS * 128) {
    const int row = i % ROWS < MIDDLE_GUARD ? i % ROWS : PIXELS + i % ROWS;
    store_shared_16(shared_address(s.middle) + i / ROWS * MIDDLE_PLANE + row * 16, make_uint4(0, 0, 0, 0));
  }
}

// The consumers: every warpgroup but the last.
template <int TAPS, int GROUPS, class T>
__device__ __forceinline__ void compute_pairs(const PairGroup &p, const PairShared &s, int first, int step, int rank,
                                              int thread) {
  PairWarp w;
  w.warpgroup = uniform(thread / 128);
  w.warp = uniform(thread / 32 % 4);
  w.lane = thread % 32;
  w.cluster = p.cluster;
  w.weights = shared_address(s.weights) + w.warpgroup * WEIGHT_GROUP;
  w.place = w.input = {0, 0};
  clear_guards<GROUPS>(s, thread);
  for (int image = first; image < p.n; image += step) {
    run_passes<TAPS, GROUPS, true, T>(std::make_integer_sequence<int, passes(GROUPS)>{}, p, s, w, image + rank);
    fence_async_shared();
    sync_named(1, GROUPS * 128); // the intermediate is whole
    run_passes<TAPS, GROUPS, false, T>(std::make_integer_sequence<int, passes(GROUPS)>{}, p, s, w, image + rank);
    sync_named(1, GROUPS * 128); // nobody reads it any more
  }
}

template <int TAPS, int GROUPS, class T>
__global__ void __launch_bounds__(pair_threads(GROUPS), 1) pair(const __grid_constant__ PairGroup p) {
  const PairShared s = pair_shared<GROUPS>();
  const int warp = uniform(threadIdx.x / 32), rank = p.cluster == 1 ? 0 : cluster_rank();
  // Images of a cluster lie side by side; both of its blocks take as many turns, the last one perhaps without an image.
  const int first = blockIdx.x / p.cluster * p.cluster, step = gridDim.x;
  if (threadIdx.x == 0) {
    for (int i = 0; i < weight_stages(GROUPS); ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], GROUPS * 4 * p.cluster);
    }
    for (int i = 0; i < INPUT_STAGES; ++i) {
      barrier_init(&s.input_full[i], 1);
      barrier_init(&s.input_empty[i], GROUPS * 4);
    }
    fence_barrier_init();
  }
  if (p.cluster == 1) {
    sync_block();
  } else {
    cluster_arrive();
    cluster_wait();
  }
  grid_launch_dependents();
  if (warp < 4 * GROUPS) {
    more_registers<(GROUPS == 4 ? 112 : 152)>();
    grid_wait(); // before y is written
    compute_pairs<TAPS, GROUPS, T>(p, s, first, step, rank, threadIdx.x);
  } else {
    fewer_registers<(GROUPS == 4 ? 24 : 40)>();
    if (warp == 4 * GROUPS) {
      load_weights<TAPS, GROUPS>(p, s, first, step, rank); // no earlier grid writes them
    } else if (warp == 4 * GROUPS + 1) {
      prefetch_map(&p.x);
      grid_wait(); // before x is read
      load_input<GROUPS>(p, s, first, step, rank);
    }
    sync_warp();
  }
  // The other block may still arrive at this one's barriers: their memory has to outlive that.
  if (p.cluster != 1) {
    cluster_arrive();
    cluster_wait();
  }
}

} // namespace inception_fast::hopper
