// Launches of two configurations of one kernel, all prepared before the first is launched, as an engine does.
#include <cstdio>
#include <exception>

#include <cuda_runtime.h>

#include "launch.h"

using namespace inception_fast::hopper;

struct Group {
  int nothing;
};

int main() {
  static const int kernel = 0;
  Blob<Group> launches[3]{};
  const int shared[] = {200 << 10, 100 << 10, 150 << 10};
  for (int i = 0; i < 3; ++i) {
    allow_shared(&kernel, shared[i]);
    launches[i].head = {
        7, current_device(), most_blocks(0, 0), 384, shared[i], 1 + i % 2, i % 2, reinterpret_cast<uint64_t>(&kernel)};
  }
  try {
    for (const Blob<Group> &launch : launches)
      launch_blob(&launch, 7, "this test", offsetof(Blob<Group>, group), 0);
  } catch (const std::exception &error) {
    std::puts(error.what());
    return 1;
  }
  return 0;
}
