// Which instruction sets this CPU and operating system have, and which one the kernels use.
#pragma once

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

// The best level that this machine runs.
Isa best_isa();

// The level in use: the best one, unless a test has set a lower one.
Isa current_isa();
void set_current_isa(Isa isa);

// The kernel table of the level in use. Every op has one table per level, in this order.
template <class Table>
const Table& pick(const Table& portable, const Table& avx2, const Table& avx512,
                  const Table& avx512bf16) {
  switch (current_isa()) {
    case Isa::kAvx512Bf16:
      return avx512bf16;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    default:
      return portable;
  }
}
