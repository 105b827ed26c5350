// TMA: boxes and im2col columns to shared memory with zero fill and swizzle, boxes back to global memory.
#include "machine.h"
#include "primitives.h"
#include <algorithm>

namespace inception_fast::emulated {

using hopper::MapSpec;
using hopper::Swizzle;

namespace {

// Where the byte at `address` of an unswizzled box goes: bits 4..6 (5, 4 for the shorter patterns) are xored with the
// bits three above them.
uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  uint32_t mask = swizzle == Swizzle::bytes128  ? 7
                  : swizzle == Swizzle::bytes64 ? 3
                  : swizzle == Swizzle::bytes32 ? 1
                                                : 0;
  return address ^ ((address >> 7 & mask) << 4);
}

uint32_t box_bytes(const MapSpec &map) {
  uint32_t bytes = uint32_t(element_bytes(map.element));
  if (map.im2col)
    return bytes * map.channels * map.pixels;
  for (int i = 0; i < map.rank; i++)
    bytes *= (map.box[i] + map.step[i] - 1) / map.step[i];
  return bytes;
}

// The rows of a box, each the innermost extent: the address in global memory, or null where it is outside.
struct Row {
  const uint8_t *from;
  uint32_t valid; // bytes from its start that lie inside the tensor
  uint32_t skip;  // bytes before the tensor begins
};

std::vector<Row> rows_of_box(const MapSpec &map, const int *at) {
  std::vector<Row> rows;
  int64_t size = element_bytes(map.element), inner = map.box[0];
  int64_t first = std::max<int64_t>(at[0], 0), last = std::min<int64_t>(int64_t(at[0]) + inner, int64_t(map.size[0]));
  uint32_t count[5] = {1, 1, 1, 1, 1};
  for (int i = 1; i < map.rank; i++)
    count[i] = (map.box[i] + map.step[i] - 1) / map.step[i];
  uint32_t index[5] = {};
  do {
    bool inside = first < last;
    int64_t offset = first * size;
    for (int i = 1; i < map.rank; i++) {
      int64_t position = int64_t(at[i]) + int64_t(index[i]) * map.step[i];
      inside &= position >= 0 && position < int64_t(map.size[i]);
      offset += position * int64_t(map.stride[i - 1]);
    }
    rows.push_back(inside ? Row{reinterpret_cast<const uint8_t *>(map.base) + offset, uint32_t((last - first) * size),
                                uint32_t((first - at[0]) * size)}
                          : Row{nullptr, 0, 0});
    int i = 1;
    while (i < map.rank && ++index[i] == count[i])
      index[i++] = 0;
    if (i >= map.rank)
      break;
  } while (true);
  return rows;
}

// Columns walk the corners of windows: along w from lower to size - 1 + upper, then h, then n. The tap is added to the
// corner; what it hits outside of the map is zero.
std::vector<Row> rows_of_column(const MapSpec &map, const int (&at)[4], uint16_t tap_w, uint16_t tap_h) {
  std::vector<Row> rows;
  int64_t size = element_bytes(map.element), w = at[1], h = at[2], n = at[3];
  int64_t last_w = int64_t(map.size[1]) - 1 + map.upper[0], last_h = int64_t(map.size[2]) - 1 + map.upper[1];
  if (w < map.lower[0] || w > last_w || h < map.lower[1] || h > last_h)
    fail("tma_load_im2col: corner (%lld, %lld) lies outside of %d..%lld, %d..%lld", static_cast<long long>(w),
         static_cast<long long>(h), map.lower[0], static_cast<long long>(last_w), map.lower[1],
         static_cast<long long>(last_h));
  int64_t last = std::min<int64_t>(int64_t(at[0]) + map.channels, int64_t(map.size[0]));
  for (uint32_t p = 0; p < map.pixels; p++) {
    int64_t x = w + tap_w, y = h + tap_h;
    bool inside = x >= 0 && x < int64_t(map.size[1]) && y >= 0 && y < int64_t(map.size[2]) && n >= 0 &&
                  n < int64_t(map.size[3]) && at[0] >= 0 && at[0] < last;
    rows.push_back(inside
                       ? Row{reinterpret_cast<const uint8_t *>(map.base) + at[0] * size + x * int64_t(map.stride[0]) +
                                 y * int64_t(map.stride[1]) + n * int64_t(map.stride[2]),
                             uint32_t((last - at[0]) * size), 0}
                       : Row{nullptr, 0, 0});
    if ((w += map.step[1]) > last_w) {
      w = map.lower[0];
      if ((h += map.step[2]) > last_h) {
        h = map.lower[1];
        n++;
      }
    }
  }
  return rows;
}

void deliver(Cta &cta, uint32_t offset, const MapSpec &map, const std::vector<Row> &rows, uint32_t row_bytes) {
  std::vector<uint8_t> row(row_bytes);
  uint32_t base = kSharedBase + offset;
  for (size_t r = 0; r < rows.size(); r++) {
    std::memset(row.data(), 0, row_bytes);
    if (rows[r].from)
      std::memcpy(row.data() + rows[r].skip, rows[r].from, rows[r].valid);
    for (uint32_t i = 0; i < row_bytes; i += 16) {
      uint32_t to = swizzled(base + uint32_t(r) * row_bytes + i, map.swizzle) - kSharedBase;
      uint32_t bytes = std::min(16u, row_bytes - i);
      std::memcpy(cta.shared + to, row.data() + i, bytes);
      std::memcpy(cta.seen + to, row.data() + i, bytes);
    }
  }
}

// A copy writes by the asynchronous proxy: ordinary stores there have to be behind a fence, of its thread or of theirs.
void check_fenced(const Cta &cta, uint32_t offset, uint32_t bytes, const char *what) {
  for (uint32_t at = offset / 16; at < (offset + bytes + 15) / 16; at++)
    if (cta.stored[at] > self().fenced)
      fail("%s: over an ordinary store at shared offset %u, and no fence_async_shared is between them", what, 16 * at);
}

void load(void *to, const MapSpec &map, void *barrier, uint16_t blocks, std::vector<Row> rows, const char *what) {
  maybe_yield();
  check_earlier_grid(reinterpret_cast<const void *>(map.base), what);
  machine().early_loads += !self().grid_waited;
  for (const Row &row : rows)
    if (row.from)
      check_ordered(row.from, row.valid, what);
  Cta &own = *self().cta;
  uint32_t bytes = box_bytes(map), row_bytes = bytes / uint32_t(rows.size());
  uint32_t offset = offset_of(to, bytes, what), at = offset_of(barrier, 8, what);
  if ((kSharedBase + offset) % 128)
    fail("%s: to shared address %u; allowed: multiples of 128", what, kSharedBase + offset);
  bool multicast = blocks != 0;
  if (!multicast)
    blocks = uint16_t(1 << own.rank);
  if (blocks >> own.cluster->ctas.size())
    fail("%s: blocks 0x%x of a cluster of %zu", what, blocks, own.cluster->ctas.size());
  for (size_t rank = 0; rank < own.cluster->ctas.size(); rank++) {
    if (!(blocks >> rank & 1))
      continue;
    Cta &cta = *own.cluster->ctas[rank];
    if (cta.finished == int(cta.fibers.size()))
      fail("%s: into block %zu, which has ended", what, rank);
    if (!barrier_at(cta, at, what).fenced)
      fail("%s: the barrier at shared offset %u was not fenced after its initialisation", what, at);
    check_fenced(cta, offset, bytes, what);
    for (uint8_t *memory : {cta.shared, cta.seen}) // until it lands, nobody may read what was there
      std::memset(memory + offset, kPoisonByte, bytes);
    auto land = [&cta, offset, &map, rows, row_bytes, at, bytes, what] {
      deliver(cta, offset, map, rows, row_bytes);
      count_bytes(cta, at, -int64_t(bytes), what);
    };
    if (immediately(machine().options.copies))
      land();
    else
      machine().flights.push_back({land});
  }
}

} // namespace

