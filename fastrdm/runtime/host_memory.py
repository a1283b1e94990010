"""Memory of the host: what a step frees stays with the process, so that the next one does not ask for it again."""

import ctypes
import os
import platform

# Parameters of glibc's mallopt (malloc.h), a C int each. Free memory is kept up to the first, blocks as large as the
# third go back to the kernel one by one, and the heap grows by the second.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
KEPT = {TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 * 2**20, MMAP_THRESHOLD: 2**30}


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep freed memory for the next allocation, up to 2 GiB of it; return whether it will.

    By default malloc gives the activations of a training step back to the kernel, which clears each page that the next
    step asks for: ten thousand page faults a step of a small ResNet, a quarter of its time. Without glibc nothing is
    done, nor where the environment sets MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_ or MALLOC_MMAP_THRESHOLD_ itself.
    """
    given = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if given or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in KEPT.items()])
