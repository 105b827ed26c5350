#include "conv_table.cuh"

namespace inception_fast::hopper {

template <> const void *pooled_kernel<__nv_bfloat16>(int index) {
  return pooled_kernel_at<__nv_bfloat16>(index, std::make_index_sequence<POOLED_KINDS>());
}

} // namespace inception_fast::hopper
