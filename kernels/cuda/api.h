// The C interface of _hopper.so, for ctypes. Addresses and streams are integers, counts are elements, and nothing of a
// framework appears. The library loads on a machine without a GPU and without a driver; there `hopper_devices` says so.
//
// A convolution, with x [n, h, w, c] and y [n, oh, ow, oc], pixels `pitch` elements apart:
//   y = act(residual + residual_scale * (scale * conv(x, weights) + shift)), rounded once;
// without a residual y = act(scale * conv(x, weights) + shift). Sums, scale and shift are float32. Consecutive ranges
// of the oc columns go to `outputs` places, each with its own pitch and its own act: ReLU or the identity.
//
// Weights are packed as [kh * kw][oc][c], c innermost, in the type of x: torch's [oc, c, kh, kw] permuted by (2, 3, 0,
// 1).
//
// A group is up to HOPPER_GROUP convolutions that do not depend on each other, run by one kernel. `hopper_conv_prepare`
// turns it into a blob of `hopper_conv_blob_bytes` bytes that owns nothing and refers to the device memory named in it;
// launching a blob allocates nothing, so it may be captured in a CUDA graph. Functions that return int give 0 for
// success; else `hopper_error` has the reason, for the calling thread.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default) // the library hides everything else

#define HOPPER_ABI 7
#define HOPPER_GROUP 8   // convolutions of one launch
#define HOPPER_OUTPUTS 8 // destinations of one convolution

enum HopperType { HOPPER_BFLOAT16 = 0, HOPPER_FLOAT16 = 1 };

typedef struct {
  uint64_t y;       // address of the first channel of the first pixel, a multiple of 16
  int64_t pitch;    // a multiple of 8 below 2^31, as the other pitches
  int32_t channels; // columns that go here, a multiple of 8
  int32_t relu;     // 0 or 1
} HopperOutput;

typedef struct {
  uint64_t x;        // a multiple of 16
  uint64_t weights;  // packed, a multiple of 16
  uint64_t scale;    // float32 [oc], a multiple of 16
  uint64_t shift;    // float32 [oc], a multiple of 16
  uint64_t residual; // a multiple of 16; 0 when there is none
  int64_t x_pitch;   // a multiple of 8
  int64_t residual_pitch;
  int32_t n, h, w, c; // c is a multiple of 8
  int32_t oc;         // a multiple of 8
  int32_t kh, kw;
  int32_t stride_h, stride_w;
  int32_t top, left; // rows and columns of zeros before the map; those behind it follow from oh and ow
  int32_t oh, ow;
  int32_t pooled_h, pooled_w; // not 0: y [n, pooled_h, pooled_w, oc] is the maximum of 3x3 windows at stride 2 of that
                              // map, from its first pixel on, clipped at its end
  float residual_scale;
  int32_t splits;  // parts of K that are summed apart, then added in order; 1 leaves K whole
  int32_t outputs; // used entries of `output`
  HopperOutput output[HOPPER_OUTPUTS];
} HopperConv;

// One way to cut a group into tiles.
typedef struct {
  int32_t rows;    // pixels of a tile
  int32_t columns; // output channels of a tile
  int32_t depth;   // channels of a stage
  int32_t stages;  // of the ring
  int32_t cluster; // blocks that share the weights of a tile column by multicast
  int32_t turns;   // 0: two warpgroups halve a tile; 1: they take tiles in turn, one multiplies while the other stores,
                   // and where a tile has 128 pixels two and two do; 2, 3, 4: so many share a run of pixels of the
                   // padded map, whose rows stay for all taps (halo)
  int32_t behind;  // 1: results, and a residual, lie in shared memory, stored while the next tile multiplies
  int32_t pooled;  // 1: for one convolution whose result is pooled; 0: for those whose results are not
  int32_t shared_bytes;
} HopperConfig;

int32_t hopper_abi(void); // HOPPER_ABI of the library, for the loader to compare

// Devices of compute capability 9.0 that the driver shows, or -1 with the reason in hopper_error.
int32_t hopper_devices(void);

const char *hopper_error(void);

// Writes up to `capacity` configurations and returns how many there are. Their order is fixed within one ABI.
int32_t hopper_conv_configs(HopperConfig *configs, int32_t capacity);

// Why this group cannot run with this configuration, one reason a line; returns how many there are, 0 when it can.
// Needs no GPU.
int32_t hopper_conv_reasons(const HopperConv *convs, int32_t count, int32_t type, int32_t config, char *text,
                            int64_t capacity);

// Tiles of the group, times their splits: what the blocks of the launch share out.
int64_t hopper_conv_units(const HopperConv *convs, int32_t count, int32_t config);

// Bytes of `workspace` that the group needs, 0 when nothing is split. The first `hopper_conv_counter_bytes` of it must
// be zero before the first launch; every launch leaves them zero.
int64_t hopper_conv_workspace_bytes(const HopperConv *convs, int32_t count, int32_t config);
int64_t hopper_conv_counter_bytes(const HopperConv *convs, int32_t count, int32_t config);

int64_t hopper_conv_blob_bytes(void);

// Encodes the tensor maps, so it needs the driver. A blob is launched on the device that was current here. `blocks`
// limits the grid; 0 means one for each multiprocessor of the current device. `overlap` is 1 to let the grid start
// before the one ahead of it in the stream has ended. It waits for that one's end before it touches x, y, the residual
// or the workspace, but not before it loads weights: whatever wrote these has to have ended before the last launch
// without `overlap` ahead of this one in the stream.
int32_t hopper_conv_prepare(const HopperConv *convs, int32_t count, int32_t type, int32_t config, uint64_t workspace,
                            int32_t blocks, int32_t overlap, void *blob);

int32_t hopper_conv_launch(const void *blob, uint64_t stream);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
