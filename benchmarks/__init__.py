"""Benchmarks: `make bench` on a CPU, `make gpu` on a GPU; see README.md, "Benchmarks".

`GRADSMITH_ISA=avx2 make bench` measures as on a machine that has no more: torch and the libraries
under it are held down to the same level, or the peers would be another machine's.
"""

import os

# Our level -> ATen's, oneDNN's and MKL's names for it. All read theirs once, when torch is loaded.
HELD = {
    "portable": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
}
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")

os.environ |= dict(zip(VARIABLES, HELD.get(os.environ.get("GRADSMITH_ISA", ""), ()), strict=False))
