// What a multiprocessor does a cycle of what the walk is made of: products of few columns, copies of few rows, both;
// and how long blocks of a cluster take to exchange parts of sums. Each kernel leaves the cycles of its block 0.
#include <cuda_runtime.h>
#include <exception>

#include "encode.h"
#include "hopper.cuh"

using namespace inception_fast::hopper;

namespace {

constexpr int kDepth = 64, kRow = 2 * kDepth; // channels of a step, bytes of a row of them
constexpr int kShared = 220 * 1024, kBarriers = 216 * 1024;

__device__ __forceinline__ long long cycles() { return clock64(); }

constexpr int kMore = 8; // rows that an operand may begin behind the first

// `warpgroups` of 128 threads each add `groups` groups of 8 products [64, 16] * [16, N] to their sums. Rows of DEPTH
// channels; those of the first operand begin at row `shift` of theirs.
template <int N, int DEPTH>
__global__ void __launch_bounds__(256) products(int groups, int stages, int shift, long long *found) {
  constexpr int ROW = 2 * DEPTH, STEPS = DEPTH / K_STEP, X_BYTES = (64 + kMore) * ROW / 1024 * 1024 + 1024;
  constexpr Swizzle SWIZZLE = DEPTH == 64 ? Swizzle::bytes128 : Swizzle::bytes64;
  uint8_t *ring = dynamic_shared();
  const int warpgroup = threadIdx.x / 128;
  for (int i = threadIdx.x; i < kShared / 16 - 64; i += blockDim.x)
    store_shared_16(shared_address(ring) + 16 * i, make_uint4(0, 0, 0, 0));
  fence_async_shared();
  sync_block();
  const int bytes = X_BYTES + (N * ROW + 1023) / 1024 * 1024;
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i)
    d[i] = 0;
  const long long begin = cycles();
  int stage = warpgroup * stages;
  for (int i = 0; i < groups; ++i) {
    const Descriptor first = matrix_descriptor(shared_address(ring) + stage * bytes, 0, 8 * ROW, SWIZZLE);
    const Descriptor a = first + shift * (ROW / 16), b = first + X_BYTES / 16;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k)
      wgmma<N, __nv_bfloat16>(d, a + 2 * (k % STEPS), b + 2 * (k % STEPS), true);
    wgmma_commit();
    wgmma_wait<1>();
    stage = stage + 1 == (warpgroup + 1) * stages ? warpgroup * stages : stage + 1;
  }
  wgmma_wait<0>();
  settle(d);
  const long long end = cycles();
  float sum = 0;
  for (int i = 0; i < N / 2; ++i)
    sum += d[i];
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *found = end - begin + (sum == 1.0f);
}

// What a copy costs where one thread asks for it, as hopper.cuh's functions do not.
__device__ __forceinline__ void expect_alone(Barrier *barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void load_alone(void *to, const CUtensorMap *map, Barrier *barrier, int c, int w, int tap) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
               "%5, %5}], [%2], {%6, %7};" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(0), "h"(static_cast<uint16_t>(tap)),
               "h"(static_cast<uint16_t>(0))
               : "memory");
}

constexpr int kStages = 4; // of a warp

// A barrier for each stage of eight warps, ready for all of the block.
__device__ __forceinline__ Barrier *stage_barriers(uint8_t *ring) {
  Barrier *barriers = reinterpret_cast<Barrier *>(ring + kBarriers);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 8 * kStages; ++i)
      barrier_init(&barriers[i], 1);
    fence_barrier_init();
  }
  sync_block();
  return barriers;
}

