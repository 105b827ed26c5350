// Whether wgmma reads an operand whose descriptor starts `shift` rows into its layout: the taps of a convolution as row
// shifts of one resident image. d [64, 8] = a [64, 16] * b [8, 16]^T with b the rows [shift, shift + 8) of an image of
// 64 rows, K = 16 of its 64 channels from channel 16 on. Once without a swizzle and once with that of 128 bytes.
#include "hopper.cuh"

using namespace inception_fast::hopper;

namespace {

constexpr int kRows = 64, kDepth = 64, kColumns = 8;

__device__ __forceinline__ uint32_t place(int row, int channel, bool swizzled) {
  const int chunk = channel / 8;
  return swizzled ? row * 128 + (chunk ^ row % 8) * 16 : chunk * kRows * 16 + row * 16;
}

__device__ __forceinline__ Descriptor operand(uint32_t address, int shift, bool swizzled) {
  return swizzled ? matrix_descriptor(address + shift * 128 + 32, 0, 1024, Swizzle::bytes128)
                  : matrix_descriptor(address + shift * 16 + 2 * kRows * 16, kRows * 16, 128, Swizzle::none);
}

// a and b [64, 64] bfloat16, d [64, 8].
#ifdef INCEPTION_FAST_EMULATED
inline void probe(const void *a, const void *b, float *d, int shift, int swizzled)
#else
__global__ void __launch_bounds__(128) probe(const void *a, const void *b, float *d, int shift, int swizzled)
#endif
{
  const uint32_t left = shared_address(dynamic_shared()), right = left + kRows * kDepth * 2;
  const int thread = threadIdx.x;
  for (int i = thread; i < kRows * kDepth / 8; i += 128) {
    const uint32_t to = place(i / 8, i % 8 * 8, swizzled);
    store_shared_16(left + to, load_global_16(static_cast<const uint4 *>(a) + i));
    store_shared_16(right + to, load_global_16(static_cast<const uint4 *>(b) + i));
  }
  fence_async_shared();
  sync_block();
  float sums[kColumns / 2] = {};
  wgmma_fence();
  wgmma<kColumns, __nv_bfloat16>(sums, operand(left, 0, swizzled), operand(right, shift, swizzled), 0);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8, column = thread % 4 * 2 + i % 2;
    d[row * kColumns + column] = sums[i];
  }
}

constexpr uint32_t kShared = 1024 + 2 * kRows * kDepth * 2;

} // namespace

extern "C" int probe_shift(const void *a, const void *b, float *d, int shift, int swizzled) {
#ifdef INCEPTION_FAST_EMULATED
  return inception_fast::emulated::launch_grid(1, 128, 1, kShared, [&] { probe(a, b, d, shift, swizzled); });
#else
  probe<<<1, 128, kShared>>>(a, b, d, shift, swizzled);
  return cudaDeviceSynchronize();
#endif
}
