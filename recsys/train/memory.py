"""Freed memory stays with the process, so that a training step does not ask the system for it again."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
"""Numbers of `mallopt(3)`."""

LARGEST = 2**28
"""Bytes of the largest block that is kept; larger ones go back to the system, so that what is kept stays bounded."""


def keep_freed_memory() -> bool:
    """Let the C library hand large freed blocks out again instead of unmapping them; return whether it does.

    By default glibc maps every block above 32 MiB anew and unmaps it when it is freed, and the system fills its
    pages with zeros at first touch. The gradient of a large embedding table is such a block in every step, and that
    costs more than computing it. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
