"""Memory that a training step frees, kept for the next step, and in huge pages where the system has them.

glibc gives a freed block of more than 32 MiB back to the system at once, and the end of its heap soon after. A training
step frees and asks for the same large maps again and again, and each time the system hands out zeroed pages one by one.
Small pages lie wherever the system finds them, and lines of one map may push each other out of the caches, in one
process more than in the next: in huge pages native layers take 3 to 6 % less of a step (CONTRIBUTING.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

# glibc's malloc.h: which parameter, and the value it gets. A trim threshold of -1 switches trimming off.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 1 << 30
MADV_HUGEPAGE = 14  # of Linux
ADVISED = LARGEST_KEPT - (1 << 20)  # bytes in huge pages: in one block that still comes from the heap
HUGE_PAGE = 2 << 20


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep what this process frees, up to 1 GiB a block, for its next allocation.

    Call it once, before the first step of a training loop; `inception-fast train` and `compare` do. It holds for the
    whole process, native memory of every library included, and cannot be undone: the process keeps its largest size
    until it ends. Nothing else calls it, importing the package least of all. The heap's next GiB is to be of huge pages
    on a Linux that gives them on request; it takes no memory before it is used.

    Returns whether the allocator took it. False on systems without glibc (musl, macOS, Windows), where nothing is
    changed, and on a glibc that refuses blocks of that size.

    >>> keep_freed_memory() == uses_glibc()
    True
    """
    if not uses_glibc():
        return False
    library: Any = ctypes.CDLL(None)
    mallopt = library.mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # The first may be refused, and then the second would only half do what is promised.
    if not (mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, -1)):
        return False
    if sys.platform == "linux":
        _advise(library)
    return True


def _advise(library: Any) -> None:
    """Asks for huge pages in what the heap grows by: a block at its end, which stays there when it is freed. A system
    that has none, or will not promise so much memory, leaves small ones.
    """
    library.malloc.argtypes, library.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    library.free.argtypes, library.free.restype = (ctypes.c_void_p,), None
    library.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    block = library.malloc(ADVISED)
    if block is None:
        return
    start, end = (-(-block // HUGE_PAGE) * HUGE_PAGE, (block + ADVISED) // HUGE_PAGE * HUGE_PAGE)
    library.madvise(start, end - start, MADV_HUGEPAGE)
    library.free(block)


def uses_glibc() -> bool:
    """Whether this process runs on the GNU C library."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError):  # no confstr, or none that knows the name
        return False
