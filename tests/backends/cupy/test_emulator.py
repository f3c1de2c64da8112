"""The emulator does what a GPU does: every primitive of qg.cuh against numpy and torch, whatever order the threads run in."""

import numpy as np
import pytest
import torch

from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.launch import Kernel
from qgraph.errors import LoweringError

SOURCE = r"""
#include "qg.cuh"
using namespace qg;

// A [16][8] and B [8][8] in words of 4 bytes, D [16][8]; fragments as the PTX ISA has them.
template <class Sum, class F> QG_DEVICE void tensor_core(const unsigned *A, const unsigned *B, Sum *D, F mma) {
  int l = threadIdx.x % 32;
  unsigned a[4], b[2];
  Sum d[4];
  for (int r = 0; r < 4; r++) a[r] = load4(A + (l / 4 + 8 * (r % 2)) * 8 + l % 4 + 4 * (r / 2));
  for (int r = 0; r < 2; r++) b[r] = load4(B + l / 4 * 8 + l % 4 + 4 * r);
  for (int i = 0; i < 4; i++) d[i] = D[(l / 4 + 8 * (i / 2)) * 8 + l % 4 * 2 + i % 2];
  mma(d, a, b);
  for (int i = 0; i < 4; i++) D[(l / 4 + 8 * (i / 2)) * 8 + l % 4 * 2 + i % 2] = d[i];
}
QG_KERNEL mma_of(const unsigned *A, const unsigned *B, void *D, int kind) {
  if (kind == 0) tensor_core(A, B, (int *)D, [](int (&d)[4], unsigned (&a)[4], unsigned (&b)[2]) { mma_int8<false>(d, a, b); });
  if (kind == 1) tensor_core(A, B, (int *)D, [](int (&d)[4], unsigned (&a)[4], unsigned (&b)[2]) { mma_int8<true>(d, a, b); });
  if (kind == 2) tensor_core(A, B, (float *)D, [](float (&d)[4], unsigned (&a)[4], unsigned (&b)[2]) { mma_float<__half>(d, a, b); });
  if (kind == 3) tensor_core(A, B, (float *)D, [](float (&d)[4], unsigned (&a)[4], unsigned (&b)[2]) { mma_float<__nv_bfloat16>(d, a, b); });
}

// x [32][8] halves: four matrices of 8 rows. out [32][4] words: what each lane gets.
QG_KERNEL matrices(const unsigned *x, unsigned *out, int kind) {
  __shared__ __align__(16) unsigned rows[32][4];
  int l = threadIdx.x;
  for (int i = 0; i < 4; i++) rows[l][i] = x[4 * l + i];
  __syncwarp();
  unsigned r[4] = {}, two[2] = {};
  if (kind == 0) ldmatrix4(r, rows[l]);
  if (kind == 1) ldmatrix4_transposed(r, rows[l]);
  if (kind == 2) { ldmatrix2(two, rows[l % 16]); r[0] = two[0], r[1] = two[1]; }
  if (kind == 3) r[0] = transpose8(rows[l / 4][l % 4]);
  for (int i = 0; i < 4; i++) out[4 * l + i] = r[i];
}

QG_KERNEL exchanges(int *out) {   // [12][32]
  int l = threadIdx.x, *to = out + l;
  to[0] = __shfl_sync(ALL, l, 5);
  to[32] = __shfl_sync(ALL, l, 9, 8);
  to[64] = __shfl_xor_sync(ALL, l, 6);
  to[96] = __shfl_up_sync(ALL, l, 3, 16);
  to[128] = __shfl_down_sync(ALL, l, 3, 16);
  to[160] = l < 16 ? __shfl_xor_sync(0xffffu, l, 1) : __shfl_xor_sync(0xffff0000u, l, 2);
  to[192] = __ballot_sync(ALL, l % 3 == 0);
  to[224] = 2 * __any_sync(ALL, l == 7) + __all_sync(ALL, l < 31);
  to[256] = warp_sum(l);
  to[288] = (int)warp_max(l % 7 * 1.f);
  to[320] = (int)warp_min(3.f - l % 7);
  to[352] = (int)warp_sum(.5f * l);
}

QG_KERNEL words(const unsigned *a, const unsigned *b, const unsigned *c, unsigned *out, int n) {
  int i = threadIdx.x;
  out[i] = lop3<AND_OR>(a[i], b[i], c[i]);
  out[n + i] = lop3<(0xf0 ^ 0xcc) & ~0xaa & 0xff>(a[i], b[i], c[i]);
  out[2 * n + i] = dp4a<false>(a[i], b[i], c[i]);
  out[3 * n + i] = dp4a<true>(a[i], b[i], c[i]);
  out[4 * n + i] = __dp4a((int)a[i], (int)b[i], (int)c[i]);
  out[5 * n + i] = __byte_perm(a[i], b[i], 0x7250);
  out[6 * n + i] = __byte_perm(a[i], b[i], 0x9b8f);   // with the sign of the byte in all of its bits
  out[7 * n + i] = __popc(a[i]) | __clz((int)b[i]) << 8 | __ffs((int)c[i]) << 16;
}

QG_KERNEL numbers(const float *x, const float *y, unsigned *halves, unsigned *bfloats, int *integers, int n) {
  int i = threadIdx.x;
  unsigned a = two<__half>(x[i], y[i]), b = both<__half>(y[i]), c = two<__nv_bfloat16>(x[i], y[i]), d = both<__nv_bfloat16>(y[i]);
  halves[i] = a, halves[n + i] = sub2<__half>(a, b), halves[2 * n + i] = mul2<__half>(a, b);
  bfloats[i] = c, bfloats[n + i] = sub2<__nv_bfloat16>(c, d), bfloats[2 * n + i] = mul2<__nv_bfloat16>(c, d);
  halves[3 * n + i] = bits<unsigned>(__hfma2(bits<__half2>(a), bits<__half2>(b), bits<__half2>(a)));
  integers[i] = __float2int_rn(x[i]);
  integers[n + i] = quantize(x[i], .5f, 3.f, -128, 127);
}

QG_KERNEL counted(const int *x, int *bins, int *extremes, int n) {   // bins [8]; extremes: max, min, or, and, exchanged, the winner of CAS
  __shared__ int mine[8];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x < 8) mine[threadIdx.x] = 0;
  __syncthreads();
  if (i < n) {
    atomicAdd(&mine[x[i] & 7], 1);
    atomicMax(extremes, x[i]), atomicMin(extremes + 1, x[i]), atomicOr(extremes + 2, x[i]), atomicAnd(extremes + 3, x[i]);
    atomicExch(extremes + 4, 77);
    atomicCAS(extremes + 5, 0, x[i] + 1);
  }
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(bins + threadIdx.x, mine[threadIdx.x]);
}

// seen [4][32][4]: what a ring of two stages holds as its copies are waited for
QG_KERNEL copied(const unsigned *x, unsigned *seen, int n) {
  __shared__ __align__(16) unsigned ring[2][32][4];
  int l = threadIdx.x;
  auto show = [&](int k, int stage) { for (int i = 0; i < 4; i++) seen[128 * k + 4 * l + i] = ring[stage][l][i]; };
  for (int i = 0; i < 4; i++) ring[0][l][i] = ring[1][l][i] = 7;
  copy16_async(ring[0][l], x + 4 * l);
  copy_commit();
  copy16_async(ring[1][l], x + 128 + 4 * l, 4 * l < n);
  copy_commit();
#ifndef QG_CHECKED
  show(0, 0);   // nothing has arrived
#endif
  copy_wait<1>();
  show(1, 0);   // the first has
#ifndef QG_CHECKED
  show(2, 1);   // the second has not
#endif
  copy_wait<0>();
  show(3, 1);
}

QG_KERNEL block_sum(const float *x, float *y, int n) {   // rounds otherwise in another order; the tree has one
  QG_DYNAMIC_SHARED(raw);
  float *sums = (float *)raw, s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) s += x[blockIdx.x * n + i];
  sums[threadIdx.x] = s;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) y[blockIdx.x] = sums[0];
}

QG_KERNEL order(int *y, int *ticket) { y[atomicAdd(ticket, 1)] = threadIdx.x; }
"""

