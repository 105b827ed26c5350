#include "conv_table.cuh"

namespace inception_fast::hopper {

template <> const void *conv_kernel<__nv_bfloat16, BEHIND>(int index) {
  return conv_kernel_at<__nv_bfloat16, BEHIND>(index, std::make_index_sequence<BEHIND_WIDTHS>());
}

} // namespace inception_fast::hopper
