"""Freed memory, kept for what is read next: asking the system for new memory takes longer than reading into it."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h


def keep_freed_memory():
    """Have this process take large blocks from memory that it freed, and return none of that before it ends.

    Otherwise glibc asks for each block anew, and the system clears it page by page: half of the processor's time of reading a
    checkpoint, a quarter of an export's. Does nothing with another C library.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    set_option(_MMAP_THRESHOLD, 1 << 30)
    set_option(_TRIM_THRESHOLD, (1 << 31) - 1)
