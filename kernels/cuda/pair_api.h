// The fused pair's part of the C interface of _hopper.so; api.h has the conventions, and hopper_error the reasons.
//
// A pair is a = act1(scale1 * conv(x, w1) + shift1), y = act2(scale2 * conv(a, w2) + shift2): kernels 1 x taps and taps
// x 1 in either order, stride 1, SAME, on 17 x 17 maps. x is [n, 17, 17, c] and y [n, 17, 17, oc], pixels `pitch`
// elements apart; a is rounded once and never in global memory. Weights are packed as for a convolution: [taps][oc][c],
// c innermost.
//
// choices.json says where it was measured to win; nothing else should choose it by itself.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default) // the library hides everything else

typedef struct {
  uint64_t x, y;                     // multiples of 16
  uint64_t w1, scale1, shift1;       // packed weights, a multiple of 16; float32 [mid]
  uint64_t w2, scale2, shift2;       // the same, float32 [oc]
  int64_t x_pitch, y_pitch;          // multiples of 8
  int32_t n, h, w, c, mid, oc, taps; // h = w = 17, taps = 7; c a multiple of 8, mid of 32, oc of 16
  int32_t wide_first;                // 1: 1 x taps, then taps x 1; 0: the other way round
  int32_t relu1, relu2;              // 0 or 1
} HopperPair;

typedef struct {
  int32_t groups;  // warpgroups that multiply, 64 output channels each: 3 or 4
  int32_t cluster; // blocks, an image each, that share weights by multicast
  int32_t middle;  // most channels of the intermediate
  int32_t shared_bytes;
} HopperPairConfig;

// Writes up to `capacity` configurations and returns how many there are, in a fixed order.
int32_t hopper_pair_configs(HopperPairConfig *configs, int32_t capacity);

// Why this pair cannot run with this configuration, one reason a line; returns how many there are, 0 when it can. Needs
// no GPU.
int32_t hopper_pair_reasons(const HopperPair *pair, int32_t type, int32_t config, char *text, int64_t capacity);

int64_t hopper_pair_blob_bytes(void);

// As for a convolution; a pair needs no workspace.
int32_t hopper_pair_prepare(const HopperPair *pair, int32_t type, int32_t config, int32_t blocks, int32_t overlap,
                            void *blob);

int32_t hopper_pair_launch(const void *blob, uint64_t stream);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
