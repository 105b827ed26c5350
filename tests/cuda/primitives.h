// What emulated.h calls: one function for each group of instructions, without types of the kernels.
#pragma once

#include "cuda_types.h"
#include <cstdint>
#include <functional>

namespace inception_fast::hopper {
struct MapSpec;
}

namespace inception_fast::emulated {

uint8_t *dynamic_shared();
uint32_t shared_address(const void *pointer);
void sync_block();
void sync_warp();
bool elected(); // in one lane of the warp, all of whose lanes come here together
void sync_named(uint32_t id, uint32_t threads);
void arrive_named(uint32_t id, uint32_t threads);
void change_registers(int count);
[[noreturn]] void trap();

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive();
void cluster_wait();
void grid_wait();

void barrier_init(void *barrier, uint32_t arrivals);
void fence_barrier_init();
void barrier_expect(void *barrier, uint32_t bytes);
void barrier_arrive(void *barrier);
void barrier_arrive_remote(void *barrier, uint32_t rank);
bool barrier_try(void *barrier, uint32_t parity);
void barrier_wait(void *barrier, uint32_t parity);
void fence_async_shared();
void fence_async_global();
void prefetched_global();
void stored_global(const void *address); // 16 bytes, by an ordinary store of this thread
void wait_for_count(const uint32_t *counter, uint32_t value);

// blocks: a bit for each block of the cluster that gets the box; 0: this one, without multicast.
void tma_load(void *to, const hopper::MapSpec &map, void *barrier, uint16_t blocks, int rank, const int *at);
void tma_load_im2col(void *to, const hopper::MapSpec &map, void *barrier, uint16_t blocks, const int (&at)[4],
                     uint16_t tap_w, uint16_t tap_h);
void tma_prefetch(const hopper::MapSpec &map, int rank, const int *at);
void bulk_load(void *to, const void *from, uint32_t bytes, void *barrier);
void tma_store(const hopper::MapSpec &map, const void *from, int rank, const int *at);
void tma_store_commit();
void tma_store_wait(int pending);

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void wgmma(int n, int element, float *d, uint64_t a, uint64_t b, bool accumulate);

void store_matrices(uint32_t address, const uint32_t *m, int count, bool transposed);
void store_shared(uint32_t address, const void *value, int bytes);
void load_shared(uint32_t address, void *value, int bytes);
void check_global(const void *address, int bytes, const char *what);
uint64_t switches(); // of fibers so far: a clock
void yield_once();   // in a loop that waits for memory

// Runs kernel() for every thread of the grid. Returns 0, or 1 and last_error() has the reason.
int launch_grid(dim3 grid, dim3 block, dim3 cluster, uint32_t shared_bytes, const std::function<void()> &kernel);
const char *check_map(const hopper::MapSpec &map); // null, or why the driver would not encode it
int multiprocessors();

// Until the next launch has ended: an earlier grid may still write the block of global memory at this address, so that
// a thread may use it only behind its grid_wait. Memory adopted from a caller does not take part.
void earlier_grid_uses(const void *address);

} // namespace inception_fast::emulated
