"""The checked emulator names what is wrong with a kernel. Each kernel is right with `broken` = 0, and then nothing is found."""

import re
import shutil

import pytest
import torch

from qgraph.backends.cupy import emulate
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.launch import Kernel
from qgraph.errors import LoweringError

SOURCE = r"""
#include "qg.cuh"
using namespace qg;
#define THREAD int t = threadIdx.x, l = t % 32; (void)l
#define TILE __shared__ __align__(16) float tile[256]; for (int i = t; i < 256; i += 64) tile[i] = 0; __syncthreads()

// --- bounds: x and y [64] floats, 64 threads
QG_KERNEL beyond(const float *x, float *y, int broken) { THREAD; y[t] = x[t + broken]; }                        // beyond: argument 0
QG_KERNEL before(const float *x, float *y, int broken) { THREAD; y[t - 2 * broken] = x[t]; }                    // before: argument 1
QG_KERNEL null(const float *x, float *y, int broken) { THREAD; y[t] = broken ? ((float *)nullptr)[t] : x[t]; }  // null
QG_KERNEL beyond_static(const float *x, float *y, int broken) {
  THREAD;
  __shared__ float tile[64];
  tile[t + broken] = x[t];                                                                                      // beyond_static
  __syncthreads();
  y[t] = tile[t];
}
QG_KERNEL beyond_dynamic(const float *x, float *y, int broken) {
  THREAD;
  QG_DYNAMIC_SHARED(raw);
  store4(raw + 4 * (t + broken), 1);                                                                            // beyond_dynamic
  y[t] = x[t];
}
QG_KERNEL beyond_copy(const float *x, float *y, int broken) {
  THREAD;
  __shared__ __align__(16) float tile[256];
  copy16_async(&tile[t * 4], x + t % 16 * 4 + 4 * broken);                                                       // beyond_copy
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  y[t] = tile[t];
}
QG_KERNEL another(const float *x, float *y, int broken) {
  THREAD;
  __shared__ float *whose;
  float mine[4] = {x[t], x[t], x[t], x[t]};
  if (t == 3) whose = mine;
  __syncthreads();
  y[t] = (broken ? whose : mine)[t % 4];                                                                        // another
}
__noinline__ __device__ float deeply(const float *x, int n) {
  volatile char much[70000];
  for (int i = 0; i < n; i++) much[i] = x[i % 64];
  return much[n - 1];
}
QG_KERNEL deep(const float *x, float *y, int broken) { THREAD; y[t] = broken ? deeply(x, 70000) : x[t]; }

// --- alignment
QG_KERNEL misaligned(const float *x, float *y, int broken) { THREAD; if (t < 15) y[t] = __uint_as_float(load16(x + 4 * t + broken).x); }  // misaligned
QG_KERNEL misaligned_copy(const float *x, float *y, int broken) {
  THREAD;
  __shared__ __align__(16) float tile[68];
  if (t < 16) copy16_async(tile + 4 * t + broken, x + 4 * t);                                                   // misaligned_copy
  copy_commit();
  copy_wait<0>();
}

// --- races
QG_KERNEL read_early(const float *x, float *y, int broken) {
  THREAD;
  TILE;
  tile[t] = x[t];
  if (!broken) __syncthreads();
  y[t] = tile[63 - t];                                                                                          // read_early
}
QG_KERNEL overwritten(const float *x, float *y, int broken) {
  THREAD;
  TILE;
  tile[t] = x[t];
  __syncthreads();
  y[t] = tile[63 - t];
  if (!broken) __syncthreads();
  tile[t] = 0;                                                                                                  // overwritten
}
QG_KERNEL twice(const float *x, float *y, int broken) {
  THREAD;
  TILE;
  tile[broken ? 0 : t] = x[t];                                                                                  // twice
  __syncthreads();
  y[t] = tile[t];
}
QG_KERNEL lanes(const float *x, float *y, int broken) {   // a shuffle is no fence
  THREAD;
  TILE;
  tile[t] = x[t];
  broken ? (void)__shfl_sync(ALL, t, 0) : __syncwarp();
  y[t] = tile[t ^ 1];                                                                                           // lanes
}
QG_KERNEL half_warps(const float *x, float *y, int broken) {
  THREAD;
  TILE;
  tile[t] = x[t];
  __syncwarp(l < 16 ? 0xffffu : 0xffff0000u);
  y[t] = tile[t ^ (broken ? 16 : 15)];                                                                          // half_warps
}
QG_KERNEL wrong_warp(const float *x, float *y, int broken) {
  THREAD;
  TILE;
  tile[t] = x[t];
  __syncwarp();
  y[t] = tile[t ^ (broken ? 32 : 31)];                                                                          // wrong_warp
}
QG_KERNEL rows(const float *x, float *y, int broken) {   // ldmatrix reads the rows of other lanes
  THREAD;
  TILE;
  for (int i = 0; i < 4; i++) tile[4 * t + i] = x[t];
  if (!broken) __syncwarp();
  unsigned r[4];
  ldmatrix4(r, tile + 4 * (t ^ 1));                                                                               // rows
  y[t] = __uint_as_float(r[0]);
}
QG_KERNEL in_turn(const float *x, float *y, int broken) {   // the reader that comes last is ordered after the others, and so is its write
  THREAD;
  TILE;
  tile[t] = x[t];
  __syncwarp();
  float other = tile[t ^ 1];
  if (!broken) __syncwarp();
  tile[t] += other;                                                                                             // in_turn
  __syncwarp();
  y[t] = tile[t ^ 1];
}
QG_KERNEL both_read(const float *x, float *y, int broken) {
  THREAD;
  TILE;
  if (t == 0 || t == 32) y[t] = tile[0];
  if (!broken) __syncthreads();
  if (t == 32) tile[0] = x[0];                                                                                  // both_read
}
QG_KERNEL passed_on(const float *x, float *y, int broken) {   // lane 0 -> lane 1 -> lane 2
  THREAD;
  TILE;
  tile[t] = x[t];
  if (l < 2 && !broken) __syncwarp(3);
  if (l == 1 || l == 2) __syncwarp(6);
  if (l == 2) y[t] = tile[t - 2];                                                                               // passed_on
}
QG_KERNEL added(const float *x, float *y, int broken) {
  THREAD;
  __shared__ float sum;
  if (t == 0) sum = 0;
  __syncthreads();
  if (broken && t == 40) sum += x[t];                                                                           // added
  else atomicAdd(&sum, x[t]);
  __syncthreads();
  y[t] = sum;
}

// --- what nothing has written
QG_KERNEL unwritten(const float *x, float *y, int broken) {
  THREAD;
  __shared__ float tile[64];
  if (!broken || blockIdx.x == 0) tile[t] = x[t];   // block 1 must not live on what block 0 left
  __syncthreads();
  if (blockIdx.x == 1) y[t] = tile[63 - t];                                                                     // unwritten
}

// --- cp.async
QG_KERNEL before_wait(const float *x, float *y, int broken) {
  THREAD;
  __shared__ __align__(16) float tile[2][256];
  copy16_async(&tile[0][4 * t], x + t / 4 * 4);
  copy_commit();
  copy16_async(&tile[1][4 * t], x + t / 4 * 4);
  copy_commit();
  copy_wait<1>();
  y[t] = tile[broken][4 * t];                                                                                   // before_wait
  copy_wait<0>();
}
QG_KERNEL of_others(const float *x, float *y, int broken) {
  THREAD;
  TILE;
  copy16_async(&tile[4 * t], x + t / 4 * 4);
  copy_commit();
  copy_wait<0>();
  if (!broken) __syncthreads();
  y[t] = tile[4 * (63 - t)];                                                                                    // of_others
}
QG_KERNEL refilled(const float *x, float *y, int broken) {   // a pipeline that refills a stage while others may read it
  THREAD;
  TILE;
  for (int k = 0; k < 3; k++) {
    if (!broken) __syncthreads();
    copy16_async(&tile[4 * t], x + t / 4 * 4);                                                                  // refilled
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    y[t] = tile[4 * (63 - t)];
  }
}
QG_KERNEL never_waited(const float *x, float *y, int broken) {
  THREAD;
  __shared__ __align__(16) float tile[256];
  copy16_async(&tile[4 * t], x + t / 4 * 4);
  copy_commit();
  if (!broken) copy_wait<0>();
}

// --- blocks
QG_KERNEL both_blocks(const float *x, float *y, int broken) {
  THREAD;
  if (broken || blockIdx.x == 0) y[t] = x[t];                                                                   // both_blocks
}
QG_KERNEL from_another(const float *x, float *y, int broken) {
  THREAD;
  if (blockIdx.x == 0 && t < 32) y[t] = x[t];
  if (blockIdx.x == 1 && t < 32) y[t + 32] = (broken ? y : x)[t];                                               // from_another
}
QG_KERNEL under_another(const float *x, float *y, int broken) {
  THREAD;
  if (blockIdx.x == 0 && t < 32) y[t] = (broken ? y : x)[t + 32];
  if (blockIdx.x == 1 && t < 32) y[t + 32] = x[t];                                                              // under_another
}
QG_KERNEL behind_another(const float *x, float *y, int broken) {   // as the block that comes last adds what the others left
  THREAD;
  if (!broken && t == 0) atomicAdd(y + 63, 1.f);
  __syncthreads();
  if (t < 32) y[t] = x[t] + blockIdx.x;                                                                         // behind_another
}

// --- threads that do not meet
QG_KERNEL some_wait(const float *x, float *y, int broken) { THREAD; if (t < 40 || !broken) __syncthreads(); }                 // some_wait
QG_KERNEL some_left(const float *x, float *y, int broken) { THREAD; if (broken && t < 4) return; __syncthreads(); __syncthreads(); }  // some_left
QG_KERNEL some_vote(const float *x, float *y, int broken) { THREAD; if (l < 8 || !broken) __ballot_sync(ALL, 1); __syncthreads(); }     // some_vote
QG_KERNEL not_mine(const float *x, float *y, int broken) { THREAD; if (l < 8) __shfl_sync(broken ? 0xf0u : 0xffu, l, 4); }     // not_mine
QG_KERNEL from_none(const float *x, float *y, int broken) { THREAD; if (l < 8) __shfl_sync(0xffu, l, broken ? 9 : 4); }        // from_none
QG_KERNEL two_masks(const float *x, float *y, int broken) { THREAD; __shfl_xor_sync(broken && l < 16 ? 0xffffu : ALL, l, 1); } // two_masks
"""

