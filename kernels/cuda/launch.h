// What every kernel's launch has in common: the device it was prepared for, its grid, and the attributes.
#pragma once

#include <cstdint>

namespace inception_fast::hopper {

// How a blob begins. The kernel's parameters, a structure of its own, follow.
struct LaunchHead {
  uint32_t magic; // whose blob it is
  int32_t device, blocks, threads, shared_bytes, cluster, overlap;
  uint64_t kernel;         // address in this process
  int32_t cooperative = 0; // 1: all blocks are resident together, or none
};

template <class GROUP> struct Blob {
  LaunchHead head;
  GROUP group;
};

// Each of these throws std::runtime_error with what the runtime says, or std::invalid_argument with what is allowed.

// Devices of compute capability 9.0 that the driver shows.
int fitting_devices();

// The current device, which has to be one of these.
int current_device();

// Blocks that a launch may have: `blocks`, or one for each multiprocessor of the device where that is 0.
int most_blocks(int blocks, int device);

// Lets the kernel have at least that much dynamic shared memory on the current device, in all its launches from now
// on. Several configurations share a kernel, and a launch is refused that wants more than was allowed last.
void allow_shared(const void *kernel, int bytes);

// Launches what `bytes`, a blob that need not be aligned, says; `parameters` is the offset of GROUP in it, and
// `maker` the function that makes such blobs.
void launch_blob(const void *bytes, uint32_t magic, const char *maker, int64_t parameters, uint64_t stream);

} // namespace inception_fast::hopper
