// How far two cores are from each other.
#pragma once

namespace inception_fast::cpu {

// Seconds from when one thread writes a line of the cache until another, which waits for it on another core, sees that:
// the fewest of several runs. NaN where the process has one core only, or who shares it left no time for a run.
double handover();

} // namespace inception_fast::cpu