FAULTS = {
    "beyond": "out of bounds: a read of 4 bytes that ends 4 bytes beyond the end of argument 0 (256 bytes), by thread (63,0,0) of block (0,0,0)",
    "before": "out of bounds: a write of 4 bytes that starts 8 bytes before the start of argument 1 (256 bytes), by thread (0,0,0) of block (0,0,0)",
    "null": "out of bounds: a read of 4 bytes of a null pointer, by thread (0,0,0) of block (0,0,0)",
    "beyond_static": "out of bounds: a write of 4 bytes that ends 4 bytes beyond the end of beyond_static::tile (256 bytes), by thread (63,0,0)",
    "beyond_dynamic": "out of bounds: a write of 4 bytes that ends 4 bytes beyond the end of dynamic shared memory (256 bytes), by thread (63,0,0)",
    "beyond_copy": "out of bounds: a read of 16 bytes that ends 16 bytes beyond the end of argument 0 (256 bytes), by thread (15,0,0)",
    "another": "out of bounds: a read of 4 bytes of a local variable of another thread, by thread (0,0,0)",
    "misaligned": "misaligned: a read of 16 bytes at an address that is 4 more than a multiple of 16, by thread (0,0,0) of block (0,0,0)",
    "misaligned_copy": "cp.async of 16 bytes at an address that is not a multiple of 16",
    "read_early": "a race on byte 128 of read_early::tile: nothing orders a write and an access by thread (31,0,0) at faults.cu:",
    "overwritten": "a race on byte 124 of overwritten::tile: nothing orders a read and an access by thread (31,0,0) at faults.cu:",
    "twice": "a race on byte 0 of twice::tile: nothing orders a write and an access by thread (0,0,0) at faults.cu:",
    "lanes": "a race on byte 120 of lanes::tile: nothing orders a read and an access by thread (30,0,0) at faults.cu:",
    "half_warps": "a race on byte 124 of half_warps::tile: nothing orders a write and an access by thread (15,0,0) at faults.cu:",
    "wrong_warp": "a race on byte 252 of wrong_warp::tile: nothing orders a write and an access by thread (31,0,0) at faults.cu:",
    "rows": "a race on byte 16 of rows::tile: nothing orders a write and an access by thread (0,0,0) at faults.cu:",
    "in_turn": "a race on byte 0 of in_turn::tile: nothing orders a read and an access by thread (0,0,0) at faults.cu:",
    "both_read": "a race on byte 0 of both_read::tile: nothing orders a write and an access by thread (0,0,0) at faults.cu:",
    "passed_on": "a race on byte 0 of passed_on::tile: nothing orders a read and an access by thread (0,0,0) at faults.cu:",
    "added": "a race on byte 0 of added::sum: nothing orders a read and an access by thread (39,0,0) at faults.cu:",
    "unwritten": "a read of byte 252 of unwritten::tile, which nothing in this block has written, by thread (0,0,0) of block (1,0,0)",
    "before_wait": "a read of byte 1024 of before_wait::tile, which cp.async brings, before the wait for it, by thread (0,0,0) of block (0,0,0)",
    "of_others": "a race on byte 512 of of_others::tile: nothing orders a write and an access by thread (31,0,0) at faults.cu:",
    "refilled": "a race on byte 496 of refilled::tile: nothing orders a read and an access by thread (31,0,0) at faults.cu:",
    "both_blocks": "a write of byte 0 of argument 1, which another block writes: nothing orders blocks, by thread (0,0,0) of block (1,0,0)",
    "from_another": "a read of byte 0 of argument 1, which another block writes: nothing orders blocks, by thread (0,0,0) of block (1,0,0)",
    "under_another": "a write of byte 128 of argument 1, which another block reads: nothing orders blocks, by thread (0,0,0) of block (1,0,0)",
    "behind_another": "a write of byte 0 of argument 1, which another block writes: nothing orders blocks, by thread (0,0,0) of block (1,0,0)",
    "some_wait": "divergent barrier in block (0,0,0): 40 threads wait at __syncthreads",
    "some_left": "__syncthreads in block (0,0,0) after 4 of 64 threads have exited",
    "some_vote": "divergent barrier in block (0,0,0): 48 threads wait at __syncthreads",
    "not_mine": "lane 0 is not in the mask 000000f0 that it waits with",
    "from_none": "lane 0 reads lane 9 in a shuffle, which is not in its mask 000000ff",
    "two_masks": "divergent barrier in block (0,0,0): 0 threads wait at __syncthreads, 32 in a warp operation",
}
"""What is said of each broken kernel; the line of the fault, which bears the kernel's name in a comment, is said behind."""
UNPLACED = {
    "deep": "a thread's local variables take more than 65536 bytes",
    "never_waited": "a thread ends with copies of cp.async that it never waited for",
}
FAST = ("misaligned_copy", "some_wait", "some_left", "some_vote", "not_mine", "from_none", "two_masks", "never_waited")
"""What the fast emulator reports as well, without a line."""

