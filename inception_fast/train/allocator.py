"""Memory that a training step frees, kept for the next step.

glibc gives a freed block of more than 32 MiB back to the system at once, and the end of its heap soon after. A training
step frees and asks for the same large maps again and again, and each time the system hands out zeroed pages one by one.
"""

from __future__ import annotations

import ctypes
import os

# glibc's malloc.h: which parameter, and the value it gets. A trim threshold of -1 switches trimming off.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep what this process frees, up to 1 GiB a block, for its next allocation.

    Call it once, before the first step of a training loop; `inception-fast train` and `compare` do. It holds for the
    whole process, native memory of every library included, and cannot be undone: the process keeps its largest size
    until it ends. Nothing else calls it, importing the package least of all.

    Returns whether the allocator took it. False on systems without glibc (musl, macOS, Windows), where nothing is
    changed, and on a glibc that refuses blocks of that size.

    >>> keep_freed_memory() == uses_glibc()
    True
    """
    if not uses_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # The first may be refused, and then the second would only half do what is promised.
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def uses_glibc() -> bool:
    """Whether this process runs on the GNU C library."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError):  # no confstr, or none that knows the name
        return False
