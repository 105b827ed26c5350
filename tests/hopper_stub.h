// The formulas of `api.h` by plain loops over host memory, for the stand-ins of the library.
#pragma once

#include "api.h"
#include "walk_api.h"

#include <cmath>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

namespace stub {

inline thread_local std::string error;

struct Launched {
  int32_t count, config, overlap, splits;
};

constexpr int32_t STUB_WALK = -100; // in place of the number of a configuration

inline std::vector<Launched> launched;

inline float load(uint64_t base, int64_t at, int32_t type) {
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const uint16_t *>(base) + at, 2);
  if (type == HOPPER_BFLOAT16) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}

inline void store(uint64_t base, int64_t at, int32_t type, float value) {
  uint16_t bits;
  if (type == HOPPER_BFLOAT16) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = value != value ? 0x7fc0 : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16); // to nearest, ties to even
  } else {
    _Float16 narrow = _Float16(value);
    std::memcpy(&bits, &narrow, 2);
  }
  std::memcpy(reinterpret_cast<uint16_t *>(base) + at, &bits, 2);
}

inline int64_t pixels(const HopperConv &conv) { return int64_t(conv.n) * conv.oh * conv.ow; }

// One tap and channel after the other; `part` of `parts` sums its share of them.
inline float sum(const HopperConv &conv, int32_t type, int64_t pixel, int32_t column, int32_t part) {
  const int64_t image = pixel / (conv.oh * conv.ow), y = pixel / conv.ow % conv.oh, x = pixel % conv.ow;
  const int32_t all = conv.kh * conv.kw * conv.c;
  double total = 0;
  for (int32_t k = int64_t(all) * part / conv.splits; k < int64_t(all) * (part + 1) / conv.splits; ++k) {
    const int32_t tap = k / conv.c, channel = k % conv.c;
    const int64_t row = y * conv.stride_h - conv.top + tap / conv.kw;
    const int64_t col = x * conv.stride_w - conv.left + tap % conv.kw;
    if (row < 0 || row >= conv.h || col < 0 || col >= conv.w)
      continue;
    const int64_t at = ((image * conv.h + row) * conv.w + col) * conv.x_pitch + channel;
    total +=
        double(load(conv.x, at, type)) * load(conv.weights, (int64_t(tap) * conv.oc + column) * conv.c + channel, type);
  }
  return float(total);
}

inline void finish(const HopperConv &conv, int32_t type, int64_t pixel, int32_t column, float total) {
  const float scale = reinterpret_cast<const float *>(conv.scale)[column];
  const float shift = reinterpret_cast<const float *>(conv.shift)[column];
  float y = scale * total + shift;
  if (conv.residual)
    y = load(conv.residual, pixel * conv.residual_pitch + column, type) + conv.residual_scale * y;
  for (int32_t i = 0, first = 0; i < conv.outputs; first += conv.output[i++].channels) {
    const HopperOutput &to = conv.output[i];
    if (column < first || column >= first + to.channels)
      continue;
    if (to.relu & HOPPER_FLOAT32)
      reinterpret_cast<float *>(to.y)[pixel * to.pitch + column - first] = to.relu & 1 && y < 0 ? 0 : y;
    else
      store(to.y, pixel * to.pitch + column - first, type, to.relu && y < 0 ? 0 : y);
  }
}

inline int32_t fail(const std::string &why) {
  error = why;
  return 1;
}

inline void complain(std::string &all, int32_t &count, bool wrong, const std::string &why) {
  if (!wrong)
    return;
  all += (count++ ? "\n" : "") + why;
}

// What is wrong with a convolution whatever its cut is.
inline void complain_of(const HopperConv &conv, std::string &all, int32_t &found) {
  complain(all, found, conv.c % 8, "c " + std::to_string(conv.c) + "; allowed: multiples of 8");
  complain(all, found, conv.oc % 8, "oc " + std::to_string(conv.oc) + "; allowed: multiples of 8");
  complain(all, found, conv.x % 16 || conv.x_pitch % 8, "x is not on 16 bytes");
  complain(all, found, conv.residual % 16 || conv.residual_pitch % 8, "the residual is not on 16 bytes");
  complain(all, found, conv.splits < 1, "splits " + std::to_string(conv.splits));
  int32_t columns = 0;
  for (int32_t j = 0; j < conv.outputs; ++j) {
    columns += conv.output[j].channels;
    complain(all, found, conv.output[j].y % 16 || conv.output[j].pitch % 8 || conv.output[j].channels % 8,
             "output " + std::to_string(j) + " is not on 16 bytes");
  }
  complain(all, found, columns != conv.oc, "outputs of " + std::to_string(columns) + " columns");
}

inline float *compute(const HopperConv &conv, int32_t type, float *parts);

// The maxima of a convolution's results.
inline float *compute_pooled(const HopperConv &conv, int32_t type, float *parts) {
  HopperConv whole = conv;
  std::vector<uint16_t> middle(pixels(conv) * conv.oc);
  whole.pooled_h = whole.pooled_w = 0;
  for (int32_t i = 0, first = 0; i < conv.outputs; first += conv.output[i++].channels) {
    whole.output[i].y = reinterpret_cast<uint64_t>(&middle[first]);
    whole.output[i].pitch = conv.oc;
  }
  parts = compute(whole, type, parts);
  for (int64_t at = 0; at < int64_t(conv.n) * conv.pooled_h * conv.pooled_w; ++at)
    for (int32_t i = 0, first = 0; i < conv.outputs; first += conv.output[i++].channels)
      for (int32_t column = 0; column < conv.output[i].channels; ++column) {
        const int64_t w = at % conv.pooled_w, h = at / conv.pooled_w % conv.pooled_h;
        const int64_t image = at / conv.pooled_w / conv.pooled_h;
        float most = -INFINITY;
        for (int64_t y = 2 * h; y < 2 * h + 3 && y < conv.oh; ++y)
          for (int64_t x = 2 * w; x < 2 * w + 3 && x < conv.ow; ++x) {
            const uint64_t from = reinterpret_cast<uint64_t>(middle.data());
            const float one = load(from, ((image * conv.oh + y) * conv.ow + x) * conv.oc + first + column, type);
            most = one != one || one > most ? one : most;
          }
        store(conv.output[i].y, at * conv.output[i].pitch + column, type, most);
      }
  return parts;
}

// All of a convolution, its parts of K through `parts` where there are several; returns the end of these.
inline float *compute(const HopperConv &conv, int32_t type, float *parts) {
  if (conv.pooled_h)
    return compute_pooled(conv, type, parts);
  for (int64_t pixel = 0; pixel < pixels(conv); ++pixel)
    for (int32_t column = 0; column < conv.oc; ++column) {
      float total = 0;
      for (int32_t part = 0; part < conv.splits; ++part) {
        const float share = sum(conv, type, pixel, column, part);
        if (conv.splits > 1)
          *parts++ = share;
        total += share;
      }
      finish(conv, type, pixel, column, total);
    }
  return parts;
}

// As `hopper_*_reasons` give it.
inline int32_t told(const std::string &all, int32_t found, char *text, int64_t capacity) {
  if (capacity > 0) {
    std::strncpy(text, all.c_str(), capacity);
    text[capacity - 1] = 0;
  }
  return found;
}

} // namespace stub