BLOCKS = ("unwritten", "both_blocks", "from_another", "under_another", "behind_another")
"""Kernels of two blocks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("kernels")
    (found / "faults.cu").write_text(SOURCE)
    return found


def start(folder, name, broken, *, schedule=0, checked=True):
    x, y = torch.ones(64), torch.zeros(64)
    with emulation(checked=checked, schedule=schedule):
        Kernel("faults.cu", name, shared=256, folder=folder)((1 + (name in BLOCKS),), 64, x, y, broken)


def line(name):
    return next(i for i, text in enumerate(SOURCE.splitlines(), 1) if re.search(rf"// {name}\b", text))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_thread_and_line(folder, name):
    with pytest.raises(LoweringError) as found:
        start(folder, name, 1)
    said = str(found.value)
    assert said.startswith(f"kernel {name}: {FAULTS[name]}"), said
    assert f"at faults.cu:{line(name)}" in said and "{" not in said, said


def test_a_build_that_another_checkout_kept_names_the_same_lines(folder, tmp_path, monkeypatch):
    shutil.copytree(emulate.EMULATOR, tmp_path / "emulator")
    start(folder, "some_left", 0)
    monkeypatch.setattr(emulate, "EMULATOR", tmp_path / "emulator")
    emulate.build.cache_clear()
    test_a_fault_is_named_with_its_thread_and_line(folder, "some_left")


@pytest.mark.parametrize("name", UNPLACED)
def test_a_fault_without_a_place_is_named(folder, name):
    with pytest.raises(LoweringError, match=re.escape(f"kernel {name}: {UNPLACED[name]}")):
        start(folder, name, 1)


@pytest.mark.parametrize("schedule", [0, 1, 11])
@pytest.mark.parametrize("name", [*FAULTS, *UNPLACED])
def test_the_kernel_without_the_fault_passes(folder, name, schedule):
    start(folder, name, 0, schedule=schedule)


@pytest.mark.parametrize("schedule", [1, 11])
@pytest.mark.parametrize("name", [n for n, said in FAULTS.items() if said.startswith("a race")])
def test_a_race_is_found_whatever_order_the_threads_run_in(folder, name, schedule):
    with pytest.raises(LoweringError, match="a race on byte"):
        start(folder, name, 1, schedule=schedule)


@pytest.mark.parametrize("name", FAST)
def test_the_fast_emulator_reports_what_it_would_hang_or_go_wrong_on(folder, name):
    said = {**FAULTS, **UNPLACED}[name]
    with pytest.raises(LoweringError, match=re.escape(f"kernel {name}: {said}")) as found:
        start(folder, name, 1, checked=False)
    assert "0x" not in str(found.value)
    start(folder, name, 0, checked=False)
