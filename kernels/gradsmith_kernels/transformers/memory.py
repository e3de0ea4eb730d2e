"""Freed memory that stays with the process, for the next tensors."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 32 << 20  # bytes; the largest threshold that glibc takes


def keep_freed() -> bool:
    """Tells the C library to keep the memory of freed tensors, for the whole process and for good.

    glibc gives the end of its heap back to the system as soon as some megabytes of it are free, and
    gets it anew, page by page, for the next tensors: on a CPU that costs a tenth to a half of a
    training step (docs/log.md). Afterwards a process holds on to the most it has needed, as the
    allocator of a GPU does. Blocks above 32 MiB come and go as before.

    Returns:
        Whether it did. Not with another C library, nor where MALLOC_* or GLIBC_TUNABLES in the
        environment say what the user wants. An allocator that is loaded in glibc's place does not
        hear of it.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, -1))  # -1: never
