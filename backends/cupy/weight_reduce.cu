// weight_reduce.cu -- y[M,N] = row[n] * (sum over splits of partial[split][m][n]) + bias[n]: ends a product whose K was split over blocks.
//
// Grid (M / 8, N / 256). A thread has two neighbouring outputs (N is even) of ROWS rows, so that row[n] and bias[n] are read once for them,
// and 8 bytes at a time; neighbours read neighbours. The order of the sum is that of the splits, whatever block finished first, so results
// repeat. (A last block that waits for the others by an atomic counter would save this launch, but its counters have to be cleared: a
// launch, too.)
//
// Macro: OUT (float, half or bfloat16), the type of y.
#include "qg.cuh"
using namespace qg;

constexpr int THREADS = 128, ROWS = 8;
struct Two { OUT first, second; };

QG_KERNEL __launch_bounds__(THREADS) weight_reduce(
    const float *__restrict__ partial, const float *__restrict__ row, const float *__restrict__ bias, OUT *__restrict__ y, int m, int n,
    int splits) {
  const int at = 2 * (blockIdx.y * THREADS + threadIdx.x), first = blockIdx.x * ROWS;
  if (at >= n) return;
  const size_t size = (size_t)m * n, i = (size_t)first * n + at;
  float2 sum[ROWS] = {};
  for (int s = 0; s < splits; s++) QG_UNROLL for (int r = 0; r < ROWS; r++) if (first + r < m) {
    const float2 part = bits<float2>(load8(partial + s * size + i + (size_t)r * n));
    sum[r].x += part.x, sum[r].y += part.y;
  }
  const float2 scale = bits<float2>(load8(row + at)), shift = bias ? bits<float2>(load8(bias + at)) : float2{0, 0};
  QG_UNROLL for (int r = 0; r < ROWS; r++) if (first + r < m) {
    const Two found = {from_float<OUT>(sum[r].x * scale.x + shift.x), from_float<OUT>(sum[r].y * scale.y + shift.y)};
    OUT *to = y + i + (size_t)r * n;
    if constexpr (sizeof(OUT) == 4) store8(to, bits<uint2>(found));
    else store4(to, bits<uint32_t>(found));
  }
}