pytestmark = pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
SCHEDULES = (0, 1, 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name, grid, block, *arguments, shared=0): starts a kernel of SOURCE."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "primitives.cu").write_text(SOURCE)

    def start(name, grid, block, *arguments, shared=0):
        Kernel("primitives.cu", name, shared=shared, folder=folder)((grid,), block, *arguments)

    return start


def words(x):
    """The bytes of an array as int32."""
    return torch.from_numpy(np.ascontiguousarray(x).view(np.int32))


def random(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("unsigned", [False, True])
def test_integer_tensor_cores_multiply_exactly_modulo_two_to_the_32(run, checked, schedule, unsigned):
    r = random()
    a = r.integers(0, 256, (16, 32)).astype(np.uint8 if unsigned else np.int8)
    b = r.integers(-128, 128, (8, 32)).astype(np.int8)
    d = r.integers(-(2**31), 2**31, (16, 8)).astype(np.int32)
    found = torch.from_numpy(d.copy())
    with emulation(checked=checked, schedule=schedule):
        run("mma_of", 1, 32, words(a), words(b), found, int(unsigned))
    assert (found.numpy() == (d + a.astype(np.int64) @ b.T.astype(np.int64)).astype(np.int32)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float_tensor_cores_accumulate_in_float(run, checked, dtype):
    torch.manual_seed(0)
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8) * 1e-3
    a[0, 0] = 5.9e-8  # a subnormal half
    found = d.clone()
    with emulation(checked=checked):
        run("mma_of", 1, 32, a.view(torch.int32), b.view(torch.int32), found, 2 if dtype == torch.float16 else 3)
    torch.testing.assert_close(found.double(), d.double() + a.double() @ b.double().T, rtol=0, atol=2e-6)


def test_matrices_come_as_the_ptx_isa_lays_them_out(run, checked):
    x = random().integers(0, 2**16, (4, 8, 8)).astype(np.uint16)  # matrix, row, column
    found = torch.zeros(4, 32, 4, dtype=torch.int32)
    with emulation(checked=checked, schedule=3):
        for kind in range(4):
            run("matrices", 1, 32, words(x), found[kind], kind)
    pairs = found.numpy().view(np.uint16).reshape(4, 32, 4, 2)
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        assert (pairs[0, lane] == x[:, row, column : column + 2]).all()
        assert (pairs[1, lane] == x[:, column : column + 2, row]).all()
        assert (pairs[2, lane, :2] == x[:2, row, column : column + 2]).all()
        assert (pairs[3, lane, 0] == x[0, column : column + 2, row]).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lanes_exchange_and_vote(run, checked, schedule):
    found = torch.zeros(12, 32, dtype=torch.int32)
    with emulation(checked=checked, schedule=schedule):
        run("exchanges", 1, 32, found)
    lane = np.arange(32)
    expected = [
        np.full(32, 5),
        lane // 8 * 8 + 1,
        lane ^ 6,
        np.where(lane % 16 < 3, lane, lane - 3),
        np.where(lane % 16 > 12, lane, lane + 3),
        np.where(lane < 16, lane ^ 1, lane ^ 2),
        np.full(32, sum(1 << i for i in range(0, 32, 3))),
        np.full(32, 2),
        np.full(32, 496),
        np.full(32, 6),
        np.full(32, -3),
        np.full(32, 248),
    ]
    assert (found.numpy() == np.array(expected, np.int64).astype(np.int32)).all()


def test_words_are_combined_bit_by_bit_and_byte_by_byte(run, checked):
    n = 64
    a, b, c = random().integers(0, 2**32, (3, n), np.uint32)
    c[0], b[0] = 0, 0
    found = torch.zeros(8, n, dtype=torch.int32)
    with emulation(checked=checked):
        run("words", 1, n, words(a), words(b), words(c), found, n)
    found = found.numpy().view(np.uint32)
    bytes_a, bytes_b = (v.view(np.uint8).reshape(n, 4) for v in (a, b))
    signed_a, signed_b = (v.view(np.int8).astype(np.int64) for v in (bytes_a, bytes_b))
    dot, dot_unsigned = ((c + (v * signed_b).sum(1)).astype(np.uint32) for v in (signed_a, bytes_a))
    both = np.concatenate([bytes_a, bytes_b], 1)
    sign = np.where(both >= 128, 255, 0).astype(np.uint8)
    assert (found[0] == (a & b | c)).all() and (found[1] == ((a ^ b) & ~c)).all()
    assert (found[2] == dot).all() and (found[3] == dot_unsigned).all() and (found[4] == dot).all()
    assert (found[5].view(np.uint8).reshape(n, 4) == both[:, [0, 5, 2, 7]]).all()
    assert (found[6].view(np.uint8).reshape(n, 4) == sign[:, [7, 0, 3, 1]]).all()
    leading = np.array([32 - int(v).bit_length() for v in b], np.uint32)
    first = np.array([(int(v) & -int(v)).bit_length() for v in c], np.uint32)
    assert (found[7] == (np.array([int(v).bit_count() for v in a], np.uint32) | leading << 8 | first << 16)).all()


def test_numbers_are_rounded_as_torch_rounds_them(run, checked):
    n = 256
    torch.manual_seed(1)
    x, y = torch.randn(n) * torch.logspace(-6, 4, n), torch.randn(n) * 3
    x[:6] = torch.tensor([torch.nan, torch.inf, 65519.9, 2.5, -0.75, 1e-7])
    halves, bfloats, integers = (
        torch.zeros(4, n, dtype=torch.int32),
        torch.zeros(3, n, dtype=torch.int32),
        torch.zeros(2, n, dtype=torch.int32),
    )
    with emulation(checked=checked):
        run("numbers", 1, n, x, y, halves, bfloats, integers, n)
    for dtype, found in ((torch.float16, halves), (torch.bfloat16, bfloats)):
        two, twice = torch.stack([x, y], 1).to(dtype), torch.stack([y, y], 1).to(dtype)
        expected = [two, two - twice, two * twice]
        if dtype == torch.float16:
            expected.append((two.double() * twice.double() + two.double()).to(dtype))
        torch.testing.assert_close(found.view(dtype).reshape(-1, n, 2), torch.stack(expected), rtol=0, atol=0, equal_nan=True)
    ordinary = x.isfinite() & (x.abs() < 2**31)
    assert (integers[0][ordinary] == x[ordinary].round().int()).all() and integers[0][0] == 0 and integers[0][1] == 2**31 - 1
    expected = ((x / 0.5).round() + 3).nan_to_num(-128).clamp(-128, 127).int()
    assert (integers[1] == expected).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_atomics_lose_nothing(run, checked, schedule):
    n = 500
    x = torch.from_numpy(random().integers(0, 1000, n).astype(np.int32))
    bins, extremes = torch.zeros(8, dtype=torch.int32), torch.tensor([0, 9999, 0, 1023, 0, 0], dtype=torch.int32)
    with emulation(checked=checked, schedule=schedule):
        run("counted", 4, 128, x, bins, extremes, n)
    assert bins.tolist() == np.bincount(x.numpy() & 7, minlength=8).tolist()
    every, any_ = int(np.bitwise_and.reduce(x.numpy())) & 1023, int(np.bitwise_or.reduce(x.numpy()))
    assert extremes.tolist()[:5] == [x.max().item(), x.min().item(), any_, every, 77] and extremes[5] - 1 in x[:128]


def test_copies_arrive_when_they_are_waited_for_and_not_before(run, checked):
    x = torch.arange(256, dtype=torch.int32)
    seen = torch.zeros(4, 128, dtype=torch.int32)
    with emulation(checked=checked):
        run("copied", 1, 32, x, seen, 100)
    if not checked:  # where it is checked, to look at them is an error
        assert (seen[0] == 7).all() and (seen[2] == 7).all()
    assert (seen[1] == x[:128]).all()
    assert (seen[3, :100] == x[128:228]).all() and (seen[3, 100:] == 0).all()  # zeros for what does not exist


def test_blocks_sum_the_same_whatever_order_their_threads_run_in(run, checked):
    torch.manual_seed(2)
    x, found = torch.randn(3, 1000), torch.zeros(len(SCHEDULES), 3)
    for i, schedule in enumerate(SCHEDULES):
        with emulation(checked=checked, schedule=schedule):
            run("block_sum", 3, 128, x, found[i], 1000, shared=512)
    assert (found == found[0]).all()
    torch.testing.assert_close(found[0], x.sum(1), rtol=1e-5, atol=1e-5)


def test_schedules_are_forward_reverse_and_shuffled(run, checked):
    orders = {}
    for schedule in (0, 1, 7, 8):
        found = torch.zeros(64, dtype=torch.int32)
        with emulation(checked=checked, schedule=schedule):
            run("order", 1, 64, found, torch.zeros(1, dtype=torch.int32))
        orders[schedule] = found.tolist()
    assert orders[0] == list(range(64)) and orders[1] == orders[0][::-1]
    assert orders[7] != orders[8] and sorted(orders[7]) == sorted(orders[8]) == orders[0]


def test_a_block_that_a_gpu_or_the_emulator_cannot_run_is_refused(run, checked):
    with emulation(checked=checked):
        with pytest.raises(LoweringError, match=r"kernel order: a block of 33 threads: 32, 64, \.\.\. 1024 are possible here"):
            run("order", 1, 33, torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        with pytest.raises(LoweringError, match="kernel order: 300000 bytes of shared memory; 232448 are possible"):
            run("order", 1, 32, torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), shared=300000)
