// norm_quantize.cu -- h = x + residual; y = RMSNorm(h) or LayerNorm(h); integers of y, in one kernel.
//
//     r = 1 / sqrt(mean((h - m)^2) + eps), m = mean(h) for LayerNorm, 0 for RMSNorm;   y = (h - m) r weight + bias
//
// A team of LANES threads a row, as in quantize.cu; where rows are more than the device holds teams, a team does every so-manyth. The row
// stays in registers between its passes:
//
//     memory --16 bytes a thread--> h --reduce--> m --reduce--> r --> y --reduce--> range --> integers --> memory
//     weight, bias ---------------> shared memory -------------------^         once for all rows of a block
//
// Ladder. 1. Norm and quantization as two kernels: y is written and read again, 7 bytes of traffic an element in half precision.
// 2. One: 3 bytes an element, and the residual's sum and y only where they have other readers. The variance is taken around the mean
// in a second pass over registers, which costs no memory and loses no digits. 3. (this) Weight and bias come with the first row, not behind
// its sums, which saves a latency of memory, and stay in shared memory for the other rows of the block. Rows longer than a team of 256
// holds would leave no room for a second block; theirs come out of the cache, in which what is read once does not stay (load16_stream).
//
// Traffic over the least possible for R rows to a block, half, with a residual: 1 + 2 / (7 R) if rows are many. Few rows have R = 1 (4
// where a row is a warp's), for what other blocks read again costs less than multiprocessors without work: 16 rows of 4096 move 1.26, and
// for 1.05 would have to share 3 blocks.
//
// Sums in float32; h and y are rounded to REAL, as between separate operations. x, residual, h, y [rows, k]; weight, bias [k]; residual,
// weight, bias, h, y may be null. Any k: where it is no multiple of 16 bytes, a row and its weights are aligned differently,
// and each pass reads the row again, element by element.
// REAL, LANES, KEEP: see rows.cuh.
#include "rows.cuh"

using namespace qg;

constexpr bool STAGED = LANES <= 256;
constexpr int TEAMS = BLOCK / LANES;

struct Norm {
  const REAL *x, *residual;   // vector 0 of the row
  const REAL *weight, *bias;   // vector 0, in shared memory if STAGED
  float mean, inverse;

  QG_DEVICE uint4 fetch(int j) const {   // vector j of h
    uint4 raw = load16_stream(x + j * V);
    if (!residual) return raw;
    float a[V], b[V];
    widen(raw, a), widen(load16_stream(residual + j * V), b);
    QG_UNROLL for (int i = 0; i < V; i++) a[i] += b[i];
    return narrow(a);
  }
  QG_DEVICE float element(int e) const { return residual ? rounded(to_float(x[e]) + to_float(residual[e])) : to_float(x[e]); }   // of h

  QG_DEVICE uint4 normed(int j, uint4 raw) const {   // vector j of y, where that of h is raw and the row has no phase
    float h[V], w[V];
    widen(raw, h);
    QG_UNROLL for (int i = 0; i < V; i++) h[i] = (h[i] - mean) * inverse;
    if (weight) {
      widen(load16(weight + j * V), w);
      QG_UNROLL for (int i = 0; i < V; i++) h[i] *= w[i];
    }
    if (bias) {
      widen(load16(bias + j * V), w);
      QG_UNROLL for (int i = 0; i < V; i++) h[i] += w[i];
    }
    return narrow(h);
  }
  QG_DEVICE float normed_element(const Row &row, const REAL *weight, const REAL *bias, int e) const {   // these in global memory
    float y = (element(e) - mean) * inverse;
    if (weight) y *= to_float(weight[e - row.phase]);
    if (bias) y += to_float(bias[e - row.phase]);
    return rounded(y);
  }
};

QG_DEVICE float total(uint4 raw) {
  float h[V], sum = 0.f;
  widen(raw, h);
  QG_UNROLL for (int i = 0; i < V; i++) sum += h[i];
  return sum;
}
QG_DEVICE float squares(uint4 raw, float mean) {
  float h[V], sum = 0.f;
  widen(raw, h);
  QG_UNROLL for (int i = 0; i < V; i++) sum += (h[i] - mean) * (h[i] - mean);
  return sum;
}

