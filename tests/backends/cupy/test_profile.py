"""The memory profile counts what a GPU would move: sectors of global memory, wavefronts of shared memory, products."""

import re

import pytest
import torch

from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.launch import Kernel
from qgraph.backends.cupy.profile import Place, Profile

SOURCE = r"""
#include "qg.cuh"
using namespace qg;

QG_KERNEL strided(const float *x, float *y, int stride, int from) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  float v = x[t * stride + from];                      // load
  if (v != 0) y[t] = v;                                // store
}
QG_KERNEL wide(const uint4 *x, uint4 *y) { store16(y + threadIdx.x, load16(x + threadIdx.x)); }
QG_KERNEL again(const float *x, float *y) {            // each of 4 blocks reads all of x
  float s = 0;
  for (int i = threadIdx.x; i < 128; i += 32) s += x[i];
  y[blockIdx.x * 32 + threadIdx.x] = s;
}
QG_KERNEL ragged(const float *x, float *y, int n) {    // lanes leave one by one
  for (int i = threadIdx.x; i < n; i += 32) y[i] = x[i];
}
QG_KERNEL banks(float *y, int stride, int bytes) {
  __shared__ __align__(16) unsigned char tile[32 * 144];
  int t = threadIdx.x;
  for (int i = 0; i < 36; i++) store4(tile + 4 * (32 * i + t), i);
  __syncthreads();
  unsigned sum = 0;
  if (bytes == 2) sum = *(unsigned short *)(tile + t * stride);     // 2 bytes
  if (bytes == 4) sum = load4(tile + t * stride);                   // 4 bytes
  if (bytes == 8) sum = load8(tile + t * stride).x;                 // 8 bytes
  if (bytes == 16) sum = load16(tile + t * stride).x;               // 16 bytes
  if (bytes == 64) { unsigned r[4]; ldmatrix4(r, tile + t * stride); sum = r[0]; }   // ldmatrix
  y[t] = sum;
}
QG_KERNEL bump(int *y, int stride) {
  __shared__ int tile[32];
  tile[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&tile[threadIdx.x * stride], 1);           // bump
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}
QG_KERNEL copies(const float *x, float *y, int stride) {
  __shared__ __align__(16) unsigned char tile[32 * 144];
  copy16_async(tile + threadIdx.x * stride, x + 4 * threadIdx.x);   // copy
  copy_commit();
  copy_wait<0>();
  y[threadIdx.x] = *(float *)(tile + threadIdx.x * stride);
}
QG_KERNEL products(int *y) {
  unsigned a[4] = {1, 2, 3, 4}, b[2] = {1, 2};
  int d[4] = {};
  float f[4] = {};
  for (int i = 0; i < 3; i++) mma_int8<true>(d, a, b);
  mma_float<__half>(f, a, b);
  y[threadIdx.x] = dp4a<false>(a[0], b[0], d[0]) + (int)f[0];
}
"""


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """profiled(name, grid, block, *arguments): the profile of a launch."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "traffic.cu").write_text(SOURCE)

    def start(name, grid, block, *arguments):
        with emulation(checked=True) as run:
            Kernel("traffic.cu", name, folder=folder)((grid,), block, *arguments)
        ((launched, profile),) = run.profiles
        assert launched == name
        return profile

    return start


def line(comment):
    return next(f"traffic.cu:{i}" for i, text in enumerate(SOURCE.splitlines(), 1) if re.search(rf"// {comment}$", text))


def ones(n):
    """Floats at a multiple of 128 bytes, as the GPU's allocator gives them."""
    room = torch.ones(n + 32)
    start = -room.data_ptr() // 4 % 32
    return room[start : start + n]


def test_neighbouring_floats_take_four_sectors_a_warp(profiled):
    p = profiled("strided", 4, 64, ones(256), ones(256), 1, 0)
    assert p.select("global", ["load"]) == (Place(line("load"), "global", "load", 8, 1024, 32, 32),)
    assert p.select("global", ["store"]) == (Place(line("store"), "global", "store", 8, 1024, 32, 32),)
    assert (p.requested, p.traffic, p.read, p.written, p.unique) == (2048, 2048, 1024, 1024, 2048)
    assert p.sector_efficiency == 1.0 and p.redundancy == 1.0 and p.bank_conflicts == 0 and p.wavefronts == 0


