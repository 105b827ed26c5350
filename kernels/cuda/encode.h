// Tensor maps by the driver, which is asked for at run time: the library links nothing of it.
#pragma once

#include <cuda.h> // types only

#include "tensor_map.h"

namespace inception_fast::hopper {

// Throws std::runtime_error with the reason: no driver, or a map that the driver refuses.
CUtensorMap encode(const MapSpec &spec);

} // namespace inception_fast::hopper
