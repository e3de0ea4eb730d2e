#include "common/workspace.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>

namespace {

constexpr size_t kPage = size_t(1) << 21;  // huge pages, where the system has them

char* allocate(size_t bytes) {
  void* const memory = std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return static_cast<char*>(memory);
}

// The memory that is kept. Two calls at a time are rare: the second allocates its own.
std::mutex in_use;
char* kept = nullptr;
size_t kept_bytes = 0;

void release() {
  std::free(kept);
  kept = nullptr;
  kept_bytes = 0;
}

}  // namespace

void Workspace::take() {
  kept_ = in_use.try_lock();
  if (!kept_) {
    memory_ = allocate(total_);
    return;
  }
  if (kept_bytes < total_) {
    release();
    try {
      kept = allocate(total_);
    } catch (...) {
      in_use.unlock();
      kept_ = false;
      throw;
    }
    kept_bytes = total_;
  }
  memory_ = kept;
}

Workspace::~Workspace() {
  if (!kept_) {
    std::free(memory_);
    return;
  }
  if (total_ > most_) release();
  in_use.unlock();
}
