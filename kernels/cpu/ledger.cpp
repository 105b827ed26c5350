#include "ledger.h"

#include <algorithm>
#include <stdexcept>

namespace inception_fast::cpu {

std::string text(const View &view) {
  return "channels [" + std::to_string(view.offset) + ", " + std::to_string(view.offset + view.channels) +
         ") of buffer " + std::to_string(view.buffer);
}

static bool share_bytes(const Buffer &a, const Buffer &b) {
  if (a.kind != b.kind)
    return false;
  if (a.kind != BufferKind::arena)
    return a.position == b.position;
  return a.position < b.position + b.bytes() && b.position < a.position + a.bytes();
}

bool overlap(const std::vector<Buffer> &buffers, const View &a, const View &b) {
  if (a.buffer == b.buffer)
    return a.offset < b.offset + b.channels && b.offset < a.offset + a.channels;
  return share_bytes(buffers[a.buffer], buffers[b.buffer]);
}

std::vector<bool> &Ledger::filled(int32_t buffer) {
  for (size_t i = filled_.size(); i < buffers_.size(); ++i)
    filled_.emplace_back(size_t(images(buffers_[i])) * buffers_[i].c, buffers_[i].kind == BufferKind::input);
  return filled_[buffer];
}

void Ledger::read(const View &view, Images images, const std::string &what) {
  const std::vector<bool> &channels = filled(view.buffer);
  for (int32_t image = images.first; image < images.first + images.count; ++image)
    for (int32_t c = view.offset; c < view.offset + view.channels; ++c)
      if (!channels[size_t(image) * buffers_[view.buffer].c + c])
        throw std::invalid_argument(
            what + " reads " + text(view) + ", whose channel " + std::to_string(c) +
            " holds nothing; allowed: channels that an earlier step wrote and none overwrote since");
}

void Ledger::write(const View &view, Images images, const std::string &what) {
  const Buffer &buffer = buffers_[view.buffer];
  if (buffer.kind == BufferKind::input)
    throw std::invalid_argument(what + " writes buffer " + std::to_string(view.buffer) +
                                " of kind input; allowed: arena, output");
  std::vector<bool> &channels = filled(view.buffer);
  for (int32_t image = images.first; image < images.first + images.count; ++image)
    std::fill_n(channels.begin() + size_t(image) * buffer.c + view.offset, view.channels, true);
  for (size_t i = 0; i < buffers_.size(); ++i)
    if (static_cast<int32_t>(i) != view.buffer && share_bytes(buffers_[i], buffer))
      filled_[i].assign(filled_[i].size(), false);
}

void Ledger::finish() {
  for (size_t i = 0; i < buffers_.size(); ++i)
    if (buffers_[i].kind == BufferKind::output)
      read({static_cast<int32_t>(i), 0, buffers_[i].c, buffers_[i].c, buffers_[i].type}, {0, images(buffers_[i])},
           "the caller");
}

bool Ledger::fence(const std::vector<View> &reads, const std::vector<View> &writes, bool serial) {
  auto meets = [&](const View &view, bool write) {
    return std::any_of(pending_.begin(), pending_.end(), [&](const Access &other) {
      return (write || other.write) && !(serial && other.serial) && overlap(buffers_, view, other.view);
    });
  };
  bool wait = std::any_of(reads.begin(), reads.end(), [&](const View &view) { return meets(view, false); }) ||
              std::any_of(writes.begin(), writes.end(), [&](const View &view) { return meets(view, true); });
  if (wait)
    pending_.clear();
  for (const View &view : reads)
    pending_.push_back({view, false, serial});
  for (const View &view : writes)
    pending_.push_back({view, true, serial});
  return wait;
}

} // namespace inception_fast::cpu
