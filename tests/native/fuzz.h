// Random plans, seed by seed.
#pragma once

#include <string>
#include <vector>

namespace native_driver {

struct Fuzz {
  std::string test = "all", tier = "all";
  int seed = 0, seeds = 20;
};

// Names, each with what it is about.
std::vector<std::pair<std::string, std::string>> fuzz_tests();

// Returns the number of plans that ran. Raises std::runtime_error at the first that differs from its truth.
int fuzz(const Fuzz &options);

} // namespace native_driver
