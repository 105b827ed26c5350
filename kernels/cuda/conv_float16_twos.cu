#include "conv_table.cuh"

namespace inception_fast::hopper {

template <> const void *conv_kernel<__half, TWOS>(int index) {
  return conv_kernel_at<__half, TWOS>(index, std::make_index_sequence<TWOS_WIDTHS>());
}

} // namespace inception_fast::hopper
