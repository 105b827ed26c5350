// Whether this process may use the tile unit.
#pragma once

namespace inception_fast::cpu {

// Asks processor and system, and the system for leave, which all threads of the process then have. The processor's
// AVX-512 is the caller's to check.
bool amx_allowed();

} // namespace inception_fast::cpu
