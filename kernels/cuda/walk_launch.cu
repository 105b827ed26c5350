// The part of the walk's C interface that talks to the device.
#include <cstddef>
#include <cstring>

#include "encode.h"
#include "errors.h"
#include "launch.h"
#include "walk.cuh"
#include "walk_table.h"

using namespace inception_fast::hopper;

namespace {

constexpr uint32_t MAGIC = 0x6877616c; // what a blob begins with

using WalkBlob = Blob<Walk>;

WalkBlob prepare(const HopperJob *jobs, int count, int type, uint64_t table, uint64_t workspace, int blocks,
                 uint8_t *host_table) {
  const int device = current_device();
  const std::vector<std::vector<Unit>> lists = walk_lists(jobs, count, blocks);
  write_table<TensorMap>(jobs, count, type, workspace, lists, encode, host_table);
  const void *kernel = type == HOPPER_BFLOAT16 ? reinterpret_cast<const void *>(&walk_jobs<__nv_bfloat16>)
                                               : reinterpret_cast<const void *>(&walk_jobs<__half>);
  const int shared_bytes = walk_config(WALK_COLUMNS[0]).shared_bytes;
  allow_shared(kernel, shared_bytes);
  WalkBlob blob{};
  blob.group = walk_of(lists, count, table, workspace);
  blob.head = {MAGIC, device, blocks, WALK_THREADS, shared_bytes, 1, 0, reinterpret_cast<uint64_t>(kernel), 1};
  return blob;
}

} // namespace

extern "C" {

int64_t hopper_walk_blob_bytes(void) { return sizeof(WalkBlob); }

int32_t hopper_walk_prepare(const HopperJob *jobs, int32_t count, int32_t type, uint64_t table, uint64_t workspace,
                            int32_t blocks, void *host_table, void *blob) {
  return guarded(1, [&] {
    HopperWalkSizes sizes;
    if (hopper_walk_sizes(jobs, count, blocks, &sizes))
      return 1;
    if (type != HOPPER_BFLOAT16 && type != HOPPER_FLOAT16)
      return fail_with("type " + std::to_string(type) + "; allowed: 0, 1");
    if (table == 0 || table % 128 != 0 || workspace == 0 || workspace % 256 != 0)
      return fail_with("table at " + std::to_string(table) + " and workspace at " + std::to_string(workspace) +
                       "; allowed: multiples of 128 and 256 that are not 0");
    const int most = most_blocks(0, current_device());
    if (blocks > most)
      return fail_with("blocks " + std::to_string(blocks) + "; allowed: 1 to " + std::to_string(most) +
                       ", the device's multiprocessors");
    std::vector<uint8_t> bytes(sizes.table);
    const WalkBlob made = prepare(jobs, count, type, table, workspace, blocks, bytes.data());
    std::memcpy(host_table, bytes.data(), bytes.size());
    std::memcpy(blob, &made, sizeof made);
    return 0;
  });
}

int32_t hopper_walk_traced(const void *blob, uint64_t trace, void *traced) {
  return guarded(1, [&] {
    WalkBlob made;
    std::memcpy(&made, blob, sizeof made);
    if (made.head.magic != MAGIC || trace % 8 != 0)
      return fail_with("a trace at " + std::to_string(trace) +
                       "; allowed: multiples of 8, of what hopper_walk_prepare wrote");
    made.group.trace = reinterpret_cast<uint64_t *>(trace);
    std::memcpy(traced, &made, sizeof made);
    return 0;
  });
}

int32_t hopper_walk_launch(const void *blob, uint64_t stream) {
  return guarded(1, [&] {
    launch_blob(blob, MAGIC, "hopper_walk_prepare", offsetof(WalkBlob, group), stream);
    return 0;
  });
}
}