void tma_load(void *to, const MapSpec &map, void *barrier, uint16_t blocks, int rank, const int *at) {
  if (map.im2col || map.rank != rank)
    fail("tma_load of rank %d with a map of rank %d%s", rank, map.rank, map.im2col ? ", im2col" : "");
  load(to, map, barrier, blocks, rows_of_box(map, at), "tma_load");
}

void tma_load_im2col(void *to, const MapSpec &map, void *barrier, uint16_t blocks, const int (&at)[4], uint16_t tap_w,
                     uint16_t tap_h) {
  if (!map.im2col)
    fail("tma_load_im2col with a tiled map");
  load(to, map, barrier, blocks, rows_of_column(map, at, tap_w, tap_h), "tma_load_im2col");
}

void tma_prefetch(const MapSpec &map, int rank, const int *at) {
  if (rank != map.rank || map.im2col)
    fail("tma_prefetch of rank %d with a map of rank %d%s", rank, map.rank, map.im2col ? ", im2col" : "");
  for (const Row &row : rows_of_box(map, at))
    if (row.from)
      check_ordered(row.from, row.valid, "tma_prefetch");
  prefetched_global();
}

void bulk_load(void *to, const void *from, uint32_t bytes, void *barrier) {
  maybe_yield();
  uint32_t offset = offset_of(to, bytes, "bulk_load"), at = offset_of(barrier, 8, "bulk_load");
  if ((kSharedBase + offset) % 16 || uintptr_t(from) % 16 || bytes % 16)
    fail("bulk_load of %u bytes from %p to shared address %u; allowed: multiples of 16", bytes, from,
         kSharedBase + offset);
  if (!inside_a_block(from, bytes))
    fail("bulk_load of %u bytes at %p, outside of every block of global memory", bytes, from);
  Cta &cta = *self().cta;
  if (!barrier_at(cta, at, "bulk_load").fenced)
    fail("bulk_load: the barrier at shared offset %u was not fenced after its initialisation", at);
  check_fenced(cta, offset, bytes, "bulk_load");
  for (uint8_t *memory : {cta.shared, cta.seen})
    std::memset(memory + offset, kPoisonByte, bytes);
  auto land = [&cta, offset, from, bytes, at] {
    for (uint8_t *memory : {cta.shared, cta.seen})
      std::memcpy(memory + offset, from, bytes);
    count_bytes(cta, at, -int64_t(bytes), "bulk_load");
  };
  if (immediately(machine().options.copies))
    land();
  else
    machine().flights.push_back({land});
}