// Each warp brings `count` boxes of 64 channels into stages of its own: the first `x_warps` of x, `pixels` each, the
// others of weights, `rows` each. WHOLE: by all lanes together, or, of x, by one.
template <bool WHOLE>
__global__ void __launch_bounds__(256)
    copies(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weights, int x_warps, int pixels,
           int rows, int count, int apart, long long *found) {
  uint8_t *ring = dynamic_shared();
  Barrier *barriers = stage_barriers(ring);
  const int warp = uniform(threadIdx.x / 32), box = kRow * (pixels > rows ? pixels : rows);
  const long long begin = cycles();
  if (WHOLE || threadIdx.x % 32 == 0) {
    int stage = 0, chunk = 0, tap = 0;
    uint32_t parity = 1;
    for (int k = 0; k < count + kStages; ++k) {
      Barrier *full = &barriers[warp * kStages + stage];
      uint8_t *to = ring + (warp * kStages + stage) * box;
      if (k >= kStages)
        barrier_wait(full, parity);
      if (k < count) {
        if constexpr (!WHOLE) {
          expect_alone(full, pixels * kRow);
          load_alone(to, &x, full, 64 * chunk, apart * (blockIdx.x % 4) - 3, tap);
        } else if (warp < x_warps) {
          barrier_expect(full, pixels * kRow);
          tma_load_im2col(to, &x, full, 64 * chunk, apart * (blockIdx.x % 4) - 3, 0, 0, static_cast<uint16_t>(tap), 0);
        } else {
          barrier_expect(full, rows * kRow);
          tma_load(to, &weights, full, 64 * chunk, apart * (blockIdx.x % 4) * 32, tap);
        }
      }
      if (++chunk == 3) {
        chunk = 0;
        tap = tap == 6 ? 0 : tap + 1;
      }
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
  sync_block();
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *found = cycles() - begin;
}

// Each warp brings `count` rows of a map, `bytes` each, as halo tiles do: one after the other, of images in turn, into
// stages of its own.
__global__ void __launch_bounds__(256)
    lines(const __grid_constant__ CUtensorMap x, int bytes, int height, int images, int count, long long *found) {
  uint8_t *ring = dynamic_shared();
  Barrier *barriers = stage_barriers(ring);
  const int warp = uniform(threadIdx.x / 32), place = (bytes + 1023) / 1024 * 1024;
  const long long begin = cycles();
  for (int k = 0; k < count + kStages; ++k) {
    Barrier *full = &barriers[warp * kStages + k % kStages];
    if (k >= kStages)
      barrier_wait(full, k / kStages & 1 ? 0 : 1);
    if (k < count) {
      barrier_expect(full, bytes);
      tma_load(ring + (warp * kStages + k % kStages) * place, &x, full, 0, 0, k % height, (blockIdx.x + warp) % images);
    }
  }
  sync_block();
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *found = cycles() - begin;
}

// 16 bytes to the same place of block `rank` of the cluster, counted by its barrier.
__device__ __forceinline__ void store_remote(uint32_t address, float4 value, Barrier *barrier, uint32_t rank) {
  asm volatile("{\n.reg .b32 there, counts;\n"
               "mapa.shared::cluster.u32 there, %0, %6;\n"
               "mapa.shared::cluster.u32 counts, %1, %6;\n"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%2, %3, %4, %5}, [counts];\n"
               "}\n" ::"r"(address),
               "r"(shared_address(barrier)), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(rank)
               : "memory");
}

// Blocks of a cluster of four send each other three quarters of 64 x 32 sums, and each adds up a quarter, `rounds`
// times.
__global__ void __launch_bounds__(128) exchanges(int rounds, long long *found, int *wrong) {
  __shared__ Barrier arrived[2];
  uint8_t *ring = dynamic_shared();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_rank();
  if (threadIdx.x == 0) {
    barrier_init(&arrived[0], 1);
    barrier_init(&arrived[1], 1);
    fence_barrier_init();
  }
  cluster_arrive();
  cluster_wait();
  const long long begin = cycles();
  float sum = 0;
  for (int k = 0; k < rounds; ++k) {
    const uint32_t buffer = shared_address(ring) + k % 2 * 4 * 2048;
    Barrier *barrier = &arrived[k % 2];
    if (warp == rank) {
      barrier_expect(barrier, 3 * 2048);
      barrier_wait(barrier, k / 2 & 1);
      for (int part = 0; part < 4; ++part)
        if (part != rank)
          for (int j = 0; j < 4; ++j) {
            const float4 v = load_shared_floats(buffer + part * 2048 + (32 * j + lane) * 16);
            if (v.x != part + k || v.w != 4 * lane + j)
              atomicAdd(wrong, 1);
            sum += v.x;
          }
    } else {
      for (int j = 0; j < 4; ++j)
        store_remote(buffer + rank * 2048 + (32 * j + lane) * 16, make_float4(rank + k, 1, 2, 4 * lane + j), barrier,
                     warp);
    }
    sync_block();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *found = cycles() - begin + (sum == 0.5f);
  cluster_arrive();
  cluster_wait();
}

void launch(const void *kernel, int blocks, int threads, int cluster, bool cooperative, void **arguments) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = kShared;
  cudaLaunchAttribute attributes[2]{};
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  if (cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  config.attrs = attributes;
  cudaLaunchKernelExC(&config, kernel, arguments);
}

template <int N> const void *kernel_of(int depth) {
  return depth == 64 ? reinterpret_cast<const void *>(&products<N, 64>)
                     : reinterpret_cast<const void *>(&products<N, 32>);
}

int done(long long *memory, double over, double *result) {
  long long found = 0;
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess)
    error = cudaDeviceSynchronize();
  if (error == cudaSuccess)
    error = cudaMemcpy(&found, memory, sizeof found, cudaMemcpyDeviceToHost);
  *result = found / over;
  return error;
}

} // namespace

