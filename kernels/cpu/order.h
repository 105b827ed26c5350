// In which order a plan's operators run, and on which images.
//
// A step may run a few images at a time: fewer the earlier it is, so that large maps stay in the cache, while weights
// that do not are read once for many images. Each step's number divides the next one's, and whenever the images of a
// later step are there, it runs: loops within loops, of which the innermost is the first steps'.
#pragma once

#include "ledger.h"

#include <string>
#include <vector>

namespace inception_fast::cpu {

// The operators [first, last) on the images from `image` on.
struct Run {
  int first, last;
  int32_t image;
};

// What an operator does to memory: `images` of each view's buffer at a time, or 0 for all.
struct Accesses {
  std::vector<View> reads, writes;
  int32_t images;
  bool serial;
  std::string where;
};

// The image of a buffer of n that stands for an image of the call: steps share buffers as large as the most of them
// hold at a time.
inline int32_t held_at(int32_t image, int32_t n) { return n > 0 ? image % n : 0; }

// Raises std::invalid_argument when some steps run all images at a time and others do not, or when a step's number does
// not divide the next one's, the last one's the batch.
std::vector<Run> runs_of(const std::vector<Accesses> &operators, int32_t batch);

// Follows the runs through the buffers; returns for every operator whether it must wait for those before it. Raises
// std::invalid_argument when one reads what is not there.
std::vector<bool> follow(const std::vector<Run> &runs, const std::vector<Accesses> &operators,
                         const std::vector<Buffer> &buffers);

} // namespace inception_fast::cpu