@pytest.mark.parametrize(
    ("stride", "start", "sectors", "least"), [(2, 0, 8, 4), (8, 0, 32, 4), (100, 0, 32, 4), (1, 1, 5, 4), (1, 8, 4, 4), (0, 3, 1, 1)]
)
def test_strides_and_offsets_touch_more_sectors(profiled, stride, start, sectors, least):
    p = profiled("strided", 1, 32, ones(3300), ones(32), stride, start)
    (load,) = p.select("global", ["load"])
    assert (load.served, load.least, load.bytes) == (sectors, least, 128)
    assert p.sector_efficiency == (least + 4) / (sectors + 4)


def test_one_access_of_16_bytes_is_one_access(profiled):
    p = profiled("wide", 1, 64, ones(256), ones(256))
    assert [(q.accesses, q.bytes, q.served) for q in p.places] == [(2, 1024, 32), (2, 1024, 32)]


def test_what_is_read_again_is_traffic_but_not_unique(profiled):
    p = profiled("again", 4, 32, ones(128), ones(128))
    assert (p.requested, p.read, p.written) == (4 * 512 + 512, 512, 512) and p.redundancy == 2.5


def test_lanes_that_have_left_are_not_counted(profiled):
    p = profiled("ragged", 1, 32, ones(100), ones(100), 100)
    assert [(q.accesses, q.bytes, q.served, q.least) for q in p.places] == [(4, 400, 13, 13)] * 2


# The strides are in bytes; wavefronts of one warp's access and the least.
@pytest.mark.parametrize(
    ("bytes", "stride", "wavefronts", "least"),
    [(4, 4, 1, 1), (4, 8, 2, 1), (4, 128, 32, 1), (4, 132, 1, 1), (4, 0, 1, 1), (2, 2, 1, 1), (2, 4, 1, 1), (2, 8, 2, 1)]
    + [(8, 8, 2, 2), (8, 16, 4, 2), (8, 128, 32, 2), (8, 136, 2, 2)]
    + [(16, 16, 4, 4), (16, 32, 8, 4), (16, 128, 32, 4), (16, 144, 4, 4), (64, 128, 32, 4), (64, 144, 4, 4)],
)
def test_lanes_in_the_same_bank_take_turns(profiled, bytes, stride, wavefronts, least):
    p = profiled("banks", 1, 32, ones(32), stride, bytes)
    (load,) = p.select("shared", ["load"])
    assert load.line == line("ldmatrix" if bytes == 64 else f"{bytes} bytes")
    assert (load.accesses, load.served, load.least) == (1, wavefronts, least)
    assert p.bank_conflicts == wavefronts - least and p.wavefronts == 36 + wavefronts


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (0, 32)])
def test_atomics_on_one_word_take_turns(profiled, stride, wavefronts):
    p = profiled("bump", 1, 32, torch.zeros(32, dtype=torch.int32), stride)
    (atomic,) = p.select("shared", ["atomic"], [line("bump")])
    assert (atomic.served, atomic.least) == (wavefronts, 1)


@pytest.mark.parametrize(("stride", "conflicts"), [(16, 0), (128, 28), (144, 0)])
def test_a_copy_reads_global_and_writes_shared_memory(profiled, stride, conflicts):
    p = profiled("copies", 1, 32, ones(128), ones(32), stride)
    here = [line("copy")]
    (read,), (written,) = p.select("global", lines=here), p.select("shared", lines=here)
    assert (read.kind, read.bytes, read.served) == ("load", 512, 16)
    assert (written.kind, written.bytes, written.served - written.least) == ("store", 512, conflicts)


def test_products_are_counted(profiled):
    p = profiled("products", 1, 64, torch.zeros(64, dtype=torch.int32))
    assert (p.mma_int8, p.mma_float, p.dp4a) == (6, 2, 64)


def test_a_launch_without_accesses_is_efficient():
    p = Profile((), 0, 0, 0, 0, 0)
    assert p.sector_efficiency == 1.0 and p.redundancy == 1.0 and p.traffic == 0


def test_a_fast_emulation_has_no_profiles(tmp_path):
    (tmp_path / "traffic.cu").write_text(SOURCE)
    with emulation() as run:
        Kernel("traffic.cu", "wide", folder=tmp_path)((1,), 64, ones(256), ones(256))
    assert run.profiles == []
