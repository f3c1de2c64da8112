"""What is freed leaves the process, where the C library can do that."""

import platform

import psutil
import pytest
import torch

from qgraph import heap


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_freed_memory_is_no_longer_resident():
    process, blocks = psutil.Process(), [torch.ones(2**18) for _ in range(200)]  # 1 MB each
    last = blocks[-1]
    held = process.memory_info().rss
    del blocks
    heap.give_back()
    assert held - process.memory_info().rss > 150e6 and last[0] == 1


def test_a_c_library_without_it_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap._malloc_trim.cache_clear()
    heap.give_back()
    heap._malloc_trim.cache_clear()
