#include "parallel.h"

#include "team.h"

#include <cstring>

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>
#endif

namespace inception_fast::cpu {

namespace {

// The compiler's own entry points, which GNU's, LLVM's and Intel's runtimes all have.
struct OpenMp {
  void (*parallel)(void (*body)(void *), void *context, unsigned threads, unsigned flags) = nullptr;
  void (*barrier)() = nullptr;
  int (*index)() = nullptr;
  int (*count)() = nullptr;

  explicit operator bool() const { return parallel && barrier && index && count; }
};

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

const OpenMp &openmp() {
  static const OpenMp runtime = [] {
    OpenMp found;
#ifdef __linux__
    if (dl_iterate_phdr(find, &found) == 0)
      found = {};
#endif
    return found;
  }();
  return runtime;
}

struct Job {
  Shared body;
  void *context;
  int core; // the caller's
};

void run_openmp(void *pointer) {
  const Job &job = *static_cast<Job *>(pointer);
  const OpenMp &runtime = openmp();
  Meeting meet{[](void *) { openmp().barrier(); }, nullptr};
  if (runtime.index() > 0 && runtime.count() <= available_cores())
    leave_core(job.core);
  job.body(job.context, Worker{runtime.index(), runtime.count(), nullptr}, meet);
}

void run_team(void *pointer, const Worker &worker, Barrier &barrier) {
  const Job &job = *static_cast<Job *>(pointer);
  Meeting meet{[](void *at) { static_cast<Barrier *>(at)->wait(); }, &barrier};
  job.body(job.context, worker, meet);
}

} // namespace

void run_shared(int threads, Shared body, void *context) {
  Job job{body, context, this_core()};
  if (threads <= 1) {
    body(context, Worker{0, 1, nullptr}, Meeting{[](void *) {}, nullptr});
  } else if (openmp()) {
    openmp().parallel(run_openmp, &job, static_cast<unsigned>(threads), 0);
  } else {
    Lease team(threads, 0);
    team->run(threads, run_team, &job);
  }
}

} // namespace inception_fast::cpu
