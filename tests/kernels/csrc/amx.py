"""The AMX emulator (amx_emulator.cpp): builds it and installs it in this process.

Call `install_emulator` in a subprocess made for it: what would be a fault on a CPU with AMX ends
the process. Another SIGILL handler (faulthandler's) has to be in place before, not after.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# For a process that is to import this module, and the packages that this one has.
PYTHONPATH = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))


def find_compiler() -> list[str]:
    """$CXX, else the first compiler on the path; [] if there is none."""
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else ["g++", "c++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return []


def why_not() -> str:
    """Why AMX code cannot be built and emulated on this machine; empty if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "AMX is x86-64's, and the emulator is written for Linux"
    if not {"avx2", "fma"} <= cpu_flags():
        return "the emulator needs a CPU with AVX2 and FMA"
    return "" if find_compiler() else "no C++ compiler was found"


def cpu_flags() -> set[str]:
    """What this CPU has, as Linux names it: "amx_bf16" where nothing needs to be emulated."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()


def build(source: Path, folder: Path, *flags: str) -> Path:
    """Compiles one source file into a shared library in `folder`, and returns its path."""
    library = folder / f"{source.stem}.so"
    common = ["-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra"]
    subprocess.run([*find_compiler(), *common, *flags, "-o", str(library), str(source)], check=True)
    return library


def build_emulator(folder: Path) -> Path:
    return build(HERE / "amx_emulator.cpp", folder, "-O3")


def install_emulator(library: Path | None = None) -> ctypes.CDLL:
    """Installs the emulator for all threads; `library` is one that `build_emulator` has made.

    The result's `amx_emulator_count()` is the number of instructions emulated so far.
    """
    if library is None:
        with tempfile.TemporaryDirectory() as folder:
            return install_emulator(build_emulator(Path(folder)))
    emulator = ctypes.CDLL(str(library))
    emulator.amx_emulator_count.restype = ctypes.c_long
    if emulator.amx_emulator_install() != 0:
        raise OSError("the AMX emulator could not be installed")
    return emulator
