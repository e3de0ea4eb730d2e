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

// PICK_TABLE(rope): the table of the op's kernels, rope_portable, rope_avx2, ..., for the level in
// use. Elsewhere than on x86 only the portable ones are compiled.
#if defined(__x86_64__)
#define PICK_TABLE(op) pick(op##_portable, op##_avx2, op##_avx512, op##_avx512bf16)
#define PICK_TABLE_WITH_AMX(op) \
  pick(op##_portable, op##_avx2, op##_avx512, op##_avx512bf16, op##_amx)
#else
#define PICK_TABLE(op) op##_portable
#define PICK_TABLE_WITH_AMX(op) op##_portable
#endif
