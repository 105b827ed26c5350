// Kernels small enough to know their results, each with mistakes that the emulator must notice: its own test.
#include "../../kernels/cuda/hopper.cuh"
#include "machine.h"

namespace inception_fast::hopper {

// What a kernel below does wrong; the test names them by number.
enum Mistake {
  none,
  no_full_wait,    // reads a stage before it is there
  no_empty_wait,   // overwrites a stage that is in use
  full_parity,     // waits for the other phase
  short_expect,    // expects 16 bytes too few
  long_expect,     // and too many
  no_fence,        // wgmma on accumulators just written
  no_commit,       // a wait that covers nothing
  no_wait,         // accumulators read too early
  early_release,   // a stage given back while wgmma may read it
  wrong_swizzle,   // descriptors that say 64 where the map said 128
  no_init_fence,   // barriers that the TMA unit has not seen
  two_arrivals,    // more arrivals than the barrier counts
  out_of_bounds,   // a store behind the end of y
  half_a_warpgroup // 64 of the 128 threads wait at a named barrier for all
};

struct Product {
  MapSpec a, b;
  float *y;
  int k, mistake;
};

constexpr int kStages = 2, kDepth = 64, kColumns = 48;

// y [64, 48] = a [64, k] * b [48, k]^T: one producer warp, one warpgroup that multiplies, a ring of two stages.
template <class T> void product(const Product &p) {
  uint8_t *shared = dynamic_shared();
  uint8_t *a = shared, *b = shared + kStages * 64 * kDepth * 2;
  Barrier *full = reinterpret_cast<Barrier *>(b + kStages * kColumns * kDepth * 2), *empty = full + kStages;
  const uint32_t bytes = (64 + kColumns) * kDepth * 2;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], 1);
    }
    if (p.mistake != no_init_fence)
      fence_barrier_init();
  }
  sync_block();
  const int steps = p.k / kDepth;
  if (threadIdx.x >= 128) {
    for (int i = 0; i < steps; i++) {
      const int s = i % kStages;
      if (p.mistake != no_empty_wait)
        barrier_wait(&empty[s], (i / kStages & 1) ^ 1);
      barrier_expect(&full[s], bytes - (p.mistake == short_expect ? 16 : 0) + (p.mistake == long_expect ? 16 : 0));
      tma_load(a + s * 64 * kDepth * 2, &p.a, &full[s], i * kDepth, 0);
      tma_load(b + s * kColumns * kDepth * 2, &p.b, &full[s], i * kDepth, 0);
    }
    return;
  }
  float d[kColumns / 2];
  for (float &v : d)
    v = 0;
  const Swizzle swizzle = p.mistake == wrong_swizzle ? Swizzle::bytes64 : Swizzle::bytes128;
  for (int i = 0; i < steps; i++) {
    const int s = i % kStages;
    if (p.mistake != no_full_wait)
      barrier_wait(&full[s], (i / kStages & 1) ^ (p.mistake == full_parity));
    if (p.mistake != no_fence)
      wgmma_fence();
    const uint32_t at = shared_address(a + s * 64 * kDepth * 2), bt = shared_address(b + s * kColumns * kDepth * 2);
    for (int k = 0; k < kDepth / 16; k++)
      wgmma<kColumns, T>(d, matrix_descriptor(at + k * 32, 0, 1024, swizzle),
                         matrix_descriptor(bt + k * 32, 0, 1024, swizzle), 1);
    if (p.mistake == early_release && threadIdx.x == 0)
      barrier_arrive(&empty[s]);
    if (p.mistake != no_commit)
      wgmma_commit();
    if (p.mistake != no_wait)
      wgmma_wait<0>();
    if (p.mistake != early_release && threadIdx.x == 0)
      barrier_arrive(&empty[s]);
    if (p.mistake == two_arrivals && threadIdx.x == 0)
      barrier_arrive(&empty[s]);
  }
  if (p.mistake == half_a_warpgroup && threadIdx.x < 64)
    sync_named(1, 128);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < kColumns / 2; i++) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    p.y[row * kColumns + column] = d[i];
  }
  if (p.mistake == out_of_bounds && threadIdx.x == 0)
    p.y[64 * kColumns] = 0;
}

struct Copy {
  MapSpec from;
  uint16_t *y;
  int at[5], tap_w, tap_h, bytes;
};

// What a load leaves in shared memory, byte for byte.
void copy(const Copy &p) {
  uint8_t *shared = dynamic_shared();
  Barrier *full = reinterpret_cast<Barrier *>(shared + p.bytes);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    fence_barrier_init();
  }
  sync_block();
  if (threadIdx.x < 32) {
    barrier_expect(full, p.bytes);
    if (p.from.im2col)
      tma_load_im2col(shared, &p.from, full, p.at[0], p.at[1], p.at[2], p.at[3], p.tap_w, p.tap_h);
    else if (p.from.rank == 5)
      tma_load(shared, &p.from, full, p.at[0], p.at[1], p.at[2], p.at[3], p.at[4]);
    else if (p.from.rank == 4)
      tma_load(shared, &p.from, full, p.at[0], p.at[1], p.at[2], p.at[3]);
    else
      tma_load(shared, &p.from, full, p.at[0], p.at[1]);
  }
  sync_block();
  barrier_wait(full, 0);
  for (int i = threadIdx.x; i < p.bytes / 4; i += blockDim.x)
    reinterpret_cast<uint32_t *>(p.y)[i] = load_shared_4(shared_address(shared + 4 * i));
}