extern "C" {

// Cycles a product: of rows of `depth` channels, 64 or 32, the first operand's from row `shift` on, up to 8.
int rate_products(long long *memory, int columns, int warpgroups, int depth, int shift, double *result) {
  const void *kernel = columns == 8     ? kernel_of<8>(depth)
                       : columns == 16  ? kernel_of<16>(depth)
                       : columns == 32  ? kernel_of<32>(depth)
                       : columns == 64  ? kernel_of<64>(depth)
                       : columns == 128 ? kernel_of<128>(depth)
                                        : kernel_of<256>(depth);
  int groups = 256, stages = 2;
  void *arguments[] = {&groups, &stages, &shift, &memory};
  launch(kernel, 1, 128 * warpgroups, 1, false, arguments);
  return done(memory, 8.0 * groups, result);
}

// Cycles a box of one warp, all of which work beside each other. `x` is bfloat16 [1, 17, 17, 192], `weights`
// [7, 384, 192]. `whole`: copies are asked for by whole warps.
int rate_copies(long long *memory, uint64_t x, uint64_t weights, int whole, int x_warps, int weight_warps, int pixels,
                int rows, int blocks, int apart, double *result) {
  MapSpec image, matrix;
  image.base = x;
  image.rank = 4;
  image.im2col = true;
  image.swizzle = matrix.swizzle = Swizzle::bytes128;
  const uint64_t size[] = {192, 17, 17, 1};
  uint64_t stride = 2;
  for (int i = 0; i < 4; ++i) {
    image.size[i] = size[i];
    stride *= size[i];
    if (i < 3)
      image.stride[i] = stride;
  }
  image.lower[0] = -3;
  image.upper[0] = -3;
  image.channels = kDepth;
  image.pixels = pixels ? pixels : 64; // a map has to have some
  matrix.base = weights;
  matrix.rank = 3;
  const uint64_t of[] = {192, 384, 7};
  for (int i = 0; i < 3; ++i)
    matrix.size[i] = of[i];
  matrix.stride[0] = 2 * 192;
  matrix.stride[1] = 2 * 192 * 384;
  matrix.box[0] = kDepth;
  matrix.box[1] = rows ? rows : 32;
  matrix.box[2] = 1;
  CUtensorMap first, second;
  try {
    first = encode(image);
    second = encode(matrix);
  } catch (const std::exception &) {
    return -1;
  }
  int count = 512;
  void *arguments[] = {&first, &second, &x_warps, &pixels, &rows, &count, &apart, &memory};
  const void *kernel =
      whole ? reinterpret_cast<const void *>(&copies<true>) : reinterpret_cast<const void *>(&copies<false>);
  launch(kernel, blocks, 32 * (x_warps + weight_warps), 1, false, arguments);
  return done(memory, count, result);
}

// Cycles a row of `pixels` of `channels`, 64 or 32, of one warp, all of which work beside each other. `x` is bfloat16
// [images, height, pixels, channels].
int rate_lines(long long *memory, uint64_t x, int channels, int pixels, int height, int images, int warps, int blocks,
               double *result) {
  MapSpec map;
  map.base = x;
  map.rank = 4;
  map.swizzle = channels == 64 ? Swizzle::bytes128 : Swizzle::bytes64;
  const int size[] = {channels, pixels, height, images};
  uint64_t stride = 2;
  for (int i = 0; i < 4; ++i) {
    map.size[i] = static_cast<uint64_t>(size[i]);
    map.box[i] = i < 2 ? static_cast<uint32_t>(size[i]) : 1;
    stride *= map.size[i];
    if (i < 3)
      map.stride[i] = stride;
  }
  CUtensorMap made;
  try {
    made = encode(map);
  } catch (const std::exception &) {
    return -1;
  }
  int bytes = 2 * channels * pixels, count = 256;
  void *arguments[] = {&made, &bytes, &height, &images, &count, &memory};
  launch(reinterpret_cast<const void *>(&lines), blocks, 32 * warps, 1, false, arguments);
  return done(memory, count, result);
}

// Cycles an exchange, of so many clusters at once; `wrong` counts sums that did not arrive as they were sent.
int rate_exchanges(long long *memory, int *wrong, int clusters, int cooperative, double *result) {
  int rounds = 256;
  void *arguments[] = {&rounds, &memory, &wrong};
  launch(reinterpret_cast<const void *>(&exchanges), 4 * clusters, 128, 4, cooperative != 0, arguments);
  return done(memory, rounds, result);
}

// How many clusters of `size` blocks fit the device.
int rate_clusters(int size, int *clusters) {
  const void *kernel = reinterpret_cast<const void *>(&exchanges);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(size);
  config.blockDim = dim3(128);
  config.dynamicSmemBytes = kShared;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
}
}
