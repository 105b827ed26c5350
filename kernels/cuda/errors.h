// The message behind hopper_error: the last failure of the calling thread.
#pragma once

#include <exception>
#include <string>

namespace inception_fast::hopper {

inline std::string &last_error() {
  thread_local std::string text;
  return text;
}

inline int fail_with(const std::string &text) {
  last_error() = text;
  return 1;
}

// Nothing may be thrown through a C interface: `failure` stands for what was.
template <class R, class F> R guarded(R failure, F body) {
  try {
    return body();
  } catch (const std::exception &error) {
    last_error() = error.what();
    return failure;
  }
}

} // namespace inception_fast::hopper
