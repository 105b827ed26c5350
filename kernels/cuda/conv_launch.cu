// The part of the convolution's C interface that talks to the device.
#include <cstddef>
#include <cstring>

#include "conv_plan.h"
#include "conv_table.cuh"
#include "encode.h"
#include "errors.h"
#include "launch.h"

using namespace inception_fast::hopper;

namespace {

constexpr uint32_t MAGIC = 0x68636f6e; // what a blob begins with

using ConvBlob = Blob<Group>;

template <class T> const void *tile_kernel(const HopperConfig &config) {
  const int way = way_of(config);
  const int *columns = way == TWOS ? TWOS_COLUMNS : way == BEHIND ? BEHIND_COLUMNS : TILE_COLUMNS;
  int index = 0;
  while (columns[index] != config.columns)
    ++index;
  return way == HALVES  ? conv_kernel<T, HALVES>(index)
         : way == TURNS ? conv_kernel<T, TURNS>(index)
         : way == TWOS  ? conv_kernel<T, TWOS>(index)
                        : conv_kernel<T, BEHIND>(index);
}

const void *kernel_of(const HopperConfig &config, int type) {
  if (is_halo(config.turns)) {
    const HaloTile *tiles = config.pooled ? POOLED_TILES : HALO_TILES;
    int tile = 0;
    while (tiles[tile].columns != config.columns || halo_positions(tiles[tile]) != config.rows ||
           tiles[tile].warpgroups != config.turns)
      ++tile;
    if (config.pooled)
      return type == HOPPER_BFLOAT16 ? pooled_kernel<__nv_bfloat16>(tile) : pooled_kernel<__half>(tile);
    return type == HOPPER_BFLOAT16 ? halo_kernel<__nv_bfloat16>(tile) : halo_kernel<__half>(tile);
  }
  return type == HOPPER_BFLOAT16 ? tile_kernel<__nv_bfloat16>(config) : tile_kernel<__half>(config);
}

ConvBlob prepare(const HopperConv *convs, int count, int type, const HopperConfig &config, uint64_t workspace,
                 int blocks, int overlap) {
  const int device = current_device();
  ConvBlob blob{};
  for (int i = 0; i < count; ++i) {
    blob.group.x[i] = encode(x_map(convs[i], element_named(type), config));
    blob.group.weights[i] = encode(weight_map(convs[i], element_named(type), config));
    if (config.behind && convs[i].residual)
      blob.group.residual[i] = encode(residual_map(convs[i], element_named(type)));
  }
  const int64_t units = fill_problems(convs, count, config, workspace, blob.group.problem);
  fill_group(blob.group, count, units, config);
  const void *kernel = kernel_of(config, type);
  allow_shared(kernel, config.shared_bytes);
  const int grid = conv_blocks(blob.group.problem, units, config, most_blocks(blocks, device));
  blob.head = {MAGIC,
               device,
               grid,
               threads_of(config),
               config.shared_bytes,
               config.cluster,
               overlap,
               reinterpret_cast<uint64_t>(kernel)};
  return blob;
}

} // namespace

extern "C" {

int32_t hopper_devices(void) {
  return guarded(-1, [] { return fitting_devices(); });
}

int64_t hopper_conv_blob_bytes(void) { return sizeof(ConvBlob); }

int32_t hopper_conv_prepare(const HopperConv *convs, int32_t count, int32_t type, int32_t config, uint64_t workspace,
                            int32_t blocks, int32_t overlap, void *blob) {
  return guarded(1, [&] {
    const std::vector<std::string> reasons = conv_reasons(convs, count, type, config);
    if (!reasons.empty())
      return fail_with(reasons.front());
    const HopperConfig chosen = conv_configs()[config];
    if (workspace % 256 != 0 || (workspace == 0 && workspace_of(convs, count, chosen).bytes > 0))
      return fail_with("workspace at " + std::to_string(workspace) + "; allowed: multiples of 256, not 0 for split K");
    const ConvBlob made = prepare(convs, count, type, chosen, workspace, blocks, overlap);
    std::memcpy(blob, &made, sizeof made);
    return 0;
  });
}

int32_t hopper_conv_launch(const void *blob, uint64_t stream) {
  return guarded(1, [&] {
    launch_blob(blob, MAGIC, "hopper_conv_prepare", offsetof(ConvBlob, group), stream);
    return 0;
  });
}
}