void tma_store(const MapSpec &map, const void *from, int rank, const int *at) {
  maybe_yield();
  if (map.im2col || map.rank != rank)
    fail("tma_store of rank %d with a map of rank %d%s", rank, map.rank, map.im2col ? ", im2col" : "");
  check_earlier_grid(reinterpret_cast<const void *>(map.base), "tma_store");
  Cta &cta = *self().cta;
  uint32_t bytes = box_bytes(map), offset = offset_of(from, bytes, "tma_store");
  if ((kSharedBase + offset) % 128)
    fail("tma_store: from shared address %u; allowed: multiples of 128", kSharedBase + offset);
  std::vector<Row> rows = rows_of_box(map, at);
  uint32_t row_bytes = bytes / uint32_t(rows.size());
  auto store = [&cta, &map, offset, rows, row_bytes] {
    for (size_t r = 0; r < rows.size(); r++) {
      if (!rows[r].from)
        continue;
      std::vector<uint8_t> row(row_bytes);
      for (uint32_t i = 0; i < row_bytes; i++)
        row[i] = cta.seen[swizzled(kSharedBase + offset + uint32_t(r) * row_bytes + i, map.swizzle) - kSharedBase];
      std::memcpy(const_cast<uint8_t *>(rows[r].from), row.data() + rows[r].skip, rows[r].valid);
    }
  };
  if (immediately(machine().options.copies))
    store();
  else
    self().stores.back().push_back(store);
}

void tma_store_commit() { self().stores.emplace_back(); }

void tma_store_wait(int pending) {
  auto &groups = self().stores; // the last one is open
  while (int(groups.size()) - 1 > pending) {
    for (auto &store : groups.front())
      store();
    groups.erase(groups.begin());
  }
}

const char *check_map(const MapSpec &map) {
  static std::string text;
  auto say = [](const std::string &reason) {
    text = reason;
    return text.c_str();
  };
  int64_t size = element_bytes(map.element);
  if (map.rank < (map.im2col ? 4 : 1) || map.rank > (map.im2col ? 4 : 5))
    return say("rank " + std::to_string(map.rank));
  if (map.base % 16)
    return say("a base that is no multiple of 16");
  uint64_t end = map.size[0] * size;
  for (int i = 0; i < map.rank; i++) {
    if (map.size[i] == 0 || map.size[i] > 1ull << 32)
      return say("size " + std::to_string(map.size[i]) + " of dimension " + std::to_string(i));
    if (map.step[i] < 1 || map.step[i] > 8)
      return say("an element stride outside of 1..8");
    if (i && (map.stride[i - 1] % 16 || map.stride[i - 1] >> 40))
      return say("stride " + std::to_string(map.stride[i - 1]) + "; allowed: multiples of 16 below 2^40");
    if (i)
      end += (map.size[i] - 1) * map.stride[i - 1];
    if (!map.im2col && (map.box[i] < 1 || map.box[i] > 256))
      return say("box " + std::to_string(map.box[i]) + "; allowed: 1..256");
  }
  if (map.step[0] != 1)
    return say("an element stride of the innermost dimension");
  if (map.im2col && (map.channels < 1 || map.channels > 256 || map.pixels < 1 || map.pixels > 1024))
    return say(std::to_string(map.channels) + " channels of " + std::to_string(map.pixels) +
               " pixels; allowed: 256, 1024");
  for (int i = 0; map.im2col && i < 2; i++)
    if (std::min(map.lower[i], map.upper[i]) < -128 || std::max(map.lower[i], map.upper[i]) > 127)
      return say("a corner outside of -128..127");
  int64_t inner = size * (map.im2col ? map.channels : map.box[0]);
  if (inner % 16)
    return say("a row of " + std::to_string(inner) + " bytes; allowed: multiples of 16");
  int64_t span = map.swizzle == Swizzle::none ? 0 : 256 >> int(map.swizzle);
  if (span && inner != span)
    return say("a row of " + std::to_string(inner) + " bytes under a swizzle of " + std::to_string(span) +
               ", not modelled");
  if (!inside_a_block(reinterpret_cast<const void *>(map.base), end))
    return say("a tensor of " + std::to_string(end) + " bytes that is not inside of one block of global memory");
  return nullptr;
}

} // namespace inception_fast::emulated
