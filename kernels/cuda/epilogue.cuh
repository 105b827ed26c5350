// y = act(residual + residual_scale * (scale * sum + shift)): from a warpgroup's sums to memory, whatever made them.
//
// A warp has 16 rows of sums, N columns, in the fragments of wgmma. Which pixel of y a row is, the caller says:
// `rows(r)`, r = 0..15, is the index of the pixel that the warp's row r belongs to, in y and in the residual, or -1
// where nothing may be stored. Columns go to the outputs that own them.
//
// What columns have in common is fetched once a tile, while products still run: `load_columns` begins to read it into
// registers, `keep_columns` puts it into the warpgroup's part of shared memory, where `store_tile` finds it. Two
// barriers of the warpgroup are the caller's to place: one between the last store_tile and keep_columns, one between
// keep_columns and the next store_tile.
//
// Sums are scaled, added to and rounded once, 64 columns at a time, go through the warp's 2 KiB of staging memory and
// leave it 16 bytes a lane, a row of 128 bytes by eight lanes. Or they stay there, in memory for all columns of a tile,
// where `stage_tile` puts them and another warp finds them (`store_staged`); there the residual lies in their place.
#pragma once

#include "conv_sizes.h"
#include "hopper.cuh"
#include "schedule.h"

namespace inception_fast::hopper {

// One thread's share of what the columns have in common.
struct ColumnsShare {
  float4 affine; // scale and shift of two columns: scale, scale, shift, shift
  uint4 target;  // of 8 columns: address of the first at pixel 0 or 0, bytes between pixels, all bits where ReLU is
};

// The share of thread `thread` of the warpgroup in the N columns from `column` on. Columns past the last get 0.
template <int N> __device__ __forceinline__ ColumnsShare load_columns(const Problem &problem, int column, int thread) {
  ColumnsShare share{make_float4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
  const int two = column + 2 * thread, eight = column + 8 * thread;
  if (2 * thread < N && two < problem.oc) {
    const float2 scale = load_constant_8(problem.scale + 4 * static_cast<uint64_t>(two));
    const float2 shift = load_constant_8(problem.shift + 4 * static_cast<uint64_t>(two));
    share.affine = make_float4(scale.x, scale.y, shift.x, shift.y);
  }
  if (8 * thread < N && eight < problem.oc) {
    const int output = output_of(problem, eight);
    const uint64_t address = element_address(problem, output, 0, eight);
    share.target = make_uint4(static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32),
                              2 * static_cast<uint32_t>(problem.output[output].pitch),
                              problem.output[output].relu ? 0xffffffffu : 0);
  }
  return share;
}

// Puts a thread's share where the warpgroup's columns are kept: columns_bytes(N) at shared address `columns`.
template <int N> __device__ __forceinline__ void keep_columns(uint32_t columns, const ColumnsShare &share, int thread) {
  if (2 * thread < N)
    store_shared_16(columns + 16 * thread, share.affine);
  if (8 * thread < N)
    store_shared_16(columns + 8 * N + 16 * thread, share.target);
}

// Zero in place of the negative of two 16-bit floats, where `relu` has bits: rounding keeps the sign, so this is ReLU
// before it, too.
__device__ __forceinline__ uint32_t relu_pair(uint32_t pair, uint32_t relu) {
  return pair & ~(sign_halves(pair) & relu);
}

// Address in a warp's staging memory of 8 columns, rotated so that neither rows nor columns meet in a bank.
__device__ __forceinline__ uint32_t staged_address(uint32_t base, int row, int group) {
  return base + row * (STAGED_COLUMNS * 2) + ((group ^ (row & 7)) << 4);
}

// Begins to bring the residual of the warp's 16 rows and the tile's N columns into the level 2 cache: memory takes a
// microsecond, which products hide where this comes ahead of them. 16 columns a lane and step.
template <int N, class Rows>
__device__ __forceinline__ void prefetch_residual(const Problem &problem, const Rows &rows, int column, int lane) {
  constexpr int PIECES = (N + 15) / 16;
  if (!problem.residual)
    return;
#pragma unroll
  for (int i = 0; i < PIECES / 2 + PIECES % 2; ++i) {
    const int piece = 32 * i + lane, pixel = piece < 16 * PIECES ? rows(piece / PIECES) : -1;
    const int own = column + 16 * (piece % PIECES);
    if (pixel >= 0 && own < problem.oc)
      prefetch_global(reinterpret_cast<const void *>(
          problem.residual +
          2 * (static_cast<uint64_t>(static_cast<uint32_t>(pixel)) * static_cast<uint32_t>(problem.residual_pitch) +
               static_cast<uint32_t>(own))));
  }
}

// The residual of 64 columns of a tile, from its FIRST on, as it is staged: 8 columns a lane, of four rows.
template <int N, int FIRST>
__device__ __forceinline__ void load_residual(uint4 (&values)[4], const Problem &problem, const int (&pixel)[4],
                                              int column, int group) {
  const int own = column + FIRST + 8 * group;
  const uint64_t from = problem.residual + 2 * static_cast<uint64_t>(own);
  const uint32_t pitch = 2 * static_cast<uint32_t>(problem.residual_pitch);
#pragma unroll
  for (int pass = 0; pass < 4; ++pass)
    if (FIRST + 8 * group < N && own < problem.oc && pixel[pass] >= 0)
      values[pass] = load_global_16(
          reinterpret_cast<const void *>(from + static_cast<uint64_t>(static_cast<uint32_t>(pixel[pass])) * pitch));
}

// Scales, adds and rounds the warp's sums of 8 columns, group `group` of what is staged: `low` holds row lane / 4,
// `high` the row 8 below. `affine` is the shared address of the lane's two columns.
template <class T, bool RESIDUAL>
__device__ __forceinline__ void finish(const float *d, uint32_t affine, float residual_scale, uint32_t staged,
                                       int group, int lane, uint32_t &low, uint32_t &high) {
  const float4 by = load_shared_floats(affine);
  float2 top = make_float2(fmaf(d[0], by.x, by.z), fmaf(d[1], by.y, by.w));
  float2 bottom = make_float2(fmaf(d[2], by.x, by.z), fmaf(d[3], by.y, by.w));
  if constexpr (RESIDUAL) {
    const uint32_t word = 4 * (lane % 4);
    const float2 above = unpack<T>(load_shared_4(staged_address(staged, lane / 4, group) + word));
    const float2 below = unpack<T>(load_shared_4(staged_address(staged, lane / 4 + 8, group) + word));
    top = make_float2(fmaf(top.x, residual_scale, above.x), fmaf(top.y, residual_scale, above.y));
    bottom = make_float2(fmaf(bottom.x, residual_scale, below.x), fmaf(bottom.y, residual_scale, below.y));
  }
  low = pack<T>(top.x, top.y);
  high = pack<T>(bottom.x, bottom.y);
}

// The staged rows to memory: 8 columns a lane, of four rows, all read before the first is stored.
__device__ __forceinline__ void store_rows(uint32_t staged, uint4 target, const int (&pixel)[4], int lane) {
  const uint64_t address = target.x | static_cast<uint64_t>(target.y) << 32;
  uint4 value[4];
#pragma unroll
  for (int pass = 0; pass < 4; ++pass)
    value[pass] = load_shared_16(staged_address(staged, pass * 4 + lane / 8, lane % 8));
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const uint4 v = make_uint4(relu_pair(value[pass].x, target.w), relu_pair(value[pass].y, target.w),
                               relu_pair(value[pass].z, target.w), relu_pair(value[pass].w, target.w));
    const uint64_t to = address + static_cast<uint64_t>(static_cast<uint32_t>(pixel[pass])) * target.z;
    store_global_16_if(address != 0 && pixel[pass] >= 0, reinterpret_cast<void *>(to), v);
  }
}

