"""give_back(): memory that was freed returns to the system.

glibc's allocator keeps freed blocks below 32 MB for later. What is next asked for is rarely of their sizes: after a convolutional network has
gone through `lockstep`, 150 MB that nobody uses stay resident.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Does nothing where the C library has no malloc_trim. Takes about a millisecond for each 100 MB."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library under that name: Windows
        return None
