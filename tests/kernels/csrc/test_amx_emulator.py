"""The AMX emulator: its decoder, its arithmetic, its refusals, and what it must leave alone.

Every check runs in a process of its own, with the handler installed there: a fault ends it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import amx
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(bool(amx.why_not()), reason=amx.why_not() or "runs")
HAS_AMX = not amx.why_not() and "amx_bf16" in amx.cpu_flags()

REGISTERS = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"]
REGISTERS += [f"r{n}" for n in range(8, 16)]
DISPLACEMENTS = (0, 8, -72, 4096, -4352)  # in 0 or 8 bits, twice in 8, twice in 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("amx")
    amx.build_emulator(folder)
    amx.build(amx.HERE / "amx_probe.cpp", folder, "-O2", "-mamx-tile", "-mamx-bf16")
    return folder


def run_here(folder: Path, code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new process, with the emulator installed and the probe loaded."""
    start = "import sys, test_amx_emulator as test; probe = test.start(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": amx.PYTHONPATH}
    environment.pop("PYTHONFAULTHANDLER", None)
    command = [sys.executable, *flags, "-c", f"{start}; {code}", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def start(folder: str) -> ctypes.CDLL:
    amx.install_emulator(Path(folder, "amx_emulator.so"))
    probe = ctypes.CDLL(str(Path(folder, "amx_probe.so")))
    probe.probe_request_permission()
    return probe


def test_matrix_products_in_two_threads(folder: Path) -> None:
    result = run_here(folder, "test.check_products(probe, sys.argv[1])")
    assert result.returncode == 0, result.stderr


def test_every_addressing_form(folder: Path) -> None:
    source = folder / "forms.s"
    source.write_text(forms_assembly())
    subprocess.run(
        [*amx.find_compiler(), "-shared", "-o", str(folder / "forms.so"), str(source)], check=True
    )
    result = run_here(folder, "test.check_forms(probe, sys.argv[1])")
    assert result.returncode == 0, result.stderr


def test_arithmetic_and_state(folder: Path) -> None:
    result = run_here(folder, "test.check_arithmetic(probe); test.check_state(probe)")
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(HAS_AMX, reason="the CPU has AMX and faults by itself")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("break_unconfigured", "TILEZERO at .*: no tiles are configured"),
        ("break_after_release", "TDPBF16PS at .*: no tiles are configured"),
        ("break_tile_left_out", "TILEZERO at .*: tmm1 is not configured"),
        ("break_shapes", r"TDPBF16PS at .*: .*tmm2 \(15 x 64\): shapes do not match"),
        ("break_config", "LDTILECFG at .*: tmm0 has 17 rows of 64 bytes"),
    ],
)
def test_what_the_cpu_would_refuse_ends_the_process(
    folder: Path, function: str, message: str
) -> None:
    result = run_here(folder, f"probe.{function}()")
    assert result.returncode == -signal.SIGABRT
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize("faulthandler", [False, True])
def test_other_illegal_instructions_stay_illegal(folder: Path, faulthandler: bool) -> None:
    """With faulthandler installed first, as pytest does, it still reports them."""
    flags = ["-X", "faulthandler"] if faulthandler else []
    result = run_here(folder, "test.check_arithmetic(probe); probe.break_cpu()", *flags)
    assert result.returncode == -signal.SIGILL
    assert ("Fatal Python error: Illegal instruction" in result.stderr) == faulthandler


# ------------------------------------------------------------- what runs in the new process