// The vectors of weight and bias that rows keep, to shared memory.
QG_DEVICE void stage(uint4 *to, const REAL *weight, const REAL *bias, int k) {
#pragma unroll 2
  for (int j = threadIdx.x; j < min(k / V, KEEP * LANES); j += BLOCK) {
    uint4 w, b;
    if (weight) w = load16(weight + j * V);
    if (bias) b = load16(bias + j * V);
    if (weight) store16(to + j, w);
    if (bias) store16(to + KEEP * LANES + j, b);
  }
}

// sums, given_scale ... symmetric as in quantize_rows; layer: LayerNorm. 768 threads an SM are what norm_quantize.py starts: asked for
// nothing, the compiler takes registers for fewer, or spills some to let in more.
QG_KERNEL __launch_bounds__(BLOCK, STAGED ? 768 / BLOCK : 1)
norm_quantize(const REAL *x, const REAL *residual, const REAL *weight, const REAL *bias, REAL *h, REAL *y, uint8_t *q, REAL *scale,
              uint8_t *zero, int *sums, const float *given_scale, const int *given_zero, int every, int rows, int k, int low, int high,
              int symmetric, int layer, float eps) {
  __shared__ uint4 staged[STAGED ? 2 * KEEP * LANES : 1];   // weight, bias
  const REAL *first_weight = STAGED && weight ? reinterpret_cast<const REAL *>(staged) : weight;
  const REAL *first_bias = STAGED && bias ? reinterpret_cast<const REAL *>(staged + KEEP * LANES) : bias;
  for (int first = blockIdx.x * TEAMS; first < rows; first += gridDim.x * TEAMS) {
    const int index = first + threadIdx.x / LANES;
    Row row(index, k);
    if (k % V || index >= rows) row = row.without_vectors();   // they are not the weights'
    Norm norm{x + row.first, residual ? residual + row.first : nullptr, first_weight, first_bias, 0.f, 0.f};
    uint4 kept[KEEP];
    each_kept(row, [&](int i, int j) { kept[i] = norm.fetch(j); });
    if (STAGED && k % V == 0 && first == blockIdx.x * TEAMS) {   // on their way together
      stage(staged, weight, bias, k);
      __syncthreads();
    }
    if (index >= rows) break;

    if (h) {
      REAL *to = h + row.first;
      each_kept(row, [&](int i, int j) { store16(to + j * V, kept[i]); });
      each_rest(row, [&](int e) { to[e] = from_float<REAL>(norm.element(e)); });
    }
    if (layer) {
      float sum = 0.f;
      each_kept(row, [&](int i, int) { sum += total(kept[i]); });
      each_rest(row, [&](int e) { sum += norm.element(e); });
      norm.mean = __fdiv_rn(reduce<LANES>(sum, Sum()), float(k));
    }
    float sum = 0.f;
    each_kept(row, [&](int i, int) { sum += squares(kept[i], norm.mean); });
    each_rest(row, [&](int e) { float d = norm.element(e) - norm.mean; sum += d * d; });
    norm.inverse = __fdiv_rn(1.f, __fsqrt_rn(__fdiv_rn(reduce<LANES>(sum, Sum()), float(k)) + eps));

    auto element = [&](int e) { return norm.normed_element(row, weight, bias, e); };
    each_kept(row, [&](int i, int j) { kept[i] = norm.normed(j, kept[i]); });
    if (y) {
      REAL *to = y + row.first;
      each_kept(row, [&](int i, int j) { store16(to + j * V, kept[i]); });
      each_rest(row, [&](int e) { to[e] = from_float<REAL>(element(e)); });
    }
    quantize_row(index, row, kept, element, Quantization{q, scale, zero, sums, given_scale, given_zero, every, low, high, symmetric});
  }
}
