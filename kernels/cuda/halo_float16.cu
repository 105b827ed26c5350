#include "conv_table.cuh"

namespace inception_fast::hopper {

template <> const void *halo_kernel<__half>(int index) {
  return halo_kernel_at<__half>(index, std::make_index_sequence<HALO_KINDS>());
}

} // namespace inception_fast::hopper
