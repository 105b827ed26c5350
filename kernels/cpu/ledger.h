// Follows who wrote which channels of which images of which buffer when a plan is built, so that a plan that reads what
// was never written, or was overwritten since, is refused, and so that steps wait for each other only where their
// memory meets.
#pragma once

#include "spec.h"

#include <string>
#include <vector>

namespace inception_fast::cpu {

enum class BufferKind { arena, input, output, local };

struct Buffer {
  int32_t n, h, w, c;
  BufferKind kind;
  int64_t position; // a byte offset in the arena, else an index among those of the kind
  Type type;        // float32 or bfloat16

  int64_t pixels() const { return int64_t(n) * h * w; }
  int64_t bytes() const { return (type == Type::bfloat16 ? 2 : 4) * pixels() * c; }
};

// The images [first, first + count) of a buffer; where a ledger does not tell images apart, they are one.
struct Images {
  int32_t first, count;
};

bool overlap(const std::vector<Buffer> &buffers, const View &a, const View &b);

class Ledger {
public:
  Ledger(const std::vector<Buffer> &buffers, bool by_image) : buffers_(buffers), by_image_(by_image) {}

  // Raises std::invalid_argument when some of the channels hold nothing.
  void read(const View &view, Images images, const std::string &what);
  // Raises std::invalid_argument when the buffer is an input.
  void write(const View &view, Images images, const std::string &what);
  // Raises std::invalid_argument when an output buffer is not written in full.
  void finish();

  // Whether an operator with these views must wait for those since the last wait. Operators of one thread keep their
  // order.
  bool fence(const std::vector<View> &reads, const std::vector<View> &writes, bool serial);

private:
  struct Access {
    View view;
    bool write, serial;
  };
  int32_t images(const Buffer &buffer) const { return by_image_ ? buffer.n : 1; }
  std::vector<bool> &filled(int32_t buffer); // [images][c]

  const std::vector<Buffer> &buffers_;
  bool by_image_;
  std::vector<std::vector<bool>> filled_;
  std::vector<Access> pending_;
};

std::string text(const View &view);

} // namespace inception_fast::cpu
