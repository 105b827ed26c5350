// Global memory of the emulated device: blocks between forbidden pages, with guard bands where a block ends before its
// page.
#include "machine.h"
#include "primitives.h"
#include <algorithm>
#include <sys/mman.h>
#include <unistd.h>

namespace inception_fast::emulated {

namespace {

struct Block {
  uint8_t *mapping, *data;
  size_t mapped, bytes;
  bool adopted;         // memory of somebody else: nothing around it is forbidden
  bool earlier = false; // an earlier grid may still write here
};

// Host code allocates, so there is no concurrent use.
std::vector<Block> &blocks() {
  static std::vector<Block> all;
  return all;
}

bool guards_intact(const Block &block) {
  size_t page = size_t(sysconf(_SC_PAGESIZE));
  for (uint8_t *p = block.mapping + page; p < block.mapping + block.mapped - page; p++)
    if ((p < block.data || p >= block.data + block.bytes) && *p != kPoisonByte)
      return false;
  return true;
}

} // namespace

bool inside_a_block(const void *address, uint64_t bytes) {
  const uint8_t *from = static_cast<const uint8_t *>(address);
  for (const Block &block : blocks())
    if (from >= block.data && from + bytes <= block.data + block.bytes)
      return true;
  return false;
}

bool in_the_gap_of_a_block(const void *address) {
  const uint8_t *at = static_cast<const uint8_t *>(address);
  for (const Block &block : blocks())
    if (at >= block.mapping && at < block.mapping + block.mapped)
      return true;
  return false;
}

void earlier_grid_uses(const void *address) {
  for (Block &block : blocks())
    block.earlier |= !block.adopted && address >= block.data && address < block.data + block.bytes;
}

void earlier_grid_has_ended() {
  for (Block &block : blocks())
    block.earlier = false;
}

void check_earlier_grid(const void *address, const char *what) {
  if (self().grid_waited)
    return;
  for (const Block &block : blocks())
    if (block.earlier && address >= block.data && address < block.data + block.bytes)
      fail("%s at %p, which an earlier grid may still use: no grid_wait of this thread is ahead of it", what, address);
}

void check_global(const void *address, int bytes, const char *what) {
  maybe_yield();
  if (uintptr_t(address) % uintptr_t(bytes))
    fail("%s of %d bytes at %p; allowed: multiples", what, bytes, address);
  if (!inside_a_block(address, uint64_t(bytes)))
    fail("%s of %d bytes at %p, outside of every block of global memory", what, bytes, address);
  check_earlier_grid(address, what);
}

void prefetched_global() { ++machine().prefetches; }

void stored_global(const void *address) {
  Fiber &fiber = self();
  fiber.unordered.push_back(uintptr_t(address) / 16);
  machine().unordered[uintptr_t(address) / 16]++;
}

void fence_async_global() {
  auto &all = machine().unordered;
  for (uintptr_t at : self().unordered)
    if (--all[at] == 0)
      all.erase(at);
  self().unordered.clear();
}

void check_ordered(const void *address, uint64_t bytes, const char *what) {
  const auto &all = machine().unordered;
  if (all.empty())
    return;
  for (uintptr_t at = uintptr_t(address) / 16; at <= (uintptr_t(address) + bytes - 1) / 16; at++)
    if (all.count(at))
      fail("%s of %p, which a thread stored without a fence_async_global since", what,
           reinterpret_cast<void *>(at * 16));
}

namespace {

bool counted(const Fiber &fiber) {
  return *static_cast<const volatile uint32_t *>(fiber.wait.object) >= fiber.wait.value;
}

std::string describe_count(const Fiber &fiber) {
  return "a counter at " + std::to_string(*static_cast<const uint32_t *>(fiber.wait.object)) + " of " +
         std::to_string(fiber.wait.value);
}

} // namespace

void wait_for_count(const uint32_t *counter, uint32_t value) {
  check_global(counter, 4, "a counter");
  block_until({counted, counter, value, describe_count});
}

} // namespace inception_fast::emulated

using namespace inception_fast::emulated;

extern "C" {

// `at_end`: the block's last 16 bytes end at a forbidden page; else its first byte begins behind one. All is poison.
void *emulated_allocate(uint64_t bytes, int at_end) {
  size_t page = size_t(sysconf(_SC_PAGESIZE)), room = (bytes + 15) / 16 * 16;
  size_t inner = (room + page - 1) / page * page;
  void *mapping = mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED)
    return nullptr;
  uint8_t *first = static_cast<uint8_t *>(mapping) + page;
  if (mprotect(first, inner, PROT_READ | PROT_WRITE))
    return nullptr;
  std::memset(first, kPoisonByte, inner);
  uint8_t *data = at_end ? first + inner - room : first;
  blocks().push_back({static_cast<uint8_t *>(mapping), data, inner + 2 * page, size_t(bytes), false});
  return data;
}

// Makes memory of the caller, which stays its owner, part of the device's.
void emulated_adopt(void *data, uint64_t bytes) {
  uint8_t *at = static_cast<uint8_t *>(data);
  blocks().push_back({at, at, size_t(bytes), size_t(bytes), true});
}

// Returns 0 when nothing was written beside the block's data, 1 when something was, -1 when there is no such block.
int emulated_free(void *data) {
  auto found = std::find_if(blocks().begin(), blocks().end(), [&](const Block &block) { return block.data == data; });
  if (found == blocks().end())
    return -1;
  Block block = *found;
  blocks().erase(found);
  if (block.adopted)
    return 0;
  bool intact = guards_intact(block);
  munmap(block.mapping, block.mapped);
  return intact ? 0 : 1;
}

// When copies and products happen (0 early, 1 late, 2 random), the schedule (machine.h), clusters
// that run together, multiprocessors that the host sees, and the seed.
void emulated_configure(int copies, int products, int schedule, int resident, int sms, uint64_t seed) {
  machine().options = {copies, products, schedule, resident, sms, seed};
}

const char *emulated_error(void) { return machine().error.c_str(); }

uint64_t emulated_early_loads(void) { return machine().early_loads; }

uint64_t emulated_prefetches(void) { return machine().prefetches; }

uint64_t emulated_switches(void) { return machine().switches; }
}
