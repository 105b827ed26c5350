#include "conv_table.cuh"

namespace inception_fast::hopper {

template <> const void *pooled_kernel<__half>(int index) {
  return pooled_kernel_at<__half>(index, std::make_index_sequence<POOLED_KINDS>());
}

} // namespace inception_fast::hopper
