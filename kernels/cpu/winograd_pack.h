// The weights of Winograd's algorithm, u = G w G', in the order in which its kernel reads them.
#pragma once

#include "pack.h"

#include <vector>

namespace inception_fast::cpu {

// Outputs [h, w] of a tile for a kernel [kh, kw].
struct WinogradTile {
  int32_t kh, kw, h, w;
};

// All that there are kernels for.
const std::vector<WinogradTile> &winograd_tiles();

// Sets the operator's `row_taps` and `row_depth`.
void lay_out_points(ConvOp &op);

// Fills some of a panel's columns, each weight rounded once. Returns whether all are finite.
bool pack_points(const ConvOp &op, const Stretch &from, int columns, float *to);

} // namespace inception_fast::cpu
