// rows.cuh -- what the kernels that quantize rows share: rows of any length in 16-byte vectors, reductions over a row, x -> integers.
//
// Compiled with -DREAL=float, __half or __nv_bfloat16, and LANES, KEEP. A row has k elements, V = 16 / sizeof(REAL) of them in a vector.
// Where k is no multiple of V a row begins inside a vector:
//
//     memory   | . . a a a a a a | a a a a a a a a | a a a b b b b b | b b ...      V = 8, rows a and b
//     row a      phase = 2         whole: kept       its last three
//     row b                                          phase = 3
//
// A row belongs to LANES threads (a warp, or the whole block). Each keeps its first KEEP whole vectors in registers, read with one access
// each; the integers of a vector lie at the same place of an array of bytes, and are written with one access too. The rest, which are the
// ragged ends and what exceeds KEEP * LANES vectors, is done element by element, a thread an element, and read again in each pass. So rows
// of up to KEEP * LANES vectors come from memory once, though the range must be known before the first integer is. All arrays begin at a
// multiple of 16 bytes.
#pragma once
#include "qg.cuh"
#define BLOCK (LANES == 32 ? 128 : LANES)

namespace qg {
constexpr int V = 16 / sizeof(REAL);

QG_DEVICE void widen(uint4 raw, float (&out)[V]) {
  REAL t[V];
  memcpy(t, &raw, 16);
  QG_UNROLL for (int i = 0; i < V; i++) out[i] = to_float(t[i]);
}
QG_DEVICE uint4 narrow(const float (&x)[V]) {
  REAL t[V];
  QG_UNROLL for (int i = 0; i < V; i++) t[i] = from_float<REAL>(x[i]);
  uint4 raw;
  memcpy(&raw, t, 16);
  return raw;
}
QG_DEVICE float rounded(float v) { return to_float(from_float<REAL>(v)); }   // to REAL and back

// Where a row lies. Its elements are counted from the start of its first vector, which is element `first` of a contiguous array: the row is
// [phase, end), and its vectors begin, begin + 1 ... begin + kept - 1 are kept.
struct Row {
  size_t first;
  int phase, end, begin, kept;