def as_bf16(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x cut to bfloat16, as bits and as float64."""
    bits = x.astype(np.float32).view(np.uint32) >> 16
    return bits.astype(np.uint16), (bits << 16).view(np.float32).astype(np.float64)


def product(probe: ctypes.CDLL, a: np.ndarray, b: np.ndarray, c: np.ndarray, pad: int) -> None:
    """c += a b by the probe, on copies whose rows are `pad` elements apart; NaN fills the gaps."""
    (M, K), N = a.shape, b.shape[1]
    rows_a = np.full((M, K + 2 * pad), 0x7FC0, np.uint16)
    rows_a[:, :K] = a
    pairs = np.full((K // 2, N + pad, 2), 0x7FC0, np.uint16)
    pairs[:, :N] = b.reshape(K // 2, 2, N).transpose(0, 2, 1)
    rows_c = np.full((M, N + pad), np.nan, np.float32)
    rows_c[:, :N] = c
    arguments = []
    for rows in (rows_a, pairs, rows_c):
        arguments += [ctypes.c_void_p(rows.ctypes.data), ctypes.c_long(rows.strides[0])]
    probe.probe_matmul(*arguments, *(ctypes.c_long(size) for size in (M, N, K)))
    assert np.isnan(rows_c[:, N:]).all()
    c[:] = rows_c[:, :N]


def check_product(probe: ctypes.CDLL, M: int, N: int, K: int, pad: int) -> None:
    generator = np.random.default_rng(M * N * K)
    a_bits, a = as_bf16(generator.standard_normal((M, K)))
    b_bits, b = as_bf16(generator.standard_normal((K, N)))
    before = generator.standard_normal((M, N)).astype(np.float32)
    c = before.copy()
    product(probe, a_bits, b_bits, c, pad)
    expected = before + a @ b
    # Higham's bound for sums in float32: each term passes through at most K / 2 + 2 additions, and
    # one more for every block of 32.
    bound = (K / 2 + K / 32 + 3) * 2**-24 * (np.abs(before) + np.abs(a) @ np.abs(b))
    assert (np.abs(c - expected) <= bound).all()


def check_products(probe: ctypes.CDLL, folder: str) -> None:
    emulator = amx.install_emulator(Path(folder, "amx_emulator.so"))  # a second time: no change
    shapes = [(16, 16, 32), (32, 32, 64), (1, 1, 2), (13, 7, 10), (50, 70, 90), (33, 17, 34)]
    sizes = [(*shape, pad) for shape in shapes for pad in (0, 3)]
    with ThreadPoolExecutor(2) as pool:  # each thread at its own place in the list
        orders = (sizes * 4, list(reversed(sizes)) * 4)
        for done in [pool.submit(check_all, probe, order) for order in orders]:
            done.result()
    assert HAS_AMX or emulator.amx_emulator_count() > 1000


def check_all(probe: ctypes.CDLL, sizes: list[tuple[int, int, int, int]]) -> None:
    for size in sizes:
        check_product(probe, *size)


def check_arithmetic(probe: ctypes.CDLL) -> None:
    """Order, rounding and denormals, where other choices would give other bits."""
    big, tiny = 2.0**24, 2.0**-64
    for a, b, c, expected in [
        # Even and odd products are summed apart: in one sum each 1 would be lost to 2^24.
        ([big, 1, 0, 1], [1, 1, 1, 1], 0, big + 2),
        # The even sum rounds: 2^24 + 1 is a tie, and 2^24 is even; 2^24 + 3 goes up to 2^24 + 4.
        ([big, 0, 1, 0], [1, 1, 1, 1], 0, big),
        ([big, 0, 3, 0], [1, 1, 1, 1], 0, big + 4),
        # C comes last, after the two sums: C + (1 + 1), not (C + 1) + 1.
        ([1, 1], [1, 1], big, big + 2),
        # A product that is denormal becomes zero, even before something is added to it.
        ([tiny, 0, tiny, 0], [tiny, 0, tiny, 0], 0, 0),
        ([tiny, 0], [tiny, 0], 2.0**-126, 2.0**-126),
        # A denormal factor counts as zero, and so does a denormal in C.
        ([2.0**-130, 0], [2.0**100, 0], 0, 0),
        ([0, 0], [0, 0], 2.0**-130, 0),
        # A denormal result is zero: 2^-126 - 1.5 2^-126.
        ([1.5 * 2.0**-63, 0], [-(2.0**-63), 0], 2.0**-126, 0),
        ([np.inf, 1], [1, 1], 1, np.inf),
    ]:
        result = np.array([[c]], np.float32)
        a_bits, b_bits = as_bf16(np.array([a]))[0], as_bf16(np.array([b]).T)[0]
        product(probe, a_bits, b_bits, result, 1)
        assert result[0, 0] == np.float32(expected), (a, b, c, result, expected)


def check_state(probe: ctypes.CDLL) -> None:
    ones, out = np.ones((16, 64), np.uint8), np.full(1024 + 128, 7, np.uint8)
    rows, size = 5, 12
    addresses = (ctypes.c_void_p(array.ctypes.data) for array in (ones, out))
    probe.probe_state(*addresses, rows, size)
    tile = out[:1024].reshape(16, 64)
    assert (tile[:rows, :size] == 0).all()
    assert (tile[rows:] == 7).all()
    assert (tile[:, size:] == 7).all()
    config = np.zeros(64, np.uint8)
    config[[0, 16 + 2 * 5, 48 + 5]] = 1, size, rows
    assert (out[1024:1088] == config).all()
    assert (out[1088:] == 0).all()


def forms() -> list[tuple[str, str, int, int]]:
    """(base, index, scale, displacement): every base with every index; "" is no register."""
    scales, displacements = itertools.cycle((1, 2, 4, 8)), itertools.cycle(DISPLACEMENTS)
    pairs = itertools.product(["", *REGISTERS], ["", *REGISTERS])
    return [
        (base, index, next(scales), next(displacements))
        for base, index in pairs
        if index not in ("rsp", base)
    ]


def forms_assembly() -> str:
    """form_N(base, index, out): TILELOADD by form N; stores the tile to out, 64 bytes a row.

    config_N(base, index): LDTILECFG by form N. Both take the values of form N's registers.
    """
    saved = ["rbx", "rbp", "r12", "r13", "r14", "r15"]
    text = [".text"]

    def function(name: str, before: list[str], after: list[str]) -> None:
        text.extend([f".globl {name}", f"{name}:", *before, *after, "ret"])

    for n, (base, index, scale, displacement) in enumerate(forms()):
        inner = (f"%{base}" if base else "") + (f",%{index},{scale}" if index else "")
        address = f"{displacement or ''}({inner})"
        # The arguments wait in vector registers, so that no two moves get into each other's way.
        before = [f"push %{r}" for r in saved]
        before += ["movq %rdi, %xmm0", "movq %rsi, %xmm1", "movq %rdx, %xmm2", "movq %rsp, %xmm3"]
        before += [f"movq %xmm1, %{index}"] if index else []
        before += [f"movq %xmm0, %{base}"] if base else []
        after = [f"pop %{r}" for r in reversed(saved)]
        restore = "movq %xmm3, %rsp"
        function(f"config_{n}", [*before, f"ldtilecfg {address}", restore], after)
        if base:
            store = ["movq %xmm2, %rdx", "mov $64, %eax", "tilestored %tmm3, (%rdx,%rax)"]
            function(f"form_{n}", [*before, f"tileloadd {address}, %tmm3", restore, *store], after)
    function("config_rip", ["ldtilecfg config(%rip)"], [])
    function("store_config", ["sttilecfg 8(%rdi)"], [])
    text += [".data", ".zero 64", "config: .byte 1", ".zero 15", ".fill 8, 2, 64", ".zero 16"]
    text += [".fill 8, 1, 16", ".zero 8", '.section .note.GNU-stack,"",@progbits', ""]
    return "\n".join(text)


def check_forms(probe: ctypes.CDLL, folder: str) -> None:
    library = ctypes.CDLL(str(Path(folder, "forms.so")))
    # Room on both sides: where rsp is the base, the handler's stack is in there too.
    original = np.random.default_rng(0).integers(0, 256, 1 << 18, np.uint8)
    memory, out = original.copy(), np.zeros((16, 64), np.uint8)
    middle = 1 << 17
    all_tiles = np.zeros(64, np.uint8)
    all_tiles[[0, *range(16, 32, 2)]] = [1] + [64] * 8
    all_tiles[48:56] = range(16, 8, -1)
    loads = 0
    for n, (base, index, scale, displacement) in enumerate(forms()):
        on_stack = base == "rsp"
        if on_stack and displacement < 0:
            continue  # the frame of the signal would lie on the operand
        form = base, index, scale, displacement

        # The configuration lies at the address, among zeros that would be another configuration.
        memory[:], config = 0, np.zeros(72, np.uint8)
        memory[middle : middle + 64] = all_tiles
        address = memory.ctypes.data + middle - displacement
        second = 24 if base else address // scale  # exact: all addresses are multiples of 8
        first = address - (second * scale if index else 0)
        getattr(library, f"config_{n}")(ctypes.c_long(first), ctypes.c_long(second))
        library.store_config(ctypes.c_void_p(config.ctypes.data))
        assert (config[8:] == all_tiles).all(), form

        if base:
            probe.probe_configure()
            memory[:] = original
            stride = 72 if on_stack or n % 2 else -80
            rows = middle + displacement + np.arange(16) * (stride * scale if index else 0)
            values = (memory.ctypes.data + middle, stride, out.ctypes.data)
            getattr(library, f"form_{n}")(*map(ctypes.c_long, values))
            assert (out == original[rows[:, None] + np.arange(64)]).all(), form
            loads += 1
    assert loads > 200
    library.config_rip()
    library.store_config(ctypes.c_void_p(config.ctypes.data))
    assert (config[8 + 48 : 8 + 56] == 16).all()