struct Pass {
  MapSpec x, y;
  int mistake;
};

// x [32, 64] to y through registers: each block of a cluster of two loads half of the rows for both, a warp stores the
// other's rows transposed as matrices, and TMA writes them out.
enum PassMistake { pass_none, pass_no_publish, pass_no_store_wait, pass_one_block, pass_no_cluster_wait };

void pass(const Pass &p) {
  uint8_t *shared = dynamic_shared();
  uint8_t *out = shared + 4096;
  Barrier *full = reinterpret_cast<Barrier *>(out + 4096), *free = full + 1;
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(free, 2);
    fence_barrier_init();
  }
  sync_warp();
  if (p.mistake != pass_no_cluster_wait)
    barrier_expect(full, 4096);
  cluster_arrive();
  cluster_wait();
  if (p.mistake == pass_no_cluster_wait)
    barrier_expect(full, 2048);
  tma_load_multicast(shared + rank * 2048, &p.x, full, p.mistake == pass_one_block ? 1 << rank : 3, 0, int(rank) * 16);
  barrier_wait(full, 0);
  const int lane = threadIdx.x;
  for (int block = 0; block < 8; block++) { // 8 channels of all 32 rows
    uint32_t m[4];
    for (int i = 0; i < 4; i++) {
      const int channel = block * 8 + lane / 4, row = i * 8 + lane % 4 * 2;
      auto element = [&](int r) {
        return load_shared_4(shared_address(shared + r * 128 + channel / 2 * 4)) >> (channel % 2 * 16) & 0xffff;
      };
      m[i] = element(row) | element(row + 1) << 16;
    }
    store_matrices_transposed(shared_address(out + lane * 128 + block * 16), m[0], m[1], m[2], m[3]);
  }
  if (p.mistake != pass_no_publish)
    fence_async_shared();
  sync_warp();
  if (lane == 0) {
    tma_store(&p.y, out, 0, int(rank) * 32);
    tma_store_commit();
    if (p.mistake != pass_no_store_wait)
      tma_store_wait_read<0>();
    barrier_arrive_remote(free, 0);
    barrier_arrive_remote(free, 1);
    barrier_wait(free, 0);
  }
  cluster_arrive();
  cluster_wait();
}

} // namespace inception_fast::hopper

using namespace inception_fast;
using namespace inception_fast::hopper;

namespace {

MapSpec matrix(const void *base, int rows, int columns, int box_rows, int box_columns, Swizzle swizzle) {
  MapSpec map;
  map.base = reinterpret_cast<uint64_t>(base);
  map.rank = 2;
  map.swizzle = swizzle;
  map.size[0] = uint64_t(columns);
  map.size[1] = uint64_t(rows);
  map.stride[0] = uint64_t(columns) * 2;
  map.box[0] = uint32_t(box_columns);
  map.box[1] = uint32_t(box_rows);
  return map;
}

} // namespace

extern "C" {

int tiny_product(const void *a, const void *b, float *y, int k, int float16, int mistake) {
  Product p{matrix(a, 64, k, 64, kDepth, Swizzle::bytes128),
            matrix(b, kColumns, k, kColumns, kDepth, Swizzle::bytes128), y, k, mistake};
  const uint32_t shared = 1024 + kStages * (64 + kColumns) * kDepth * 2 + 64;
  return emulated::launch_grid(1, 160, 1, shared, [&] { float16 ? product<__half>(p) : product<__nv_bfloat16>(p); });
}

// `map` is a MapSpec's fields as 64-bit numbers: rank, im2col, swizzle, 5 sizes, 4 strides, 5 boxes, 5 steps, 2 lower
// and 2 upper corners, channels, pixels.
int tiny_copy(const void *base, const int64_t *map, const int *at, int tap_w, int tap_h, void *y, int bytes) {
  Copy p{};
  p.from.base = reinterpret_cast<uint64_t>(base);
  p.from.rank = int32_t(*map++);
  p.from.im2col = *map++ != 0;
  p.from.swizzle = Swizzle(*map++);
  for (auto &v : p.from.size)
    v = uint64_t(*map++);
  for (auto &v : p.from.stride)
    v = uint64_t(*map++);
  for (auto &v : p.from.box)
    v = uint32_t(*map++);
  for (auto &v : p.from.step)
    v = uint32_t(*map++);
  for (auto *corners : {p.from.lower, p.from.upper})
    for (int i = 0; i < 2; i++)
      corners[i] = int32_t(*map++);
  p.from.channels = uint32_t(*map++);
  p.from.pixels = uint32_t(*map++);
  p.y = static_cast<uint16_t *>(y);
  std::memcpy(p.at, at, sizeof p.at);
  p.tap_w = tap_w;
  p.tap_h = tap_h;
  p.bytes = bytes;
  if (const char *why = emulated::check_map(p.from)) {
    emulated::machine().error = why;
    return 2;
  }
  return emulated::launch_grid(1, 64, 1, uint32_t(1024 + bytes + 8), [&] { copy(p); });
}

void tiny_round(const float *from, uint16_t *to, int count, int float16) {
  for (int i = 0; i < count; i++)
    to[i] = float16 ? emulated::to_half(from[i]) : emulated::to_bfloat16(from[i]);
}

int tiny_pass(const void *x, void *y, int mistake) {
  Pass p{matrix(x, 32, 64, 16, 64, Swizzle::none), matrix(y, 64, 64, 32, 64, Swizzle::none), mistake};
  return emulated::launch_grid(2, 32, 2, 1024 + 8192 + 16, [&] { pass(p); });
}
}
