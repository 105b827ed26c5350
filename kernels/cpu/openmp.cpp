#include "openmp.h"

#include <atomic>
#include <cstring>

#include <pthread.h>
#ifdef __linux__
#include <dlfcn.h>
#include <link.h>
#endif

namespace inception_fast::cpu {

namespace {

#ifdef __linux__
template <class F> void look_up(void *library, const char *name, F &function) {
  function = reinterpret_cast<F>(dlsym(library, name));
}

int find(dl_phdr_info *info, size_t, void *found) {
  const char *slash = info->dlpi_name ? std::strrchr(info->dlpi_name, '/') : nullptr;
  const char *name = slash ? slash + 1 : "";
  if (!std::strstr(name, "libgomp") && !std::strstr(name, "libiomp5") && !std::strstr(name, "libomp"))
    return 0;
  void *library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr)
    return 0;
  OpenMp &runtime = *static_cast<OpenMp *>(found);
  look_up(library, "GOMP_parallel", runtime.parallel);
  look_up(library, "GOMP_barrier", runtime.barrier);
  look_up(library, "omp_get_thread_num", runtime.index);
  look_up(library, "omp_get_num_threads", runtime.count);
  return runtime ? 1 : 0;
}
#endif

std::atomic<bool> forked{false};

// From when this library is loaded on: torch's threads may run, and the process fork, before the first kernel. Of forks
// before that Python tells.
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, leave_openmp);

OpenMp look_around() {
  OpenMp found;
#ifdef __linux__
  if (dl_iterate_phdr(find, &found) == 0)
    found = {};
#endif
  return found;
}

} // namespace

void leave_openmp() { forked.store(true, std::memory_order_relaxed); }

const OpenMp &openmp() {
  static const OpenMp none, runtime = look_around();
  return forked.load(std::memory_order_relaxed) ? none : runtime;
}

} // namespace inception_fast::cpu
