#include "truth.h"

#include <cmath>
#include <limits>

namespace native_driver {

static float read(const Maps &maps, const View &view, int64_t pixel, int c) {
  return get(view.type, maps.bases[view.buffer], pixel * view.pitch + view.offset + c);
}

static void write(const Maps &maps, const View &view, int64_t pixel, int c, bool relu, double value) {
  put(view.type, maps.bases[view.buffer], pixel * view.pitch + view.offset + c,
      static_cast<float>(relu && value < 0 ? 0 : value));
}

void conv(const Maps &maps, const ConvSpec &s, const View &x, const Values &weight, const Values &scale,
          const Values &shift, const std::vector<Target> &targets, const View *residual, float residual_scale) {
  int depth = s.c / s.groups, oh = (s.h + s.padding[0] + s.padding[1] - s.kh) / s.stride[0] + 1,
      ow = (s.w + s.padding[2] + s.padding[3] - s.kw) / s.stride[1] + 1;
  bool finite = true; // where all weights are, what they multiply on padding is nothing
  for (float value : weight)
    finite &= std::isfinite(value);
  for (int64_t pixel = 0; pixel < int64_t(s.n) * oh * ow; ++pixel) {
    int64_t image = pixel / (oh * ow);
    int top = static_cast<int>(pixel / ow % oh) * s.stride[0] - s.padding[0],
        left = static_cast<int>(pixel % ow) * s.stride[1] - s.padding[2];
    int oc = 0;
    for (const Target &target : targets)
      for (int i = 0; i < target.y.channels; ++i, ++oc) {
        double sum = 0;
        int first = oc / (s.oc / s.groups) * depth;
        for (int kh = 0; kh < s.kh; ++kh)
          for (int kw = 0; kw < s.kw; ++kw) {
            int row = top + kh, column = left + kw;
            bool inside = row >= 0 && row < s.h && column >= 0 && column < s.w;
            if (!inside && finite)
              continue;
            for (int c = 0; c < depth; ++c) {
              double value = inside ? read(maps, x, (image * s.h + row) * s.w + column, first + c) : 0;
              sum += value * weight[((int64_t(oc) * depth + c) * s.kh + kh) * s.kw + kw];
            }
          }
        double value = sum * scale[oc] + shift[oc];
        if (residual)
          value = read(maps, *residual, pixel, oc) + residual_scale * value;
        write(maps, target.y, pixel, i, target.relu, value);
      }
  }
}

void pool(const Maps &maps, const PoolSpec &s, const View &x, const View &y, const Values &shift, bool relu) {
  auto [top, bottom, left, right] = s.padding;
  int oh = (s.h + top + bottom + s.overhang[0] - s.kh) / s.stride[0] + 1,
      ow = (s.w + left + right + s.overhang[1] - s.kw) / s.stride[1] + 1;
  for (int64_t pixel = 0; pixel < int64_t(s.n) * oh * ow; ++pixel) {
    int64_t image = pixel / (oh * ow);
    int row0 = static_cast<int>(pixel / ow % oh) * s.stride[0] - top,
        column0 = static_cast<int>(pixel % ow) * s.stride[1] - left;
    for (int c = 0; c < s.c; ++c) {
      double best = -std::numeric_limits<double>::infinity(), sum = 0;
      int inside = 0, padded = 0;
      for (int row = row0; row < row0 + s.kh; ++row)
        for (int column = column0; column < column0 + s.kw; ++column) {
          padded += row < s.h + bottom && column < s.w + right;
          if (row < 0 || row >= s.h || column < 0 || column >= s.w)
            continue;
          double value = read(maps, x, (image * s.h + row) * s.w + column, c);
          best = value > best || std::isnan(value) ? value : best;
          sum += value;
          ++inside;
        }
      int count = s.count_include_pad ? padded : inside;
      float value = static_cast<float>(s.maximum ? best : sum);
      if (!s.maximum && count > 0)
        value /= static_cast<float>(count);
      write(maps, y, pixel, c, relu, shift.empty() ? value : value + shift[c]);
    }
  }
}

void eltwise(const Maps &maps, int64_t pixels, const View &x, const View &y, const Values &scale, const Values &shift,
             bool relu, const View *residual, float residual_scale) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    for (int c = 0; c < x.channels; ++c) {
      double value = read(maps, x, pixel, c);
      value = value * (scale.empty() ? 1 : scale[c]) + (shift.empty() ? 0 : shift[c]);
      if (residual)
        value = read(maps, *residual, pixel, c) + residual_scale * value;
      write(maps, y, pixel, c, relu, value);
    }
}

void import(const Maps &maps, int source, const Shape &s, const View &y, const Values &scale, const Values &shift) {
  const Input &x = maps.inputs[source];
  for (int64_t pixel = 0; pixel < int64_t(s.n) * s.h * s.w; ++pixel)
    for (int c = 0; c < s.c; ++c) {
      int64_t at = pixel / (s.h * s.w) * x.n + pixel / s.w % s.h * x.h + pixel % s.w * x.w + c * x.c;
      double value = get(x.type, x.data, at);
      write(maps, y, pixel, c, false, value * (scale.empty() ? 1 : scale[c]) + (shift.empty() ? 0 : shift[c]));
    }
}

void lrn(const Maps &maps, int64_t pixels, const View &x, const View &y, int size, float alpha, float beta, float k) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    Values values;
    for (int c = 0; c < x.channels; ++c)
      values.push_back(read(maps, x, pixel, c));
    for (int c = 0; c < x.channels; ++c) {
      double sum = 0;
      for (int i = c - size / 2; i < c - size / 2 + size; ++i)
        if (i >= 0 && i < x.channels)
          sum += double(values[i]) * values[i];
      float base = static_cast<float>(k + double(alpha) / size * sum), root = std::sqrt(base);
      float power = beta == 0.75f ? root * std::sqrt(root) : beta == 0.5f ? root : std::pow(base, beta);
      write(maps, y, pixel, c, false, values[c] / power);
    }
  }
}

void normalize(const Maps &maps, int64_t pixels, const View &x, const View &y, float eps) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    Values values;
    double sum = 0;
    for (int c = 0; c < x.channels; ++c) {
      values.push_back(read(maps, x, pixel, c));
      sum += double(values[c]) * values[c];
    }
    float norm = std::sqrt(static_cast<float>(sum)), divisor = norm < eps ? eps : norm;
    for (int c = 0; c < x.channels; ++c)
      write(maps, y, pixel, c, false, values[c] / divisor);
  }
}

} // namespace native_driver
