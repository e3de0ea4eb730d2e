// Two OpenMP runtimes in one process are two sets of threads: while ours work, torch's still spin
// after their last loop (and the reverse), on the same cores. So this library links to no OpenMP
// runtime at all. It looks for the entry points in the runtime which is already loaded, torch's:
// GOMP_parallel is a stable ABI that libgomp defined and that LLVM's and Intel's runtimes offer as
// well. Figures: docs/log.md, "One OpenMP runtime".
#include "common/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_num)();
  int (*num_threads)();

  OpenMP() {
    // torch opens libtorch_global_deps.so, and with it its OpenMP runtime, into the global scope.
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread_num = reinterpret_cast<decltype(thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    num_threads =
        reinterpret_cast<decltype(num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  }
  bool found() const { return parallel && thread_num && num_threads; }
};

const OpenMP& openmp() {
  static const OpenMP runtime;
  return runtime;
}

struct Loop {
  int64_t items;
  void (*body)(void*, int64_t, int64_t);
  void* context;

  void run(int64_t index, int64_t count) const {
    const int64_t begin = items * index / count, end = items * (index + 1) / count;
    if (begin < end) body(context, begin, end);
  }
};

void team_member(void* data) {
  // The team may be smaller than asked for (nested regions, OMP_THREAD_LIMIT): ask the runtime.
  static_cast<const Loop*>(data)->run(openmp().thread_num(), openmp().num_threads());
}

// Below this many bytes a thread, waking it costs more than it saves.
constexpr int64_t kBytesPerThread = 64 * 1024;

}  // namespace

void parallel_for(int threads, int64_t items, int64_t bytes,
                  void (*body)(void*, int64_t, int64_t), void* context) {
  if (items <= 0) return;
  const int64_t useful = std::min<int64_t>(items, bytes / kBytesPerThread + 1);
  const int count = int(std::min<int64_t>(threads, useful));
  Loop loop{items, body, context};
  if (count <= 1) {
    loop.run(0, 1);
  } else if (openmp().found()) {
    openmp().parallel(team_member, &loop, unsigned(count), 0);
  } else {
    std::vector<std::thread> team;
    for (int i = 1; i < count; ++i) team.emplace_back([&loop, i, count] { loop.run(i, count); });
    loop.run(0, count);
    for (auto& member : team) member.join();
  }
}

const char* parallel_runtime() { return openmp().found() ? "shared OpenMP" : "std::thread"; }
