// What threads meet at: mbarriers, named barriers, the cluster's barrier, and the collectives of a warp.
#include "machine.h"
#include "primitives.h"
#include <array>
#include <cstdio>

namespace inception_fast::emulated {

namespace {

constexpr uint64_t kBarrierMark = 0xb1a5ed0fba441e25; // what an mbarrier's eight bytes hold
constexpr int64_t kMostBytes = (1 << 20) - 1;

enum WarpKind { sync_lanes, elect_lane, matrices_4, matrices_2, matrices_4_transposed };

void check_mark(Cta &cta, uint32_t offset, const char *what) {
  for (uint8_t *memory : {cta.shared, cta.seen})
    if (std::memcmp(memory + offset, &kBarrierMark, 8))
      fail("%s: the barrier at shared offset %u has been overwritten", what, offset);
}

void end_phase_if_due(BarrierState &b) {
  if (b.pending == 0 && b.bytes == 0) {
    b.phase++;
    b.pending = b.count;
  }
}

bool phase_over(const Fiber &fiber) {
  const BarrierState &b = *static_cast<const BarrierState *>(fiber.wait.object);
  return (b.phase & 1) != fiber.wait.value;
}

std::string describe_phase(const Fiber &fiber) {
  const BarrierState &b = *static_cast<const BarrierState *>(fiber.wait.object);
  char text[160];
  snprintf(text, sizeof text,
           "mbarrier at shared offset %td, parity %d: phase %llu, %u of %u arrivals and %lld bytes to come",
           (&b - fiber.cta->barriers.data()) * 8, int(fiber.wait.value), static_cast<unsigned long long>(b.phase),
           b.pending, b.count, static_cast<long long>(b.bytes));
  return text;
}

bool turn_over(const Fiber &fiber) {
  return static_cast<const NamedBarrier *>(fiber.wait.object)->turn != fiber.wait.value;
}

std::string describe_named(const Fiber &fiber) {
  const NamedBarrier &b = *static_cast<const NamedBarrier *>(fiber.wait.object);
  char text[96];
  snprintf(text, sizeof text, "barrier %td, %d of %d threads there", &b - fiber.cta->named, b.arrived, b.expected);
  return text;
}

bool cluster_over(const Fiber &fiber) {
  return static_cast<const Cluster *>(fiber.wait.object)->turn != fiber.wait.value;
}

std::string describe_cluster(const Fiber &fiber) {
  return "the cluster's barrier, " + std::to_string(fiber.cta->cluster->arrived) + " threads there";
}

NamedBarrier &join(uint32_t id, uint32_t threads) {
  if (id > 15)
    fail("named barrier %u; allowed: 0..15", id);
  if (threads == 0 || threads % kWarp || threads > self().cta->fibers.size())
    fail("named barrier %u for %u threads; allowed: a multiple of 32, at most the block's", id, threads);
  NamedBarrier &b = self().cta->named[id];
  if (b.arrived && b.expected != int(threads))
    fail("named barrier %u for %u threads where others said %d", id, threads, b.expected);
  b.expected = int(threads);
  b.arrived++;
  return b;
}

void end_turn_if_due(NamedBarrier &b) {
  if (b.arrived == b.expected) {
    b.arrived = 0;
    b.turn++;
  }
}

// This thread's part of its warp's next collective. `act` is run once, by the last lane; nobody goes on before.
void join_warp(int kind, uint32_t address, const uint32_t (&value)[4], void (*act)(Fiber &, WarpOperation &)) {
  Fiber &fiber = self();
  Warp &warp = fiber.cta->warps[fiber.index / kWarp];
  int lane = fiber.index % kWarp;
  size_t at = fiber.warp_next++;
  if (at == warp.operations.size())
    warp.operations.emplace_back().kind = kind;
  WarpOperation &op = warp.operations[at];
  if (op.kind != kind)
    fail("lanes of a warp are at different collective instructions");
  op.address[lane] = address;
  std::memcpy(op.value[lane], value, sizeof value);
  if (++op.arrived == kWarp)
    act(fiber, op);
  Wait wait;
  wait.object = &op;
  wait.ready = [](const Fiber &f) { return static_cast<const WarpOperation *>(f.wait.object)->arrived == kWarp; };
  wait.describe = [](const Fiber &) { return std::string("the other lanes of its warp"); };
  block_until(wait);
}

void store_later(Fiber &fiber, uint32_t offset, const void *value, int bytes) {
  std::memcpy(fiber.cta->shared + offset, value, bytes);
  std::array<uint8_t, 16> copy;
  std::memcpy(copy.data(), value, bytes);
  Cta *cta = fiber.cta;
  const uint64_t number = ++machine().stores;
  cta->stored[offset / 16] = number; // no store crosses 16 bytes
  fiber.unpublished.push_back([cta, offset, bytes, copy, number] {
    std::memcpy(cta->seen + offset, copy.data(), bytes);
    if (cta->stored[offset / 16] == number)
      cta->stored[offset / 16] = 0;
  });
}

void write_matrices(Fiber &last, WarpOperation &op) {
  bool transposed = op.kind == matrices_4_transposed;
  for (int matrix = 0; matrix < (op.kind == matrices_2 ? 2 : 4); matrix++)
    for (int r = 0; r < 8; r++) {
      uint16_t row[8];
      for (int c = 0; c < 8; c++) {
        int down = transposed ? c : r, right = transposed ? r : c; // where the element is in the registers
        row[c] = uint16_t(op.value[down * 4 + right / 2][matrix] >> (right % 2 * 16));
      }
      uint32_t at = op.address[matrix * 8 + r];
      if (at % 16)
        fail("store_matrices: a row at shared address %u; allowed: multiples of 16", at);
      // A row is the store of the lane that named it: that lane's fence publishes it.
      Fiber &owner = *last.cta->fibers[last.index / kWarp * kWarp + matrix * 8 + r];
      store_later(owner, offset_of_address(at, 16, "store_matrices"), row, 16);
    }
}

} // namespace

BarrierState &barrier_at(Cta &cta, uint32_t offset, const char *what) {
  if (offset % 8)
    fail("%s: a barrier at shared offset %u; allowed: multiples of 8", what, offset);
  BarrierState &b = cta.barriers[offset / 8];
  if (!b.live)
    fail("%s: no barrier was initialised at shared offset %u", what, offset);
  check_mark(cta, offset, what);
  return b;
}

void arrive(Cta &cta, uint32_t offset, const char *what) {
  BarrierState &b = barrier_at(cta, offset, what);
  if (b.pending == 0)
    fail("%s: more than %u arrivals in a phase of the barrier at shared offset %u", what, b.count, offset);
  b.pending--;
  end_phase_if_due(b);
}

void count_bytes(Cta &cta, uint32_t offset, int64_t bytes, const char *what) {
  BarrierState &b = barrier_at(cta, offset, what);
  b.bytes += bytes;
  if (b.bytes > kMostBytes || b.bytes < -kMostBytes)
    fail("%s: the barrier at shared offset %u counts %lld bytes; allowed: up to %lld", what, offset,
         static_cast<long long>(b.bytes), static_cast<long long>(kMostBytes));
  if (bytes < 0)
    end_phase_if_due(b);
}

void barrier_init(void *barrier, uint32_t arrivals) {
  uint32_t offset = offset_of(barrier, 8, "barrier_init");
  if (offset % 8 || arrivals == 0 || arrivals >= 1u << 20)
    fail("barrier_init of %u arrivals at shared offset %u; allowed: 1..2^20 - 1, multiples of 8", arrivals, offset);
  Cta &cta = *self().cta;
  BarrierState &b = cta.barriers[offset / 8];
  if (b.live)
    fail("barrier_init: the barrier at shared offset %u is already in use", offset);
  b = {};
  b.live = true;
  b.count = b.pending = arrivals;
  for (uint8_t *memory : {cta.shared, cta.seen})
    std::memcpy(memory + offset, &kBarrierMark, 8);
}

void fence_barrier_init() {
  for (BarrierState &b : self().cta->barriers)
    b.fenced |= b.live;
}

void barrier_expect(void *barrier, uint32_t bytes) {
  maybe_yield();
  uint32_t offset = offset_of(barrier, 8, "barrier_expect");
  count_bytes(*self().cta, offset, bytes, "barrier_expect");
  arrive(*self().cta, offset, "barrier_expect");
}

void barrier_arrive(void *barrier) {
  maybe_yield();
  arrive(*self().cta, offset_of(barrier, 8, "barrier_arrive"), "barrier_arrive");
}

void barrier_arrive_remote(void *barrier, uint32_t rank) {
  maybe_yield();
  Cluster &cluster = *self().cta->cluster;
  if (rank >= cluster.ctas.size())
    fail("barrier_arrive_remote at block %u of a cluster of %zu", rank, cluster.ctas.size());
  Cta &cta = *cluster.ctas[rank];
  if (cta.finished == int(cta.fibers.size()))
    fail("barrier_arrive_remote at block %u, which has ended", rank);
  arrive(cta, offset_of(barrier, 8, "barrier_arrive_remote"), "barrier_arrive_remote");
}

bool barrier_try(void *barrier, uint32_t parity) {
  BarrierState &b = barrier_at(*self().cta, offset_of(barrier, 8, "barrier_try"), "barrier_try");
  return (b.phase & 1) != parity;
}

void barrier_wait(void *barrier, uint32_t parity) {
  if (parity > 1)
    fail("barrier_wait for parity %u; allowed: 0, 1", parity);
  const BarrierState &b = barrier_at(*self().cta, offset_of(barrier, 8, "barrier_wait"), "barrier_wait");
  block_until({phase_over, &b, parity, describe_phase});
}

void sync_named(uint32_t id, uint32_t threads) {
  NamedBarrier &b = join(id, threads);
  uint64_t turn = b.turn;
  end_turn_if_due(b);
  block_until({turn_over, &b, turn, describe_named});
}

void arrive_named(uint32_t id, uint32_t threads) {
  maybe_yield();
  end_turn_if_due(join(id, threads));
}

void sync_block() { sync_named(0, uint32_t((self().cta->fibers.size() + kWarp - 1) / kWarp * kWarp)); }

void sync_warp() {
  join_warp(sync_lanes, 0, {}, [](Fiber &, WarpOperation &) {});
}

bool elected() {
  join_warp(elect_lane, 0, {}, [](Fiber &, WarpOperation &) {});
  return self().index % kWarp == 0;
}

void cluster_arrive() {
  Fiber &fiber = self();
  if (fiber.cluster_arrived)
    fail("cluster_arrive twice without a wait");
  Cluster &cluster = *fiber.cta->cluster;
  fiber.cluster_arrived = true;
  fiber.cluster_turn = cluster.turn;
  if (++cluster.arrived == int(cluster.ctas.size() * fiber.cta->fibers.size())) {
    cluster.arrived = 0;
    cluster.turn++;
  }
}

void cluster_wait() {
  Fiber &fiber = self();
  if (!fiber.cluster_arrived)
    fail("cluster_wait without an arrival");
  block_until({cluster_over, fiber.cta->cluster, fiber.cluster_turn, describe_cluster});
  fiber.cluster_arrived = false;
}

void grid_wait() { self().grid_waited = true; }

uint32_t cluster_rank() { return uint32_t(self().cta->rank); }
uint32_t cluster_size() { return uint32_t(self().cta->cluster->ctas.size()); }

void fence_async_shared() {
  Fiber &fiber = self();
  for (auto &publish : fiber.unpublished)
    publish();
  fiber.unpublished.clear();
  fiber.fenced = machine().stores;
  fence_barrier_init();
}

void change_registers(int count) {
  if (count % 8 || count < 24 || count > 256)
    fail("%d registers a thread; allowed: multiples of 8 in 24..256", count);
  Fiber &fiber = self();
  fiber.cta->groups[fiber.index / kGroup].registers = count;
}

void store_matrices(uint32_t address, const uint32_t *m, int count, bool transposed) {
  uint32_t value[4] = {};
  for (int i = 0; i < count; i++)
    value[i] = m[i];
  join_warp(count == 2 ? matrices_2 : transposed ? matrices_4_transposed : matrices_4, address, value, write_matrices);
}

void store_shared(uint32_t address, const void *value, int bytes) {
  if (address % bytes)
    fail("a store of %d bytes at shared address %u; allowed: multiples", bytes, address);
  store_later(self(), offset_of_address(address, bytes, "a shared store"), value, bytes);
}

void load_shared(uint32_t address, void *value, int bytes) {
  if (address % bytes)
    fail("a load of %d bytes at shared address %u; allowed: multiples", bytes, address);
  std::memcpy(value, self().cta->shared + offset_of_address(address, bytes, "a shared load"), bytes);
}

void finish_thread(Fiber &fiber) {
  if (fiber.cluster_arrived)
    fail("ended between cluster_arrive and cluster_wait");
  for (auto &group : fiber.stores)
    if (!group.empty())
      fail("ended with a TMA store that nobody waited for");
  const Warpgroup &group = fiber.cta->groups[fiber.index / kGroup];
  for (auto &accumulator : group.accumulators)
    if (accumulator->registers[fiber.index % kGroup])
      fail("ended with a wgmma that nobody waited for");
  int registers = 0;
  for (const Warpgroup &g : fiber.cta->groups)
    registers += g.registers * kGroup;
  if (registers > 65536)
    fail("the warpgroups of the block have %d registers; allowed: 65536", registers);
}

} // namespace inception_fast::emulated
