"""Builds gradsmith: two packages from two roots, and the native module of the kernel library.

`csrc/` becomes one shared library, `gradsmith_kernels._native`. It links to neither torch nor an
OpenMP runtime, so one wheel serves any torch version. Never `-march=native`: `<op>_kernels.cpp` is
compiled once for each level of the instruction set that its first line names, and the library
chooses when it is loaded, so a wheel built here runs on an older CPU.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11 import get_include
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Fused multiply-adds only where the source says so; sqrt is an instruction, it need not set errno.
FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-Wno-psabi"]  # vectors are passed between the functions of one file only
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 misreads its own header
AVX512BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512BF16, "-mamx-tile", "-mamx-bf16"]
LEVELS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512BF16, "amx": AMX}
X86 = platform.machine() in ("x86_64", "AMD64")


def levels_of(source: str) -> list[str]:
    """The levels that a file is compiled for; none: once, for any CPU."""
    first = Path(source).read_text(encoding="utf-8").partition("\n")[0]
    names = first.removeprefix("// levels: ").split() if first.startswith("// levels: ") else []
    if not set(names) <= LEVELS.keys():
        sys.exit(f"{source}: its first line names {names}; a level is one of {[*LEVELS]}")
    return [name for name in names if X86 or name == "portable"]


def find_compiler() -> list[str]:
    """$CXX; else the compiler that built Python, if it is here, or another one; [] if none is."""
    chosen = os.environ.get("CXX")
    built_python = sysconfig.get_config_var("CXX") or ""
    for command in [chosen] if chosen else [built_python, "g++", "c++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return []


class BuildNative(build_ext):
    """Compiles each file with its own flags, as many at a time as there are cores."""

    def build_extension(self, ext: Extension) -> None:
        command = find_compiler()
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        if not command or not header.exists():
            missing = f"{header} is not there" if command else "no compiler was found"
            sys.exit(
                f"\ngradsmith's kernels need a C++17 compiler and Python's headers: {missing}.\n"
                "On Debian or Ubuntu: apt install g++ python3-dev\n"
            )
        self.compiler.set_executables(
            compiler_so_cxx=[*command, "-fPIC"], linker_so_cxx=[*command, "-shared", "-s"]
        )

        extra = shlex.split(os.environ.get("CXXFLAGS", ""))

        def compile_one(job: tuple[str, str | None]) -> list[str]:
            source, level = job
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp, level or "any")),
                macros=[("LEVEL", level)] if level else [],
                include_dirs=ext.include_dirs,
                extra_postargs=[*FLAGS, *(LEVELS[level] if level else []), *extra],
                depends=ext.depends,
            )

        jobs = [(source, level) for source in ext.sources for level in levels_of(source) or [None]]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["dl", "pthread"],
            extra_postargs=shlex.split(os.environ.get("LDFLAGS", "")),
            target_lang="c++",
            build_temp=self.build_temp,
        )


setup(
    packages=[
        *find_packages("kernels"),
        *find_packages("trainer"),
        "gradsmith.recipes.quickstart",  # so that `gradsmith quickstart` works from a wheel
    ],
    package_dir={
        "gradsmith_kernels": "kernels/gradsmith_kernels",
        "gradsmith": "trainer/gradsmith",
        "gradsmith.recipes.quickstart": "recipes/quickstart",
    },
    package_data={
        "gradsmith_kernels": ["py.typed", "*.pyi", "ops/*/budgets.json"],
        "gradsmith": ["py.typed"],
        "gradsmith.recipes.quickstart": ["*.yaml"],
    },
    ext_modules=[
        Extension(
            "gradsmith_kernels._native",
            sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            include_dirs=["csrc", get_include()],
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
