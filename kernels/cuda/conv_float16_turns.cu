#include "conv_table.cuh"

namespace inception_fast::hopper {

template <> const void *conv_kernel<__half, TURNS>(int index) {
  return conv_kernel_at<__half, TURNS>(index, std::make_index_sequence<TILE_WIDTHS>());
}

} // namespace inception_fast::hopper
