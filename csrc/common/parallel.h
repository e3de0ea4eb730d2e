// A parallel loop on the threads that torch already has.
#pragma once

#include <atomic>
#include <cstdint>

// Calls body(context, begin, end) on disjoint ranges that cover [0, items), on at most `threads`
// threads. `bytes` is the memory the whole loop touches: small work stays on the calling thread.
void parallel_for(int threads, int64_t items, int64_t bytes,
                  void (*body)(void* context, int64_t begin, int64_t end), void* context);

// The same for a callable.
template <class F>
void parallel_for(int threads, int64_t items, int64_t bytes, F&& f) {
  parallel_for(
      threads, items, bytes,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); },
      &f);
}

// Calls f(task, thread) for every task in [0, tasks), each on the next thread that is free; `thread`
// < threads tells apart what runs at the same time. For tasks of unequal length.
template <class F>
void parallel_tasks(int threads, int64_t tasks, F&& f) {
  std::atomic<int64_t> next{0};
  parallel_for(threads, threads, INT64_MAX, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) f(task, int(thread));
  });
}

// "shared OpenMP" or "std::thread", for `doctor`.
const char* parallel_runtime();
