// Memory for the length of one call. The process keeps up to kKept of it for the next one: fresh
// pages cost more than arithmetic (docs/log.md, "Fresh outputs"), but for a call that needs more
// than that, which takes seconds.
#pragma once

#include <cstddef>
#include <cstdint>

class Workspace {
 public:
  // Plans `bytes` more, aligned to a cache line; what comes back is their offset.
  size_t plan(int64_t bytes) {
    const size_t at = total_;
    total_ += padded(bytes);
    return at;
  }
  // Takes the memory of all plans. Throws std::bad_alloc.
  void take();
  char* operator[](size_t offset) const { return memory_ + offset; }

  static constexpr size_t kKept = size_t(128) << 20;  // bytes
  static size_t padded(int64_t bytes) { return (size_t(bytes) + 63) / 64 * 64; }

  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

 private:
  size_t total_ = 0;
  char* memory_ = nullptr;
  bool kept_ = false;
};
