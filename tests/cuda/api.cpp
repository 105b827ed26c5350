// The device's side of the C interface on the emulated device, so that Python runs whole plans on the kernels' own
// source. Every address counts as the device's: memory comes from whoever calls.
#include "../../kernels/cuda/api.h"
#include "../../kernels/cuda/errors.h"
#include "../../kernels/cuda/walk_api.h"

#include <cstring>

using namespace inception_fast::hopper;

extern "C" {

int emulated_conv(const HopperConv *convs, int32_t count, int32_t type, int32_t config, uint64_t workspace,
                  int32_t blocks);
int emulated_walk(const HopperJob *jobs, int32_t count, int32_t type, uint64_t workspace, int32_t blocks,
                  uint64_t trace);
void emulated_adopt(void *data, uint64_t bytes);
const char *emulated_error(void);

struct EmulatedBlob {
  int32_t count, type, config, blocks;
  uint64_t workspace;
  HopperConv convs[HOPPER_GROUP];
};

int32_t hopper_devices(void) { return 1; }

int64_t hopper_conv_blob_bytes(void) { return sizeof(EmulatedBlob); }

int32_t hopper_conv_prepare(const HopperConv *convs, int32_t count, int32_t type, int32_t config, uint64_t workspace,
                            int32_t blocks, int32_t, void *blob) {
  EmulatedBlob made{count, type, config, blocks > 0 ? blocks : 4, workspace, {}};
  std::memcpy(made.convs, convs, sizeof(HopperConv) * count);
  std::memcpy(blob, &made, sizeof made);
  return 0;
}

static void adopt_all() {
  static const bool adopted = (emulated_adopt(reinterpret_cast<void *>(4096), uint64_t{1} << 62), true);
  (void)adopted;
}

int32_t hopper_conv_launch(const void *blob, uint64_t) {
  adopt_all();
  EmulatedBlob made;
  std::memcpy(&made, blob, sizeof made);
  if (emulated_conv(made.convs, made.count, made.type, made.config, made.workspace, made.blocks))
    return fail_with(emulated_error());
  return 0;
}

// The table of the interface stays as it comes: jobs, which the launch makes its own table of.
struct EmulatedWalk {
  int32_t count, type, blocks;
  uint64_t workspace, table, trace;
};

int64_t hopper_walk_blob_bytes(void) { return sizeof(EmulatedWalk); }

int32_t hopper_walk_prepare(const HopperJob *jobs, int32_t count, int32_t type, uint64_t table, uint64_t workspace,
                            int32_t blocks, void *host_table, void *blob) {
  HopperWalkSizes sizes;
  if (hopper_walk_sizes(jobs, count, blocks, &sizes))
    return 1;
  if (static_cast<int64_t>(sizeof(HopperJob)) * count > sizes.table)
    return fail_with("a table too small for its jobs");
  std::memcpy(host_table, jobs, sizeof(HopperJob) * count);
  const EmulatedWalk made{count, type, blocks, workspace, table, 0};
  std::memcpy(blob, &made, sizeof made);
  return 0;
}

int32_t hopper_walk_traced(const void *blob, uint64_t trace, void *traced) {
  EmulatedWalk made;
  std::memcpy(&made, blob, sizeof made);
  made.trace = trace;
  std::memcpy(traced, &made, sizeof made);
  return 0;
}

int32_t hopper_walk_launch(const void *blob, uint64_t) {
  adopt_all();
  EmulatedWalk made;
  std::memcpy(&made, blob, sizeof made);
  const HopperJob *jobs = reinterpret_cast<const HopperJob *>(made.table);
  if (emulated_walk(jobs, made.count, made.type, made.workspace, made.blocks, made.trace))
    return fail_with(emulated_error());
  return 0;
}

} // extern "C"
