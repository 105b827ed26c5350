// The compiled forms of the kernel: one source file for each type and way of sharing tiles, so that they build in
// parallel.
#pragma once

#include <utility>

#include "conv.cuh"
#include "halo.cuh"
#include "pooled.cuh"

namespace inception_fast::hopper {

constexpr int TILE_WIDTHS = sizeof(TILE_COLUMNS) / sizeof(TILE_COLUMNS[0]);
constexpr int TWOS_WIDTHS = sizeof(TWOS_COLUMNS) / sizeof(TWOS_COLUMNS[0]);
constexpr int BEHIND_WIDTHS = sizeof(BEHIND_COLUMNS) / sizeof(BEHIND_COLUMNS[0]);

template <int WAY> constexpr int columns_at(int index) {
  return WAY == TWOS ? TWOS_COLUMNS[index] : WAY == BEHIND ? BEHIND_COLUMNS[index] : TILE_COLUMNS[index];
}

template <class T, int WAY, size_t... I> const void *conv_kernel_at(int index, std::index_sequence<I...>) {
  static const void *const kernels[] = {reinterpret_cast<const void *>(&conv<columns_at<WAY>(I), WAY, T>)...};
  return kernels[index];
}

constexpr int HALO_KINDS = sizeof(HALO_TILES) / sizeof(HALO_TILES[0]);

template <class T, size_t... I> const void *halo_kernel_at(int index, std::index_sequence<I...>) {
  static const void *const kernels[] = {reinterpret_cast<const void *>(
      &halo<HALO_TILES[I].columns, HALO_TILES[I].parts, HALO_TILES[I].warpgroups, T>)...};
  return kernels[index];
}

// The kernel for halo tiles HALO_TILES[index].
template <class T> const void *halo_kernel(int index);

template <> const void *halo_kernel<__nv_bfloat16>(int index);
template <> const void *halo_kernel<__half>(int index);

constexpr int POOLED_KINDS = sizeof(POOLED_TILES) / sizeof(POOLED_TILES[0]);

template <class T, size_t... I> const void *pooled_kernel_at(int index, std::index_sequence<I...>) {
  static const void *const kernels[] = {reinterpret_cast<const void *>(
      &pooled<POOLED_TILES[I].columns, POOLED_TILES[I].parts, POOLED_TILES[I].warpgroups, T>)...};
  return kernels[index];
}

// The kernel for halo tiles POOLED_TILES[index] whose results are pooled.
template <class T> const void *pooled_kernel(int index);

template <> const void *pooled_kernel<__nv_bfloat16>(int index);
template <> const void *pooled_kernel<__half>(int index);

// The kernel for tiles of columns_at<WAY>(index) columns.
template <class T, int WAY> const void *conv_kernel(int index);

template <> const void *conv_kernel<__nv_bfloat16, HALVES>(int index);
template <> const void *conv_kernel<__nv_bfloat16, TURNS>(int index);
template <> const void *conv_kernel<__nv_bfloat16, TWOS>(int index);
template <> const void *conv_kernel<__nv_bfloat16, BEHIND>(int index);
template <> const void *conv_kernel<__half, HALVES>(int index);
template <> const void *conv_kernel<__half, TURNS>(int index);
template <> const void *conv_kernel<__half, TWOS>(int index);
template <> const void *conv_kernel<__half, BEHIND>(int index);

} // namespace inception_fast::hopper
