// A parallel loop on the threads that torch already has.
#pragma once

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

// "shared OpenMP" or "std::thread", for `doctor`.
const char* parallel_runtime();
