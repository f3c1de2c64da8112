// act_quantize.cu -- y = act(gate) * up; integers of y, in one kernel: what stands between the two halves of a gated feed-forward block.
//
//     GELU=0   act(g) = g / (1 + exp(-g (a + b g^2)))    SiLU: a = 1, b = 0;  GELU by tanh: a = 2 sqrt(2 / pi), b = .044715 a,
//                                                        for (1 + tanh z) / 2 = 1 / (1 + exp(-2 z))
//     GELU=1   act(g) = g (1 + erf(g / sqrt(2))) / 2
//
// A team of LANES threads a row, as in quantize.cu; y stays in registers until its range is known:
//
//     gate --16 bytes a thread-->
//                                  y --reduce--> range --> integers --> memory
//     up   --16 bytes a thread-->
//
// Ladder. 1. Activation, product, quantization apart: 4 + 6 + 5 bytes an element in half precision (and 3 more for the range). 2. (this)
// One: 5 bytes. exp is the device's fast one (__expf), off by some 2^-21 of the result where |g| < 16; far below the integers' step.
//
// Computed in float32; act(g) and y are rounded to REAL, as between separate operations. gate, up [rows, k] with their strides in elements
// (halves of one matrix, say), up may be null; any k. REAL, LANES, KEEP: see rows.cuh.
#include "rows.cuh"

using namespace qg;

struct Gated {
  const REAL *gate, *up;   // vector 0 of the row
  float a, b;

  QG_DEVICE float act(float g) const {
#if GELU
    return 0.5f * g * (1.f + erff(g * 0.70710678f));
#else
    return __fdividef(g, 1.f + __expf(-g * (a + b * fminf(g * g, 1e30f))));   // no 0 * inf
#endif
  }
  QG_DEVICE uint4 of(uint4 raw_gate, uint4 raw_up) const {
    float g[V], u[V];
    widen(raw_gate, g), widen(raw_up, u);
    QG_UNROLL for (int i = 0; i < V; i++) {
      g[i] = act(g[i]);
      if (up) g[i] = rounded(g[i]) * u[i];
    }
    return narrow(g);
  }
  QG_DEVICE float element(int e) const {
    float y = act(to_float(gate[e]));
    return rounded(up ? rounded(y) * to_float(up[e]) : y);
  }
};

// sums, given_scale ... symmetric as in quantize_rows.
QG_KERNEL __launch_bounds__(BLOCK)
act_quantize(const REAL *gate, const REAL *up, uint8_t *q, REAL *scale, uint8_t *zero, int *sums, const float *given_scale,
             const int *given_zero, int every, int rows, int k, int gate_stride, int up_stride, int low, int high, int symmetric, float a,
             float b) {
  int index = blockIdx.x * (BLOCK / LANES) + threadIdx.x / LANES;
  if (index >= rows) return;
  Row row(index, k);
  Gated y{gate + row.first + size_t(index) * (gate_stride - k), up ? up + row.first + size_t(index) * (up_stride - k) : nullptr, a, b};
  uint4 kept[KEEP], other[KEEP];   // loads first, so that all are on their way
  each_kept(row, [&](int i, int j) {
    kept[i] = load16_stream(y.gate + j * V);
    other[i] = up ? load16_stream(y.up + j * V) : uint4{};
  });
  each_kept(row, [&](int i, int) { kept[i] = y.of(kept[i], other[i]); });
  auto element = [&](int e) { return y.element(e); };
  quantize_row(index, row, kept, element, Quantization{q, scale, zero, sums, given_scale, given_zero, every, low, high, symmetric});
}
