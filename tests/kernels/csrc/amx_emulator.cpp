// Runs the AMX bf16 instructions on an x86-64 CPU that lacks them, so that the machine code of the
// AMX kernels is tested there too. Such a CPU traps each of them as SIGILL; the handler decodes the
// instruction at RIP, does its work on tiles of its own, and goes on behind it. On a CPU with AMX
// no instruction traps, and the handler never runs.
//
// Decoding and semantics follow Intel's Software Developer's Manual, volume 2: the Operation
// sections of LDTILECFG, STTILECFG, TILELOADD[T1], TILESTORED, TILEZERO, TILERELEASE and TDPBF16PS,
// and the exception classes AMX-E1 to AMX-E6 (section 2.10). What the manual makes a fault stops
// the process here with the reason on stderr: a kernel that is wrong must not look as if it worked.
// Left out: prefixes before VEX (segments, 32-bit addresses), which no compiler emits here; such
// an instruction stays an illegal one.

#include <immintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {  // the 64 bytes that LDTILECFG reads
  uint8_t palette, start_row, zero_a[14];
  uint16_t colsb[kTiles];
  uint8_t zero_b[16];
  uint8_t rows[kTiles], zero_c[8];
};
static_assert(sizeof(Config) == 64);

struct Tiles {
  Config config;
  // Bytes beyond a tile's configured shape are always zero, as on the CPU.
  alignas(64) uint8_t data[kTiles][kRows][kRowBytes];
};

// The calling thread's tiles; null: not configured. Initial-exec, because the first access of the
// default model may call malloc, which a signal handler must not; and only a pointer, because a
// library loaded at run time gets a few hundred bytes of such storage, not 8 KiB.
[[gnu::tls_model("initial-exec")]] thread_local Tiles* tiles = nullptr;

std::atomic<long> emulated{0};
struct sigaction previous;

enum class Op {
  None, Ldtilecfg, Sttilecfg, Tilerelease, Tilezero, Tileload, Tilestored, Tdpbf16ps
};

struct Instruction {
  Op op = Op::None;
  const char* name = "";
  const uint8_t* address = nullptr;
  int reg = 0, rm = 0, vvvv = 0;  // operands: ModRM.reg, ModRM.rm, VEX.vvvv
  uint8_t* base = nullptr;        // base register + displacement
  int64_t index = 0;              // index register << scale: the stride of a tile's rows
  int length = 0;                 // of the whole instruction, in bytes
};

[[noreturn, gnu::format(printf, 2, 3)]] void fail(const Instruction& in, const char* format, ...) {
  char text[512];
  int n = snprintf(text, sizeof text, "amx_emulator: %s at %p: ", in.name, (const void*)in.address);
  va_list arguments;
  va_start(arguments, format);
  n += vsnprintf(text + n, sizeof text - n, format, arguments);
  va_end(arguments);
  text[n++] = '\n';
  if (write(STDERR_FILENO, text, n) != n) _exit(134);
  abort();
}

int64_t gpr(const ucontext_t& context, int number) {
  // ModRM and SIB number the registers otherwise than the kernel's array does.
  static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                     REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                     REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[kOrder[number]];
}

// Reads a memory operand that starts at its ModRM byte; returns the end of the instruction.
const uint8_t* decode_memory(const uint8_t* p, bool x, bool b, const ucontext_t& context,
                             Instruction& in) {
  const int mod = *p >> 6, rm = *p & 7;
  ++p;
  int base = rm | b << 3;
  bool has_base = true, rip_relative = false;
  if (rm == 4) {  // a SIB byte follows
    const int index = (*p >> 3 & 7) | x << 3;
    if (index != 4) {  // 4 is rsp's number and means no index; r12, which is 12, is one
      in.index = static_cast<int64_t>(static_cast<uint64_t>(gpr(context, index)) << (*p >> 6));
    }
    base = (*p & 7) | b << 3;
    has_base = mod != 0 || (*p & 7) != 5;
    ++p;
  } else if (mod == 0 && rm == 5) {
    has_base = false;
    rip_relative = true;
  }
  int64_t address = has_base ? gpr(context, base) : 0;
  if (mod == 1) {
    address += static_cast<int8_t>(*p++);
  } else if (mod == 2 || !has_base) {
    int32_t displacement;
    memcpy(&displacement, p, sizeof displacement);
    p += sizeof displacement;
    address += displacement;
  }
  if (rip_relative) address += reinterpret_cast<int64_t>(p);  // from the next instruction
  in.base = reinterpret_cast<uint8_t*>(address);
  return p;
}

