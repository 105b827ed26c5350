// The OpenMP runtime that the process has loaded, if any. Its functions are looked up, never linked against.
//
// Kernels that take turns with another library's must share its threads: two pools would fight for the same cores,
// since the threads of either spin for a while after their work.
#pragma once

namespace inception_fast::cpu {

// The compiler's own entry points, which GNU's, LLVM's and Intel's runtimes all have.
struct OpenMp {
  void (*parallel)(void (*body)(void *), void *context, unsigned threads, unsigned flags) = nullptr;
  void (*barrier)() = nullptr;
  int (*index)() = nullptr;
  int (*count)() = nullptr;

  explicit operator bool() const { return parallel && barrier && index && count; }
};

// False in a forked child: its runtime waits for ever for the threads that the fork has left behind.
const OpenMp &openmp();

// For a child forked before this library was loaded: there is no runtime from now on.
void leave_openmp();

} // namespace inception_fast::cpu
