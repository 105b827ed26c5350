// Which pixels, taps and rows of shared memory the fused pair touches. Plain arithmetic that the kernel, its host side
// and the tests share.
//
// A convolution along one axis of a 17 x 17 map, its pixels numbered with that axis slow (index = slow * 17 + fast),
// sees at each tap the same map shifted by a whole number of rows of 17. So a tap of a product of matrices is a
// constant shift of the pixel operand, and what a shift brings in from beyond either end is the padding.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace inception_fast::hopper {

constexpr int SIDE = 17;
constexpr int PIXELS = SIDE * SIDE;
constexpr int PAIR_DEPTH = 32;                // channels of a stage, of input and of weights
constexpr int PAIR_PLANES = PAIR_DEPTH / 8;   // a plane has 8 channels of all pixels, 16 bytes each
constexpr int INPUT_ROWS = (SIDE + 2) * SIDE; // a plane of the input, with a row of zeros at either end
constexpr int INPUT_PLANE = INPUT_ROWS * 16;  // bytes
constexpr int INPUT_BYTES = PAIR_PLANES * INPUT_PLANE;
constexpr int INPUT_PITCH = (INPUT_BYTES + 127) / 128 * 128;
constexpr int INPUT_STAGES = 2;
constexpr int MIDDLE_GUARD = 3; // pixels of zeros at either end of a plane of the intermediate
constexpr int MIDDLE_PLANE = (PIXELS + 2 * MIDDLE_GUARD) * 16;
constexpr int WEIGHT_ROW = PAIR_DEPTH * 2;    // bytes
constexpr int WEIGHT_GROUP = 64 * WEIGHT_ROW; // the rows of one warpgroup
constexpr int PAIR_STAGED = 16 * 32;          // a warp's: 16 pixels of 16 channels
constexpr int MAX_WEIGHT_STAGES = 8;

// The sums of a whole image do not fit into registers, so a convolution takes passes: two when three warpgroups have
// the registers, three when four have. A pass owns the pixels up to the next one's first, and computes whole groups
// of 8.
HOST_DEVICE constexpr int passes(int groups) { return groups == 4 ? 3 : 2; }
HOST_DEVICE constexpr int pass_begin(int groups, int pass) {
  return groups == 4 ? (pass == 0 ? 0 : 1 + 96 * pass) : 153 * pass;
}
HOST_DEVICE constexpr int pass_end(int groups, int pass) {
  return pass + 1 < passes(groups) ? pass_begin(groups, pass + 1) : PIXELS;
}
HOST_DEVICE constexpr int pass_columns(int groups, int pass) {
  return (pass_end(groups, pass) - pass_begin(groups, pass) + 7) / 8 * 8;
}
HOST_DEVICE constexpr int pass_sums(int groups) {
  return pass_columns(groups, 0) / 2;
} // a thread's, in the largest pass

HOST_DEVICE constexpr int tap_shift(int taps, int tap) { return SIDE * (tap - taps / 2); }

// Of a pass's columns, [low, high) in multiples of 8 see pixels of the map at this tap; the rest see padding alone.
HOST_DEVICE constexpr int tap_low(int groups, int taps, int pass, int tap) {
  const int missing = -tap_shift(taps, tap) - pass_begin(groups, pass);
  return missing > 0 ? missing / 8 * 8 : 0;
}

HOST_DEVICE constexpr int tap_high(int groups, int taps, int pass, int tap) {
  const int seen = PIXELS - tap_shift(taps, tap) - pass_begin(groups, pass);
  return seen < pass_columns(groups, pass) ? (seen + 7) / 8 * 8 : pass_columns(groups, pass);
}

// How many warpgroups of 64 output channels an instance has, and what follows from it.
HOST_DEVICE constexpr int middle_channels(int groups) { return groups == 4 ? 224 : 64 * groups; }
HOST_DEVICE constexpr int weight_stages(int groups) { return groups == 4 ? 3 : 5; }
HOST_DEVICE constexpr int weight_bytes(int groups) { return groups * WEIGHT_GROUP; }
HOST_DEVICE constexpr int pair_threads(int groups) { return (groups + 1) * 128; }

HOST_DEVICE constexpr int pair_shared_bytes(int groups) {
  return weight_stages(groups) * weight_bytes(groups) + INPUT_STAGES * INPUT_PITCH +
         middle_channels(groups) / 8 * MIDDLE_PLANE + groups * 4 * PAIR_STAGED +
         2 * (MAX_WEIGHT_STAGES + INPUT_STAGES) * 8;
}

} // namespace inception_fast::hopper
