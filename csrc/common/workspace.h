// Memory for the length of one call. The process keeps it for the next one: fresh pages cost more
// than arithmetic (docs/log.md, "Fresh outputs").
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

  static size_t padded(int64_t bytes) { return (size_t(bytes) + 63) / 64 * 64; }

  // What a call needs is given back if it is more than `most` bytes.
  explicit Workspace(size_t most = SIZE_MAX) : most_(most) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

 private:
  size_t most_, total_ = 0;
  char* memory_ = nullptr;
  bool kept_ = false;
};
