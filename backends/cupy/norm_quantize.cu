// norm_quantize.cu -- h = x + residual; y = RMSNorm(h) or LayerNorm(h); integers of y, in one kernel.
//
//     r = 1 / sqrt(mean((h - m)^2) + eps), m = mean(h) for LayerNorm, 0 for RMSNorm;   y = (h - m) r weight + bias
//
// A team of LANES threads a row, as in quantize.cu. The row stays in registers between its passes:
//
//     memory --16 bytes a thread--> h --reduce--> m --reduce--> r --> y --reduce--> range --> integers --> memory
//
// Ladder. 1. Norm and quantization as two kernels: y is written and read again, 7 bytes of traffic an element in half precision.
// 2. (this) One: 3 bytes an element, and the residual's sum and y only where they have other readers. The variance is taken around the mean
// in a second pass over registers, which costs no memory and loses no digits. Weight and bias come out of the cache: every row reads the
// same ones, so what is read once does not stay there (load16_stream).
//
// Sums in float32; h and y are rounded to REAL, as between separate operations. x, residual, h, y [rows, k]; weight, bias [k]; residual,
// weight, bias, h, y may be null. Any k: where it is no multiple of 16 bytes, what is said above of registers does not hold, every pass reads the row again.
// REAL, LANES, KEEP: see rows.cuh.
#include "rows.cuh"

using namespace qg;

struct Norm {
  const REAL *x, *residual, *weight, *bias;   // x, residual: vector 0 of the row
  float mean, inverse;

  QG_DEVICE uint4 plus(uint4 raw, uint4 other) const {
    float a[V], b[V];
    widen(raw, a), widen(other, b);
    QG_UNROLL for (int i = 0; i < V; i++) a[i] = __fadd_rn(a[i], b[i]);
    return narrow(a);
  }
  QG_DEVICE uint4 fetch(int j) const {   // h of a vector that is kept
    uint4 raw = load16_stream(x + j * V);
    return residual ? plus(raw, load16_stream(residual + j * V)) : raw;
  }
  QG_DEVICE uint4 fetch_any(const Row &row, int j) const {
    uint4 raw = row.load(x, j);
    return residual ? plus(raw, row.load(residual, j)) : raw;
  }
  QG_DEVICE uint4 normed(int j, uint4 raw) const {   // of a vector that is kept: column j * V is its first
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
  QG_DEVICE uint4 normed_any(const Row &row, int j) const {   // 0 where the row is not
    float h[V];
    widen(fetch_any(row, j), h);
    QG_UNROLL for (int i = 0; i < V; i++) {
      int at = j * V + i, column = at - row.phase;
      h[i] = (h[i] - mean) * inverse;
      if (weight && row.has(at)) h[i] *= to_float(weight[column]);
      if (bias && row.has(at)) h[i] += to_float(bias[column]);
      if (!row.has(at)) h[i] = 0.f;
    }
    return narrow(h);
  }
};

QG_DEVICE void store_any(const Row &row, REAL *to, int j, uint4 raw) {
  REAL t[V];
  memcpy(t, &raw, 16);
  QG_UNROLL for (int i = 0; i < V; i++) if (row.has(j * V + i)) to[j * V + i] = t[i];
}
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
QG_DEVICE float squares_any(const Row &row, int j, uint4 raw, float mean) {
  float h[V], sum = 0.f;
  widen(raw, h);
  QG_UNROLL for (int i = 0; i < V; i++) if (row.has(j * V + i)) sum += (h[i] - mean) * (h[i] - mean);
  return sum;
}

// sums, given_scale ... symmetric as in quantize_rows; layer: LayerNorm.
QG_KERNEL __launch_bounds__(BLOCK) norm_quantize(const REAL *x, const REAL *residual, const REAL *weight, const REAL *bias, REAL *h, REAL *y, uint8_t *q,
                                                 REAL *scale, uint8_t *zero, int *sums, const float *given_scale, const int *given_zero, int every, int rows,
                                                 int k, int low, int high, int symmetric, int layer, float eps) {
  int index = blockIdx.x * (BLOCK / LANES) + threadIdx.x / LANES;
  if (index >= rows) return;
  Row row(index, k);
  if (k % V) row.kept = 0;   // the weights' vectors are not the row's
  Norm norm{x + row.first, residual ? residual + row.first : nullptr, weight, bias, 0.f, 0.f};
  if (h) h += row.first;
  if (y) y += row.first;

  uint4 kept[KEEP];
  each_kept(row, [&](int i, int j) { kept[i] = norm.fetch(j); });
  if (h) {
    each_kept(row, [&](int i, int j) { store16(h + j * V, kept[i]); });
    each_from(row, row.kept, [&](int j) { store_any(row, h, j, norm.fetch_any(row, j)); });
  }
  if (layer) {
    float sum = 0.f;
    each_kept(row, [&](int i, int) { sum += total(kept[i]); });
    each_from(row, row.kept, [&](int j) { sum += total(norm.fetch_any(row, j)); });
    norm.mean = __fdiv_rn(reduce<LANES>(sum, Sum()), float(k));
  }
  float sum = 0.f;
  each_kept(row, [&](int i, int) { sum += squares(kept[i], norm.mean); });
  each_from(row, row.kept, [&](int j) { sum += squares_any(row, j, norm.fetch_any(row, j), norm.mean); });
  norm.inverse = __fdiv_rn(1.f, __fsqrt_rn(__fdiv_rn(reduce<LANES>(sum, Sum()), float(k)) + eps));

  each_kept(row, [&](int i, int j) {
    kept[i] = norm.normed(j, kept[i]);
    if (y) store16(y + j * V, kept[i]);
  });
  auto again = [&](int j) { return norm.normed_any(row, j); };
  if (y) each_from(row, row.kept, [&](int j) { store_any(row, y, j, again(j)); });
  quantize_row(index, row, kept, again, Quantization{q, scale, zero, sums, given_scale, given_zero, every, low, high, symmetric});
}