Instruction decode(const ucontext_t& context) {
  Instruction in;
  in.address = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
  const uint8_t* p = in.address;
  // Byte by byte: what lies behind the end of another instruction may not be readable.
  if (p[0] != 0xC4 || (p[1] & 0x1F) != 2) return in;  // VEX in three bytes, map 0F38
  const bool r = !(p[1] & 0x80), x = !(p[1] & 0x40), b = !(p[1] & 0x20);
  in.vvvv = ~(p[2] >> 3) & 15;
  const int prefix = p[2] & 3;
  enum { NP, P66, F3, F2 };
  const int opcode = p[3], mod = p[4] >> 6;
  in.reg = (p[4] >> 3 & 7) | r << 3;
  in.rm = (p[4] & 7) | b << 3;
  if (p[2] & 0x84) return in;  // W = 0 and L = 0 in all of them
  if (opcode != 0x5C && in.vvvv != 0) return in;

  const auto found = [&in](Op op, const char* name) { in.op = op, in.name = name; };
  if (opcode == 0x49 && mod == 3) {
    if (prefix == NP && in.reg == 0 && in.rm == 0) found(Op::Tilerelease, "TILERELEASE");
    if (prefix == F2 && in.reg < kTiles && in.rm == 0) found(Op::Tilezero, "TILEZERO");
  } else if (opcode == 0x49 && in.reg == 0) {
    if (prefix == NP) found(Op::Ldtilecfg, "LDTILECFG");
    if (prefix == P66) found(Op::Sttilecfg, "STTILECFG");
  } else if (opcode == 0x4B && mod != 3 && (p[4] & 7) == 4 && in.reg < kTiles) {
    if (prefix == F2) found(Op::Tileload, "TILELOADD");
    if (prefix == P66) found(Op::Tileload, "TILELOADDT1");
    if (prefix == F3) found(Op::Tilestored, "TILESTORED");
  } else if (opcode == 0x5C && mod == 3 && in.reg < kTiles && in.rm < kTiles && in.vvvv < kTiles) {
    if (prefix == F3) found(Op::Tdpbf16ps, "TDPBF16PS");
  }
  if (in.op != Op::None) {
    const uint8_t* end = mod == 3 ? p + 5 : decode_memory(p + 4, x, b, context, in);
    in.length = static_cast<int>(end - p);
  }
  return in;
}

void release() {
  if (tiles) munmap(tiles, sizeof *tiles);
  tiles = nullptr;
}

void load_config(const Instruction& in) {
  Config config;
  memcpy(&config, in.base + in.index, sizeof config);
  if (config.palette == 0) return release();
  if (config.palette != 1) fail(in, "palette is %d; 0 and 1 exist", config.palette);
  // A restart after a page fault may set it; a kernel that does has filled in the wrong byte.
  if (config.start_row != 0) fail(in, "start_row is %d, not 0", config.start_row);
  const auto* bytes = reinterpret_cast<const uint8_t*>(&config);
  for (int i = 2; i < 64; ++i) {
    const bool reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
    if (reserved && bytes[i]) fail(in, "reserved byte %d is %d, not 0", i, bytes[i]);
  }
  for (int t = 0; t < kTiles; ++t) {
    const int rows = config.rows[t], colsb = config.colsb[t];
    if (rows > kRows || colsb > kRowBytes || (rows == 0) != (colsb == 0)) {
      fail(in, "tmm%d has %d rows of %d bytes; at most 16 of 64, or none of 0", t, rows, colsb);
    }
  }
  release();
  // Not malloc, see above. Fresh pages are zero, as the tiles are now to be.
  void* memory = mmap(nullptr, sizeof(Tiles), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                      -1, 0);
  if (memory == MAP_FAILED) fail(in, "no memory for the tiles");
  tiles = static_cast<Tiles*>(memory);
  tiles->config = config;
}

void check_tile(const Instruction& in, int t) {
  if (!tiles) fail(in, "no tiles are configured in this thread");
  if (tiles->config.rows[t] == 0) fail(in, "tmm%d is not configured", t);
  if (tiles->config.colsb[t] % 4) {
    fail(in, "tmm%d has rows of %d bytes, no multiple of 4", t, tiles->config.colsb[t]);
  }
}