  QG_DEVICE Row(size_t index, int k)
      : first(index * k / V * V), phase(int(index * k % V)), end(phase + k), begin(phase > 0),
        kept(max(0, min(end / V - begin, KEEP * LANES))) {}
  QG_DEVICE Row without_vectors() const {
    Row row = *this;
    row.kept = 0;
    return row;
  }
};

// f(i, j): the thread's i-th vector is vector j of the row.
template <class F> QG_DEVICE void each_kept(const Row &row, F f) {
  int lane = threadIdx.x % LANES;
  QG_UNROLL for (int i = 0; i < KEEP; i++) if (lane + i * LANES < row.kept) f(i, row.begin + lane + i * LANES);
}
// f(e): element e of the row is one of this thread's, and in no vector that is kept.
template <class F> QG_DEVICE void each_rest(const Row &row, F f) {
  int before = min(row.begin * V, row.end) - row.phase, gap = row.kept * V;
#pragma unroll 1   // it is written out several times in a kernel, and seldom runs long
  for (int i = row.phase + threadIdx.x % LANES; i < row.end - gap; i += LANES) f(i < row.phase + before ? i : i + gap);
}

// --- over the THREADS of a row: every one gets the result. The second barrier lets the next reduction use the same array.
struct Sum { template <class N> QG_DEVICE N operator()(N v) const { return warp_sum(v); } };
struct LargestPair {   // of numbers >= 0
  QG_DEVICE float2 operator()(float2 v) const { return make_float2(warp_max(v.x), warp_max(v.y)); }
};

template <int THREADS, class Warp, class N> QG_DEVICE N reduce(N v, Warp warp) {
  v = warp(v);
  if constexpr (THREADS > 32) {
    __shared__ N part[THREADS / 32];
    int lane = threadIdx.x % 32;
    if (lane == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = warp(lane < THREADS / 32 ? part[lane] : N{});
    __syncthreads();
  }
  return v;
}

// A range widened to contain 0: [-below, above]. NaN does not count (fmaxf drops it).
struct Range {
  float below = 0.f, above = 0.f;
  QG_DEVICE void add(float x) { below = fmaxf(below, -x), above = fmaxf(above, x); }
  QG_DEVICE void add(uint4 raw) {
    float x[V];
    widen(raw, x);
    QG_UNROLL for (int i = 0; i < V; i++) add(x[i]);
  }
  template <int THREADS> QG_DEVICE void over() {
    float2 both = reduce<THREADS>(make_float2(below, above), LargestPair());
    below = both.x, above = both.y;
  }
};

// saturate(round_half_even(x / scale) + zero) in [low, high], as qg::quantize has it, without a division for each x of a vector.
//
// x is clamped to [(low - zero) scale, (high - zero) scale], which sends NaN to the lower end; the ends, though rounded, still become low
// and high. Then x / scale = x inverse, corrected twice by its remainder: that is the rounded quotient (P. Markstein, "Computation of
// elementary functions on the IBM RISC System/6000 processor", IBM J. Res. Dev. 34(1), 1990) where nothing that matters leaves the normal
// numbers; so scales beyond 2^-90 .. 2^90 (and 0, NaN) are not `ordinary` and divided by. Adding 1.5 * 2^23 rounds half to even and leaves
// the integer in the low bits.
struct Grid {
  float scale, inverse, lowest, highest;
  int zero, low, high;
  bool ordinary;

  QG_DEVICE Grid(float scale, int zero, int low, int high)
      : scale(scale), inverse(__fdiv_rn(1.f, scale)), lowest(__fmul_rn(float(low - zero), scale)),
        highest(__fmul_rn(float(high - zero), scale)), zero(zero), low(low), high(high), ordinary(scale >= 0x1p-90f && scale <= 0x1p90f) {}

  QG_DEVICE int integer(float x) const { return quantize(x, scale, float(zero), low, high); }
  QG_DEVICE uint32_t low_byte(float x) const {
    x = fminf(fmaxf(x, lowest), highest);
    float q = __fmul_rn(x, inverse);
    q = __fmaf_rn(__fmaf_rn(-q, scale, x), inverse, q);
    q = __fmaf_rn(__fmaf_rn(-q, scale, x), inverse, q);
    return __float_as_uint(__fadd_rn(q, 12582912.f)) + zero;
  }
  // A vector to V bytes, for ordinary scales.
  QG_DEVICE void integers(uint4 raw, uint32_t (&words)[V / 4]) const {
    float x[V];
    uint32_t b[V];
    widen(raw, x);
    QG_UNROLL for (int i = 0; i < V; i++) b[i] = low_byte(x[i]);
    QG_UNROLL for (int w = 0; w < V / 4; w++)
      words[w] = __byte_perm(__byte_perm(b[4 * w], b[4 * w + 1], 0x0040), __byte_perm(b[4 * w + 2], b[4 * w + 3], 0x0040), 0x5410);
  }
};
QG_DEVICE void store_bytes(uint8_t *q, const uint32_t (&words)[V / 4]) {
  if constexpr (V == 8) store8(q, make_uint2(words[0], words[V / 4 - 1]));
  else store4(q, words[0]);
}

// How a kernel quantizes. given_scale and given_zero (or null: 0) hold one for all rows (every = 0) or one per row (every = 1); where
// given_scale is null, both are taken from the row's range and written to scale and zero. sums: of each row's integers, or null.
struct Quantization {
  uint8_t *q;
  REAL *scale;
  uint8_t *zero;
  int *sums;
  const float *given_scale;
  const int *given_zero;
  int every, low, high, symmetric;

  // The reference's dynamic_quantize: scale rounded to REAL before anything is divided by it; 1 where all is zero.
  QG_DEVICE Grid grid_of(Range r) const {
    float s = symmetric ? __fdiv_rn(fmaxf(r.below, r.above), float((high - low) / 2))
                        : __fdiv_rn(__fadd_rn(r.below, r.above), float(high - low));
    s = rounded(r.below == 0.f && r.above == 0.f ? 1.f : s);
    if (symmetric) return Grid(s, (low + high + 1) / 2, low, high);
    float exact = __fsub_rn(float(low), __fdiv_rn(-r.below, s));
    return Grid(s, exact != exact ? high : int(rintf(fminf(fmaxf(exact, float(low)), float(high)))), low, high);
  }
  QG_DEVICE Grid grid_given(size_t row) const {
    return Grid(given_scale[row * every], given_zero ? given_zero[row * every] : 0, low, high);
  }
  QG_DEVICE void write_grid(size_t row, const Grid &g) const {
    scale[row] = from_float<REAL>(g.scale);
    zero[row] = uint8_t(g.zero);
  }
};

// The last part of a row kernel: row `index` becomes integers. Its vectors are `kept`; `element(e)` is element e, of any.
template <class Element>
QG_DEVICE void quantize_row(size_t index, const Row &row, const uint4 (&kept)[KEEP], Element element, const Quantization &to) {
  Range range;
  if (!to.given_scale) {
    each_kept(row, [&](int i, int) { range.add(kept[i]); });
    each_rest(row, [&](int e) { range.add(element(e)); });
    range.over<LANES>();
  }
  Grid grid = to.given_scale ? to.grid_given(index) : to.grid_of(range);
  if (!to.given_scale && threadIdx.x % LANES == 0) to.write_grid(index, grid);
  uint8_t *q = to.q + row.first;
  int sum = 0;
  if (grid.ordinary) {
    uint32_t flip = to.low < 0 ? 0x80808080 : 0;   // signed + 128 is unsigned
    each_kept(row, [&](int i, int j) {
      uint32_t words[V / 4];
      grid.integers(kept[i], words);
      store_bytes(q + j * V, words);
      QG_UNROLL for (uint32_t w : words) sum = dp4a<true>(w ^ flip, 0x01010101, sum - 4 * int(flip & 255));
    });
  }
  each_rest(grid.ordinary ? row : row.without_vectors(), [&](int e) {
    int integer = grid.integer(element(e));
    q[e] = uint8_t(integer);
    sum += integer;
  });
  if (!to.sums) return;
  sum = reduce<LANES>(sum, Sum());
  if (threadIdx.x % LANES == 0) to.sums[index] = sum;
}
}  // namespace qg
