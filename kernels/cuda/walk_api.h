// The C interface of the walk: many convolutions and pools that depend on each other, run by one kernel whose blocks
// stay. Conventions, formulas and layouts are those of api.h.
//
// Jobs stand in an order in which each comes behind those that it needs: what it reads, and whoever read before it what
// it overwrites. A job starts when the jobs that it needs have ended; jobs that do not need each other run at the same
// time. Nothing else orders them.
//
// A pool, with x [n, h, w, c] and y [n, oh, ow, c]: y = act(pool(x) + shift), float32 sums, rounded once. The padding
// is minus infinity for a maximum, zero for an average; an average divides by the elements of the map in the window, or
// by those of the padded map. NaN spreads.
#pragma once

#include "api.h"

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

#define HOPPER_NEEDS 16     // earlier jobs that one waits for
#define HOPPER_WALK_MARKS 4 // of a unit, in a trace

enum HopperJobKind { HOPPER_JOB_CONV = 0, HOPPER_JOB_POOL = 1 };
enum HopperPoolKind { HOPPER_POOL_MAX = 0, HOPPER_POOL_AVERAGE = 1, HOPPER_POOL_AVERAGE_PADDED = 2 };

typedef struct {
  uint64_t x, y;  // addresses of the first channels, multiples of 16
  uint64_t shift; // float32 [c], a multiple of 16; 0 when there is none
  int64_t x_pitch, y_pitch;
  int32_t n, h, w, c; // c is a multiple of 8
  int32_t kh, kw;
  int32_t stride_h, stride_w;
  int32_t top, left;     // rows and columns of padding before the map
  int32_t bottom, right; // and behind it, for the divisor of HOPPER_POOL_AVERAGE_PADDED
  int32_t oh, ow;
  int32_t kind; // HopperPoolKind
  int32_t relu; // 0 or 1
} HopperPool;

// A bit in `relu` of a convolution's only output: its elements are float32, and its pitch counts these. There is no
// residual then.
#define HOPPER_FLOAT32 2

typedef struct {
  int32_t kind;    // HopperJobKind: which of `conv` and `pool` counts
  int32_t columns; // of a convolution's tiles of 64 pixels: one of hopper_walk_columns
  int32_t ahead;   // 1: L2 is asked ahead for weights that the ring does not hold, of tiles without halo; 0: it is not
  int32_t halo;    // 1: rows of x with their padding stay in shared memory for all taps; 0: x is copied for each tap
  int32_t needs;   // used entries of `need`
  int32_t need[HOPPER_NEEDS];
  HopperConv conv; // `splits` as there: parts of K
  HopperPool pool;
} HopperJob;

// Bytes of device memory.
typedef struct {
  int64_t table;     // what the kernel reads of its jobs, a multiple of 128
  int64_t workspace; // a multiple of 256
  int64_t counters;  // of it, from its beginning: zero before the first launch; every launch leaves them zero
} HopperWalkSizes;

// Writes up to `capacity` widths of tiles and returns how many there are.
int32_t hopper_walk_columns(int32_t *columns, int32_t capacity);

// Why these jobs cannot run, one reason a line; returns how many there are, 0 when they can. Needs no GPU.
int32_t hopper_walk_reasons(const HopperJob *jobs, int32_t count, int32_t type, char *text, int64_t capacity);

// `blocks` of a multiprocessor each share the tiles out; all of them have to fit the device at once.
int32_t hopper_walk_sizes(const HopperJob *jobs, int32_t count, int32_t blocks, HopperWalkSizes *sizes);

int64_t hopper_walk_blob_bytes(void);

// Writes the table to `host_table`, host memory of its size, from where the caller copies it to `table` before the
// first launch, and what a launch needs to `blob`. Encodes tensor maps, so it needs the driver. `table` is a multiple
// of 128 and `workspace` of 256, both in device memory.
int32_t hopper_walk_prepare(const HopperJob *jobs, int32_t count, int32_t type, uint64_t table, uint64_t workspace,
                            int32_t blocks, void *host_table, void *blob);

// Two launches of one blob must not run at the same time. All blocks are resident together, or the launch waits.
int32_t hopper_walk_launch(const void *blob, uint64_t stream);

// Units, tiles and pieces of pools, of all blocks in the order of a trace: writes the job and the block of up to
// `capacity` of them and returns how many there are.
int64_t hopper_walk_units(const HopperJob *jobs, int32_t count, int32_t blocks, int32_t *job, int32_t *block,
                          int64_t capacity);

// Writes to `traced` a blob that launches the same and leaves, in uint64 [units][HOPPER_WALK_MARKS] at `trace` in
// device memory, the device's nanoseconds at which a unit was taken up, what it needs had ended, its sums were there,
// and it had ended. A pool has no sums, and of a tile's parts only the one that stores has an end: their places stay.
int32_t hopper_walk_traced(const void *blob, uint64_t trace, void *traced);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