// C[m][n] += sum over k of A[m][2k] B[k][2n] + A[m][2k+1] B[k][2n+1], in the manual's order: the
// even and the odd products are summed apart, each by fused multiply-adds in float32; then the two
// sums are added, then their sum to C. Denormals count as zero, in and out; rounds to nearest even.
[[gnu::target("avx2,fma"), gnu::noinline]] void dot_product(int c, int a, int b) {
  const int rows = tiles->config.rows[c], cols = tiles->config.colsb[c] / 4;
  const int pairs = tiles->config.colsb[a] / 4;
  const auto as_float = [](uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (int m = 0; m < rows; ++m) {
    uint32_t a_row[16], b_row[16];
    float c_row[16], even[16] = {}, odd[16] = {};
    memcpy(a_row, tiles->data[a][m], sizeof a_row);
    memcpy(c_row, tiles->data[c][m], sizeof c_row);
    for (int k = 0; k < pairs; ++k) {
      memcpy(b_row, tiles->data[b][k], sizeof b_row);
      const float a_even = as_float(a_row[k] << 16), a_odd = as_float(a_row[k] & 0xFFFF0000u);
      for (int n = 0; n < 16; ++n) {  // all 16, so that the compiler makes vectors of it
        even[n] = std::fma(a_even, as_float(b_row[n] << 16), even[n]);
        odd[n] = std::fma(a_odd, as_float(b_row[n] & 0xFFFF0000u), odd[n]);
      }
    }
    for (int n = 0; n < cols; ++n) c_row[n] += even[n] + odd[n];
    memcpy(tiles->data[c][m], c_row, sizeof c_row);
  }
}

void multiply(const Instruction& in) {
  const int c = in.reg, a = in.rm, b = in.vvvv;
  for (int t : {c, a, b}) check_tile(in, t);
  if (c == a || c == b || a == b) fail(in, "tmm%d, tmm%d, tmm%d are not three tiles", c, a, b);
  const Config& config = tiles->config;
  if (config.rows[c] != config.rows[a] || config.colsb[c] != config.colsb[b] ||
      config.colsb[a] / 4 != config.rows[b]) {
    fail(in, "tmm%d (%d x %d bytes) += tmm%d (%d x %d) tmm%d (%d x %d): shapes do not match", c,
         config.rows[c], config.colsb[c], a, config.rows[a], config.colsb[a], b, config.rows[b],
         config.colsb[b]);
  }
  // The instruction neither consults nor changes MXCSR: flush denormals, mask every exception.
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9FC0);
  dot_product(c, a, b);
  _mm_setcsr(before);
}

void run(const Instruction& in) {
  switch (in.op) {
    case Op::Ldtilecfg:
      return load_config(in);
    case Op::Sttilecfg: {
      const Config config = tiles ? tiles->config : Config{};
      memcpy(in.base + in.index, &config, sizeof config);
      return;
    }
    case Op::Tilerelease:
      return release();
    case Op::Tilezero:
      check_tile(in, in.reg);
      memset(tiles->data[in.reg], 0, sizeof tiles->data[in.reg]);
      return;
    case Op::Tileload:
    case Op::Tilestored:
      check_tile(in, in.reg);
      // A bad address faults in here: SIGSEGV, as it would without the emulator.
      for (int m = 0; m < tiles->config.rows[in.reg]; ++m) {
        uint8_t *row = tiles->data[in.reg][m], *memory = in.base + m * in.index;
        const size_t size = tiles->config.colsb[in.reg];
        if (in.op == Op::Tileload) {
          memcpy(row, memory, size);  // the bytes behind it are zero since LDTILECFG
        } else {
          memcpy(memory, row, size);
        }
      }
      return;
    case Op::Tdpbf16ps:
      return multiply(in);
    case Op::None:
      return;
  }
}

void handle(int signal, siginfo_t* info, void* raw) {
  auto& context = *static_cast<ucontext_t*>(raw);
  const bool trapped = info->si_code > 0;  // else somebody sent it: RIP is where it happened to be
  const Instruction in = trapped ? decode(context) : Instruction{};
  if (in.op != Op::None) {
    run(in);
    context.uc_mcontext.gregs[REG_RIP] += in.length;
    emulated.fetch_add(1, std::memory_order_relaxed);
  } else if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(signal, info, raw);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else {
    // Blocked while this handler runs; the kernel's own action takes it right after.
    sigaction(signal, &previous, nullptr);
    raise(signal);
  }
}

}  // namespace

// Installs the handler for the whole process, once; what is no AMX instruction goes to the handler
// that was there before. 0 on success, -1 if the CPU cannot run the emulator or sigaction failed.
extern "C" int amx_emulator_install() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return -1;
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  static const int result = sigaction(SIGILL, &action, &previous);
  return result;
}

// The number of instructions emulated so far, in all threads.
extern "C" long amx_emulator_count() { return emulated.load(std::memory_order_relaxed); }
