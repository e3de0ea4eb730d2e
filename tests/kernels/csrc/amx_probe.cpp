// Small AMX bf16 functions that test_amx_emulator.py runs: they hold to the instructions' rules,
// but for those whose name says how they break them.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, zero_a[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};

  void tile(int t, long tile_rows, long bytes) {
    rows[t] = static_cast<uint8_t>(bytes ? tile_rows : 0);
    colsb[t] = static_cast<uint16_t>(tile_rows ? bytes : 0);
  }
};

// GCC 12's intrinsics do not tell the compiler all that they read (_tile_loadconfig: 8 of 64 bytes;
// _tile_loadd: nothing), so it may move or drop the stores before them, unless it is told here.
void finish_stores() { __asm__ volatile("" ::: "memory"); }

void configure(const Config& config) {
  finish_stores();
  _tile_loadconfig(&config);
}

}  // namespace

// Linux gives a process the tiles only on request (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). It
// fails on a CPU without AMX, where they are emulated.
extern "C" long probe_request_permission() { return syscall(SYS_arch_prctl, 0x1023, 18); }

// C [M, N] += A [M, K] B [K, N]; A and B are bf16, C is float32, strides are in bytes. B's rows are
// interleaved in pairs: [K/2, N, 2]. K is even. Blocks of 32 x 32 x 32 take all eight tiles; those
// at the edges have fewer rows, columns or pairs, and some of their tiles are not configured.
extern "C" void probe_matmul(const uint16_t* a, long stride_a, const uint16_t* b, long stride_b,
                             float* c, long stride_c, long M, long N, long K) {
  const auto at = [](const void* p, long bytes) { return (char*)p + bytes; };
  for (long m = 0; m < M; m += 32) {
    for (long n = 0; n < N; n += 32) {
      for (long k = 0; k < K; k += 32) {
        const long rows[2] = {std::min(M - m, 16L), std::clamp(M - m - 16, 0L, 16L)};
        const long cols[2] = {std::min(N - n, 16L), std::clamp(N - n - 16, 0L, 16L)};
        const long depth = std::min(K - k, 32L);
        Config config;
        for (int i = 0; i < 2; ++i) {
          for (int j = 0; j < 2; ++j) config.tile(2 * i + j, rows[i], cols[j] * 4);
          config.tile(4 + i, rows[i], depth * 2);
          config.tile(6 + i, depth / 2, cols[i] * 4);
        }
        configure(config);
        char *c0 = at(c, m * stride_c + n * 4), *c1 = c0 + 16 * stride_c;
        const char *a0 = at(a, m * stride_a + k * 2), *a1 = a0 + 16 * stride_a;
        const char* b0 = at(b, k / 2 * stride_b + n * 4);
        const bool below = rows[1], right = cols[1];
        _tile_loadd(0, c0, stride_c);
        _tile_loadd(4, a0, stride_a);
        _tile_stream_loadd(6, b0, stride_b);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stored(0, c0, stride_c);
        if (right) {
          _tile_loadd(1, c0 + 64, stride_c);
          _tile_stream_loadd(7, b0 + 64, stride_b);
          _tile_dpbf16ps(1, 4, 7);
          _tile_stored(1, c0 + 64, stride_c);
        }
        if (below) {
          _tile_loadd(2, c1, stride_c);
          _tile_loadd(5, a1, stride_a);
          _tile_dpbf16ps(2, 5, 6);
          _tile_stored(2, c1, stride_c);
        }
        if (below && right) {
          _tile_zero(3);
          _tile_loadd(3, c1 + 64, stride_c);
          _tile_dpbf16ps(3, 5, 7);
          _tile_stored(3, c1 + 64, stride_c);
        }
        _tile_release();
      }
    }
  }
}

// out: 16 x 64 bytes of a tile after TILEZERO, then the configuration before and after TILERELEASE.
extern "C" void probe_state(const char* in, char* out, int rows, int bytes) {
  Config config;
  config.tile(5, rows, bytes);
  configure(config);
  _tile_loadd(5, in, 64);
  _tile_zero(5);
  _tile_stored(5, out, 64);
  _tile_storeconfig(out + 1024);
  _tile_release();
  _tile_storeconfig(out + 1088);
}

// All 16 x 64 tiles, for the addressing forms.
extern "C" void probe_configure() {
  Config config;
  for (int t = 0; t < 8; ++t) config.tile(t, 16, 64);
  configure(config);
}

extern "C" void probe_dot_products(long count) {
  for (long i = 0; i < count; ++i) _tile_dpbf16ps(0, 1, 2);
}

extern "C" void break_unconfigured() { _tile_zero(0); }

extern "C" void break_tile_left_out() {
  Config config;
  config.tile(0, 16, 64);
  configure(config);
  _tile_zero(1);
}

extern "C" void break_shapes() {
  Config config;
  config.tile(0, 16, 64);
  config.tile(1, 16, 64);
  config.tile(2, 15, 64);
  configure(config);
  _tile_dpbf16ps(0, 1, 2);
}

extern "C" void break_config() {
  Config config;
  config.tile(0, 17, 64);
  configure(config);
}

extern "C" void break_after_release() {
  probe_configure();
  _tile_release();
  _tile_dpbf16ps(0, 1, 2);
}

extern "C" void break_cpu() { __builtin_trap(); }  // ud2: illegal on every CPU