// Scales, adds and rounds the warp's sums of a part, GROUPS times 8 columns from the tile's FIRST on, into its staging
// memory, AT_ONCE at a time, as many as registers allow.
template <int N, int FIRST, int GROUPS, class T, bool RESIDUAL, int AT_ONCE>
__device__ __forceinline__ void stage_part(const float (&d)[N / 2], const Problem &problem, uint32_t columns,
                                           uint32_t staged, int lane) {
#pragma unroll
  for (int at = 0; at < GROUPS; at += AT_ONCE) {
    uint32_t low[AT_ONCE], high[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (at + i < GROUPS)
        finish<T, RESIDUAL>(&d[(FIRST / 8 + at + i) * 4], columns + 8 * FIRST + 64 * (at + i) + 16 * (lane % 4),
                            problem.residual_scale, staged, at + i, lane, low[i], high[i]);
    if constexpr (RESIDUAL)
      sync_warp(); // every lane has read its residual
#pragma unroll
    for (int i = 0; i < AT_ONCE; i += 2)
      if (at + i < GROUPS)
        store_matrices(staged_address(staged, lane % 16, at + i + lane / 16), low[i], high[i], low[i + 1], high[i + 1]);
  }
}

// The warp's sums of the columns from the tile's FIRST on. `residual` holds that of the first 64 of them.
template <int N, int FIRST, class T, bool RESIDUAL, bool LEAN>
__device__ __forceinline__ void store_parts(const float (&d)[N / 2], const Problem &problem, uint32_t columns,
                                            uint32_t staged, const int (&pixel)[4], int column, int lane,
                                            uint4 (&residual)[4]) {
  constexpr int NEXT = FIRST + STAGED_COLUMNS, GROUPS = (NEXT < N ? STAGED_COLUMNS : N - FIRST) / 8;
  const int group = lane % 8; // the lane's columns at the stores
  if constexpr (RESIDUAL) {
#pragma unroll
    for (int pass = 0; pass < 4; ++pass)
      store_shared_16(staged_address(staged, pass * 4 + lane / 8, group), residual[pass]);
    if constexpr (NEXT < N) // as soon as there are registers for it
      load_residual<N, NEXT>(residual, problem, pixel, column, group);
    sync_warp();
  }
  uint4 target = make_uint4(0, 0, 0, 0);
  if (group < GROUPS)
    target = load_shared_16(columns + 8 * N + 2 * FIRST + 16 * group);
  stage_part<N, FIRST, GROUPS, T, RESIDUAL, (RESIDUAL || LEAN ? 4 : GROUPS)>(d, problem, columns, staged, lane);
  sync_warp();
  store_rows(staged, target, pixel, lane);
  sync_warp(); // the next columns, or the next tile's, may overwrite these
  if constexpr (NEXT < N)
    store_parts<N, NEXT, T, RESIDUAL, LEAN>(d, problem, columns, staged, pixel, column, lane, residual);
}

// The sums of the calling warp's 16 rows to the outputs of their columns, N from `column` on. `columns` is where
// keep_columns put what these have in common, `staged` the warp's staging memory, both shared addresses. LEAN: there is
// no residual, and there are few registers.
template <int N, class T, bool LEAN = false, class Rows>
__device__ __forceinline__ void store_tile(const float (&d)[N / 2], const Problem &problem, uint32_t columns,
                                           uint32_t staged, const Rows &rows, int column, int lane) {
  lane = renewed(lane);
  int pixel[4]; // of the rows that the lane stores
#pragma unroll
  for (int pass = 0; pass < 4; ++pass)
    pixel[pass] = rows(pass * 4 + lane / 8);
  uint4 residual[4] = {};
  if (!LEAN && problem.residual) {
    load_residual<N, 0>(residual, problem, pixel, column, lane % 8);
    store_parts<N, 0, T, true, LEAN>(d, problem, columns, staged, pixel, column, lane, residual);
  } else {
    store_parts<N, 0, T, false, LEAN>(d, problem, columns, staged, pixel, column, lane, residual);
  }
}

// The warp's results of the columns from the tile's FIRST on, each part of 64 in its own staging memory, 4 *
// STAGED_BYTES behind the part before.
template <int N, int FIRST, class T, bool RESIDUAL>
__device__ __forceinline__ void stage_parts(const float (&d)[N / 2], const Problem &problem, uint32_t columns,
                                            uint32_t staged, int lane) {
  constexpr int NEXT = FIRST + STAGED_COLUMNS, GROUPS = (NEXT < N ? STAGED_COLUMNS : N - FIRST) / 8;
  stage_part<N, FIRST, GROUPS, T, RESIDUAL, (RESIDUAL ? 4 : GROUPS)>(d, problem, columns, staged, lane);
  if constexpr (NEXT < N)
    stage_parts<N, NEXT, T, RESIDUAL>(d, problem, columns, staged + 4 * STAGED_BYTES, lane);
}

// The sums of the calling warp's 16 rows, N columns, into staging memory, where a residual lies already. Whoever stores
// them reads them behind a barrier.
template <int N, class T>
__device__ __forceinline__ void stage_tile(const float (&d)[N / 2], const Problem &problem, uint32_t columns,
                                           uint32_t staged, int lane) {
  lane = renewed(lane);
  if (problem.residual)
    stage_parts<N, 0, T, true>(d, problem, columns, staged, lane);
  else
    stage_parts<N, 0, T, false>(d, problem, columns, staged, lane);
}

// What `stage_tile` of a warpgroup's four warps left of part `part`, 64 columns, to memory, by one warp: `first` is the
// pixel of the first of 64 rows, each the pixel behind the one before, and those past the last are not stored.
template <int N>
__device__ __forceinline__ void store_staged(const Problem &problem, uint32_t columns, uint32_t staged, int part,
                                             int first, int lane) {
  uint4 target = make_uint4(0, 0, 0, 0);
  if (part * STAGED_COLUMNS + 8 * (lane % 8) < N)
    target = load_shared_16(columns + 8 * N + 2 * STAGED_COLUMNS * part + 16 * (lane % 8));
#pragma unroll 2
  for (int warp = 0; warp < 4; ++warp) {
    int pixel[4];
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      const int at = first + warp * WARP_ROWS + pass * 4 + lane / 8;
      pixel[pass] = at < problem.pixels ? at : -1;
    }
    store_rows(staged + (4 * part + warp) * STAGED_BYTES, target, pixel, lane);
  }
}

} // namespace inception_fast::hopper
