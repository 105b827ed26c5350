// Plain data that the plan hands to the kernels of every tier.
//
// Nothing here has inline code: a tier's translation unit is compiled for its own instruction set, and a shared inline
// function emitted there could be picked by the linker for every machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace inception_fast::cpu {

enum class Type : int32_t { float32, bfloat16, uint8 };

// The upper half of a float.
struct bf16 {
  uint16_t bits;
};

// Channels [offset, offset + channels) of a buffer whose pixels lie `pitch` elements apart.
struct View {
  int32_t buffer;
  int32_t offset;
  int32_t channels;
  int32_t pitch;
  Type type;
};

// Up to two vectors of neighbouring output channels of one group and one output range.
struct Panel {
  int64_t packed; // float offset of the weights, then one row of scale, one row of shift
  int64_t first;  // vectors in the panels before this one
  int32_t group;
  int32_t column; // the first output channel
  int32_t width;  // output channels, at most vectors * lanes
  int32_t vectors;
  View y; // of `width` channels
  bool relu;
};

// Taps [tap0, tap1) of channels [c0, c1): the fixed stretches of K that are summed from zero.
struct Chunk {
  int32_t tap0, tap1;
  int32_t c0, c1;
};

// Weights are [k][vectors * lanes] of x's type, those of tiles and depthwise ones of float32. Those of bfloat16 come in
// pairs, [k / 2][vectors * lanes][2], and where the channels of a group are odd, every tap has one more of zeros, but
// where taps are `joined`. K is rows of `row_taps` taps, and each is filled up with zeros to `row_depth`: a multiple of
// the tier's `k_multiple` where `tiled`, an even number where `joined`, else just its taps.
struct ConvOp {
  int32_t n, h, w, c, oc, kh, kw, stride_h, stride_w, top, left, oh, ow, groups;
  View x, residual; // residual.buffer is -1 when there is none
  float residual_scale;
  const float *packed;
  const Panel *panels;
  const Chunk *chunks;
  int32_t panel_count, chunk_count;
  int32_t x_image, y_image;      // the images of x and y that the first one stands for
  int64_t y_map, y_row, y_start; // pixels of y from image to image and from row to row, and before the first
  bool columns;                  // tiles walk the map down its columns
  bool by_panel;                 // threads share out the panels first, else the pixels
  bool strips;                   // may be called on strips of its maps, as a part of a pair
  bool skip;                     // taps on padding alone are left out: all weights are finite
  bool tiled;                    // the weights are laid out for the tile unit
  bool joined;                   // the channels of a row of taps follow each other, and x is copied so that its do
  int32_t row_taps;
  int64_t row_depth;
  int32_t tile_h, tile_w; // outputs of a tile of Winograd's algorithm, else 0: its weights are [panel][p][c][columns]
  bool depthwise;         // each output channel reads one channel: weights are float32, [panel][taps][columns]
};

// The second convolution of what the first gives, whose place is a thread's own memory. Maps are shared out in strips
// along an axis on which the second has neither a kernel nor a stride nor padding: strips need nothing of each other.
struct PairOp {
  ConvOp first, second; // first writes and second reads the buffer LOCAL
  int64_t local_bytes;
  bool rows; // strips are of rows, else of columns
};

struct PoolOp {
  int32_t n, h, w, c, kh, kw, stride_h, stride_w, top, bottom, left, right, oh, ow;
  bool maximum, count_include_pad, relu;
  View x, y;
  const float *shift;
};

struct EltwiseOp {
  int64_t pixels;
  View x, y, residual;
  const float *scale, *shift;
  float residual_scale;
  bool relu;
};

struct ImportOp {
  int32_t source, n, h, w;
  View y;
  const float *scale, *shift;
};

struct LrnOp {
  int64_t pixels;
  View x, y;
  int32_t size;
  float alpha, beta, k;
};

struct NormalizeOp {
  int64_t pixels;
  View x, y;
  float eps;
};

// A call's input: strides in elements of logical n, c, h, w.
struct Input {
  const void *data;
  Type type;
  int64_t n, c, h, w;
};

// What a step's kernel sees of the call and of the team.
struct Call {
  void *const *bases; // of every buffer
  const Input *inputs;
  void *local;
};

constexpr int32_t LOCAL = -2; // a view's buffer: Call::local

struct Worker {
  int index, count;
  unsigned char *scratch;
};

constexpr int32_t IMPORT_PIXELS = 64; // pixels whose channels are written while their cache lines are at hand

// Convolutions by Winograd's tiles, in a translation unit of their own: with their gradient they are most of a tier's
// code.
struct WinogradTier {
  size_t (*scratch)(const ConvOp &);
  void (*conv)(const ConvOp &, const Call &, const Worker &);
};

// The kernels of one instruction set. `lanes` floats make a vector, `rows` pixels a tile; an import needs working
// memory for `import_pixels` pixels of floats. A tier with a tile unit multiplies `k_multiple` of K at a time.
struct Tier {
  const char *name;
  int lanes, rows, import_pixels, k_multiple;
  size_t (*conv_scratch)(const ConvOp &);
  void (*conv)(const ConvOp &, const Call &, const Worker &);
  const WinogradTier *winograd;
  size_t (*depthwise_scratch)(const ConvOp &);
  void (*depthwise)(const ConvOp &, const Call &, const Worker &);
  void (*pair)(const PairOp &, const Call &, const Worker &);
  void (*pool)(const PoolOp &, const Call &, const Worker &);
  void (*eltwise)(const EltwiseOp &, const Call &, const Worker &);
  void (*import)(const ImportOp &, const Call &, const Worker &);
  void (*lrn)(const LrnOp &, const Call &, const Worker &);
  void (*normalize)(const NormalizeOp &, const Call &, const Worker &);
  int64_t (*peak)(Type, int64_t rounds, float *sink);
};

extern const WinogradTier generic_winograd;
extern const WinogradTier amx_emulated_winograd;
extern const Tier generic_tier;
extern const Tier amx_emulated_tier; // slow: what the tile unit computes, on any processor
#ifdef INCEPTION_FAST_X86
extern const WinogradTier avx2_winograd;
extern const WinogradTier avx512_winograd;
extern const Tier avx2_tier;
extern const Tier avx512_tier;
extern const Tier avx512_bf16_tier;
extern const Tier amx_bf16_tier;
bool amx_multiplies(); // whether the tile unit's products are right; only where it may be used
#endif

// A chunk is at most this long: sequential float sums of this length stay within the fp32 budget, and a panel's chunk
// of weights stays in a 32 KiB level 1 cache. In bfloat16 twice as many weights have the room, and pairs the steps.
constexpr int32_t CHUNK = 288;
extern const float ZEROS[2 * CHUNK]; // what padding points at: a chunk, of bfloat16 that was widened too

} // namespace inception_fast::cpu
