"""The C library's allocator, told to keep freed memory, because a step on a CPU asks for the same memory again."""

import ctypes
import os

# Numbers of mallopt's parameters in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have this process keep freed memory for its next allocations; False where the allocator is left as it is.

    By default glibc takes every block of 32 MiB or more, such as the maps of 512 images of 32 px in 16 channels, from
    the kernel and gives it back when it is freed: each step then writes to new pages, which the kernel clears first.
    Left as it is: where the environment sets `MALLOC_...` variables, and on systems without glibc's mallopt.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    return bool(library.mallopt(_MMAP_MAX, 0)) and bool(library.mallopt(_TRIM_THRESHOLD, -1))
