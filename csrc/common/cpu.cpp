#include "common/cpu.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace {

#if defined(__x86_64__)
// AMX's tiles with bfloat16. Bits 17 and 18 of XCR0 are the tiles' configuration and data; and a
// process must ask Linux for the 8 kB of them before it touches one.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1;
  uint32_t xcr0, high;
  __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  if (!bf16 || !tile || (xcr0 & 0x60000) != 0x60000) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::kPortable;
  const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !avx || !fma || !f16c) return Isa::kPortable;
  // A CPU flag is not enough: the operating system must save the wide registers when it switches
  // tasks. XCR0 says which: bits 1-2 are xmm and ymm, bits 5-7 the mask registers and zmm.
  uint32_t xcr0, high;
  __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  if ((xcr0 & 0x06) != 0x06) return Isa::kPortable;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return Isa::kPortable;
  const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
  if (!f || !dq || !bw || !vl || (xcr0 & 0xe6) != 0xe6) return Isa::kAvx2;
  const bool bf16 = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  if (!bf16) return Isa::kAvx512;
  return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
#else
  return Isa::kPortable;
#endif
}

// The level that GRADSMITH_ISA names; the highest where it names none.
Isa held_isa() {
  const char* const name = std::getenv("GRADSMITH_ISA");
  for (int level = 0; name && level <= int(Isa::kAmx); ++level)
    if (!std::strcmp(name, kIsaNames[level])) return Isa(level);
  return Isa::kAmx;
}

std::atomic<Isa> current{best_isa()};

}  // namespace

Isa best_isa() {
  static const Isa isa = [] {
    const Isa found = detect(), held = held_isa();
    return held < found ? held : found;
  }();
  return isa;
}

Isa current_isa() { return current.load(std::memory_order_relaxed); }

void set_current_isa(Isa isa) { current.store(isa, std::memory_order_relaxed); }
