// The state of an emulated GPU: threads as fibers, and what they share. emulator.h says what is modelled and what is
// not.
#pragma once

#include "../../kernels/cuda/tensor_map.h"
#include "cuda_types.h"
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <random>
#include <string>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

namespace inception_fast::emulated {

constexpr int kWarp = 32, kGroup = 128;       // threads of a warp, of a warpgroup
constexpr uint32_t kSharedBase = 1024 + 16;   // where dynamic shared memory begins in the 32-bit window
constexpr uint32_t kSharedLimit = 227 * 1024; // bytes a CTA may ask for
constexpr uint32_t kPoison = 0x7fc5a5a5;      // a NaN that no arithmetic makes
constexpr uint8_t kPoisonByte = 0xff;         // NaN in bfloat16, float16 and float32

// When something asynchronous happens: at once, as late as allowed, or at a random point between.
enum class When : int { early = 0, late = 1, random = 2 };

constexpr int kLateWarp = 2, kLateThread = 1000;

struct Options {
  int copies = 0;   // When, of TMA
  int products = 0; // When, of wgmma
  int schedule = 0; // 0: threads in turn; 1: random priorities of warps that change on the way; kLateWarp + w, or
                    // kLateThread + t: threads in turn, warp w or thread t of a block where nothing else can happen
  int resident = 1; // clusters that run at the same time
  int sms = 4;      // what the host is told
  uint64_t seed = 1;
};

struct Cta;
struct Fiber;

// Why a thread does not run: it can again once ready says so.
struct Wait {
  bool (*ready)(const Fiber &fiber) = nullptr;
  const void *object = nullptr;
  uint64_t value = 0;
  std::string (*describe)(const Fiber &fiber) = nullptr;
};

struct Fiber {
  Cta *cta = nullptr;
  int index = 0; // in its CTA
  uint3 thread_index{};
  bool started = false, done = false;
  Wait wait;
  ucontext_t entry{};
  jmp_buf here{};
  char *stack = nullptr;
  size_t warp_next = 0;                    // collective instructions of its warp that it has issued
  size_t group_next = 0, group_waited = 0; // of its warpgroup: issued, and waited for
  bool cluster_arrived = false;
  bool grid_waited = false;
  uint64_t cluster_turn = 0;
  std::vector<std::function<void()>> unpublished; // writes that the asynchronous proxy does not see before a fence
  uint64_t fenced = 0;              // ordinary stores to shared memory, of all threads, ahead of its last fence
  std::vector<uintptr_t> unordered; // 16 bytes of global memory each: stored, and not yet ordered before copies
  std::vector<std::vector<std::function<void()>>> stores{1}; // TMA stores not yet done, by group; the last one is open
};

// An mbarrier, beside the eight bytes that stand for it in shared memory.
struct BarrierState {
  bool live = false, fenced = false;
  uint32_t count = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  uint64_t turn = 0;
};

// A collective of a warp: the same for all its lanes, done when the last has come.
struct WarpOperation {
  int kind = 0, arrived = 0;
  uint32_t address[kWarp] = {};
  uint32_t value[kWarp][4] = {};
};

struct Accumulator {
  int n = 0;
  float *registers[kGroup] = {}; // null: this thread has it back
  int users[kGroup] = {};        // instructions of this thread that are not complete
  std::vector<float> values;     // [128][n / 2]
};

struct GroupOperation {
  enum Kind { fence, product, commit } kind = fence;
  int n = 0, element = 0, arrived = 0, left = 0; // threads that have issued it, and that have waited for it
  bool accumulate = false;
  uint64_t a = 0, b = 0;
  std::shared_ptr<Accumulator> accumulator;
};

struct Warpgroup {
  std::deque<GroupOperation> operations; // the first one kept has number `first`
  size_t first = 0, done = 0;            // operations before `done` have been executed
  std::list<std::shared_ptr<Accumulator>> accumulators;
  bool fenced[kGroup] = {};
  int registers = 0; // of a thread, as setmaxnreg said; 0: it did not
};

struct Warp {
  std::deque<WarpOperation> operations;
  uint64_t priority = 0;
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  int arrived = 0;
  uint64_t turn = 0;
};

struct Cta {
  Cluster *cluster = nullptr;
  uint3 block_index{};
  int rank = 0, finished = 0;
  uint8_t *shared = nullptr; // what ordinary loads and stores see
  uint8_t *seen = nullptr;   // what TMA and wgmma see
  uint32_t shared_bytes = 0;
  std::vector<BarrierState> barriers; // one for each eight bytes
  std::vector<uint64_t> stored;       // of each 16 bytes: number of the last ordinary store there, 0 once fenced
  NamedBarrier named[16];
  std::vector<Warp> warps;
  std::vector<Warpgroup> groups;
  std::vector<std::unique_ptr<Fiber>> fibers;
};

// A copy that has been asked for; land() writes the data and counts the bytes.
struct Flight {
  std::function<void()> land;
};

// Products that somebody waits for: those of `group` before `until`.
struct Due {
  Fiber *fiber;
  Warpgroup *group;
  size_t until;
};

struct Machine {
  Options options;
  std::mt19937_64 random;
  dim3 grid, block, cluster_size;
  std::list<std::unique_ptr<Cluster>> running;
  std::list<Flight> flights;
  std::list<Due> due;
  Fiber *current = nullptr;
  jmp_buf scheduler{}, failure{};
  ucontext_t scheduler_entry{};
  std::function<void()> kernel;
  std::string error;
  uint64_t switches = 0;
  uint64_t stores = 0;                          // ordinary ones to shared memory so far
  std::unordered_map<uintptr_t, int> unordered; // of all threads: how many stores of these 16 bytes are not ordered
  uint64_t early_loads = 0;                     // copies of the last launch that a thread issued ahead of its grid_wait
  uint64_t prefetches = 0;                      // of the last launch, into the level 2 cache
};

Machine &machine();
Fiber &self();

[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
void block_until(const Wait &wait); // gives the processor away until wait.ready
void maybe_yield();                 // in random schedules, now and then
bool chance(unsigned one_in);
bool immediately(int when); // whether something asynchronous happens at once

// The offset of a pointer or of a 32-bit address into the current CTA's shared memory; fails where `bytes` from there
// are not all inside.
uint32_t offset_of(const void *pointer, uint32_t bytes, const char *what);
uint32_t offset_of_address(uint32_t address, uint32_t bytes, const char *what);
BarrierState &barrier_at(Cta &cta, uint32_t offset, const char *what);
void arrive(Cta &cta, uint32_t offset, const char *what);
void count_bytes(Cta &cta, uint32_t offset, int64_t bytes, const char *what);

bool inside_a_block(const void *address, uint64_t bytes);
void check_earlier_grid(const void *address, const char *what);            // that the thread may use this block now
void earlier_grid_has_ended();                                             // for all blocks
void check_ordered(const void *address, uint64_t bytes, const char *what); // that no thread's store is on its way there
bool in_the_gap_of_a_block(const void *address);

bool run_due_products();          // those of one wait; false when none can run
void finish_thread(Fiber &fiber); // complains about what a thread may not leave open at its end

} // namespace inception_fast::emulated
