// Which instruction sets this CPU and operating system have, and which one the kernels use.
#pragma once

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

// The best level that this machine runs, and GRADSMITH_ISA allows: with it set to a lower level the
// library behaves as on a machine that has no more.
Isa best_isa();

// The level in use: the best one, unless a test has set a lower one.
Isa current_isa();
void set_current_isa(Isa isa);

// The kernel table of the level in use. Every op has one table per level, in this order; without
// one for AMX the level before it serves.
template <class Table>
const Table& pick(const Table& portable, const Table& avx2, const Table& avx512,
                  const Table& avx512bf16, const Table& amx) {
  switch (current_isa()) {
    case Isa::kAmx:
      return amx;
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

template <class Table>
const Table& pick(const Table& portable, const Table& avx2, const Table& avx512,
                  const Table& avx512bf16) {
  return pick(portable, avx2, avx512, avx512bf16, avx512bf16);
}
