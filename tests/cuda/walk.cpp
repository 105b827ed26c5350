// The walk of kernels/cuda on the emulated device, prepared by its own host arithmetic. The table is this side's own:
// tensor maps have another size here.
#include "../../kernels/cuda/walk.cuh"
#include "machine.h"

using namespace inception_fast;
using namespace inception_fast::hopper;

extern "C" {

void *emulated_allocate(uint64_t bytes, int at_end);
int emulated_free(void *data);

int emulated_walk(const HopperJob *jobs, int32_t count, int32_t type, uint64_t workspace, int32_t blocks,
                  uint64_t trace) {
  const auto complain = [](const std::string &text) {
    emulated::machine().error = text;
    return 2;
  };
  const std::vector<std::string> reasons = walk_reasons(jobs, count, type);
  if (!reasons.empty())
    return complain(reasons.front());
  const std::vector<std::vector<Unit>> lists = walk_lists(jobs, count, blocks);
  std::string refused;
  const auto checked = [&](const MapSpec &map) {
    if (const char *why = emulated::check_map(map))
      refused = why;
    return map;
  };
  const int64_t bytes = walk_table(lists, count, sizeof(Job)).bytes;
  uint8_t *table = static_cast<uint8_t *>(emulated_allocate(bytes, 0)); // begins behind a page
  if (!table)
    return complain("no memory for the table");
  write_table<TensorMap>(jobs, count, type, workspace, lists, checked, table);
  if (!refused.empty())
    return emulated_free(table), complain(refused);
  Walk walk = walk_of(lists, count, reinterpret_cast<uint64_t>(table), workspace);
  walk.trace = reinterpret_cast<uint64_t *>(trace);
  const int shared = walk_config(WALK_COLUMNS[0]).shared_bytes;
  emulated::machine().options.resident = blocks; // as a cooperative launch makes sure
  const auto kernel = [&] { type == HOPPER_BFLOAT16 ? walk_jobs<__nv_bfloat16>(walk) : walk_jobs<__half>(walk); };
  const int result = emulated::launch_grid(blocks, WALK_THREADS, 1, shared, kernel);
  return emulated_free(table) ? complain("a write beside the table") : result;
}
}
