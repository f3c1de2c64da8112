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
// weight, bias, h, y may be null. Any k: where it is no multiple of 16 bytes, a row and its weights are aligned differently,
// and each pass reads the row again, element by element.
// REAL, LANES, KEEP: see rows.cuh.
#include "rows.cuh"

using namespace qg;

struct Norm {
  const REAL *x, *residual;   // vector 0 of the row
  const REAL *weight, *bias;
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
  QG_DEVICE float normed_element(const Row &row, int e) const {
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

// sums, given_scale ... symmetric as in quantize_rows; layer: LayerNorm. One block an SM at least: asked for nothing,
// the compiler spills registers to let in more.
QG_KERNEL __launch_bounds__(BLOCK, 1)
norm_quantize(const REAL *x, const REAL *residual, const REAL *weight, const REAL *bias, REAL *h, REAL *y, uint8_t *q, REAL *scale,
              uint8_t *zero, int *sums, const float *given_scale, const int *given_zero, int every, int rows, int k, int low, int high,
              int symmetric, int layer, float eps) {
  int index = blockIdx.x * (BLOCK / LANES) + threadIdx.x / LANES;
  if (index >= rows) return;
  Row row(index, k);
  if (k % V) row = row.without_vectors();   // they are not the weights'
  Norm norm{x + row.first, residual ? residual + row.first : nullptr, weight, bias, 0.f, 0.f};
  if (h) h += row.first;
  if (y) y += row.first;

  uint4 kept[KEEP];
  each_kept(row, [&](int i, int j) { kept[i] = norm.fetch(j); });
  if (h) {
    each_kept(row, [&](int i, int j) { store16(h + j * V, kept[i]); });
    each_rest(row, [&](int e) { h[e] = from_float<REAL>(norm.element(e)); });
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

  auto element = [&](int e) { return norm.normed_element(row, e); };
  each_kept(row, [&](int i, int j) { kept[i] = norm.normed(j, kept[i]); });
  if (y) {
    each_kept(row, [&](int i, int j) { store16(y + j * V, kept[i]); });
    each_rest(row, [&](int e) { y[e] = from_float<REAL>(element(e)); });
  }
  quantize_row(index, row, kept, element, Quantization{q, scale, zero, sums, given_scale, given_zero, every, low, high, symmetric});
}
