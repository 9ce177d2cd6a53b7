"""What the C library does with memory that is freed: by default it keeps some, for some time."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""
_LARGEST_MMAP_THRESHOLD = 1 << 25
"""Larger ones are refused by glibc."""


def keep_freed_memory() -> bool:
    """Tell glibc to hand blocks below 32 MB out again instead of giving them to the system.

    By default a tensor of more than 128 KB is mapped anew each time, and the system has to clear
    its pages before they are used. The process then keeps the most it ever needed. False where the
    C library takes no such wish.
    """
    return _tune(
        (_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_TRIM_THRESHOLD, (1 << 31) - 1),
        (_TOP_PAD, 1 << 26),
    )


def map_large_blocks() -> bool:
    """Tell glibc to map each block above 128 KB by itself, and so to give it back once it is freed.

    By default it only begins like that. Then memory tells what is held, but takes longer to get.
    """
    return _tune((_MMAP_THRESHOLD, 1 << 17))


def _tune(*wishes: tuple[int, int]) -> bool:
    try:
        tune = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(tune(parameter, value) == 1 for parameter, value in wishes)


def give_back() -> None:
    """Return to the system what lies freed in this process, once."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
