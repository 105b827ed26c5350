#include "conv_table.cuh"

namespace inception_fast::hopper {

template <> const void *conv_kernel<__half, BEHIND>(int index) {
  return conv_kernel_at<__half, BEHIND>(index, std::make_index_sequence<BEHIND_WIDTHS>());
}

} // namespace inception_fast::hopper
