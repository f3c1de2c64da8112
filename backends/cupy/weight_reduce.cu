// weight_reduce.cu -- y[M,N] = row[n] * (sum over splits of partial[split][m][n]) + bias[n]: ends a product whose K was split over blocks.
//
// Grid (M, N / 256). One thread an output; neighbours read neighbours. The order of the sum is that of the splits, whatever block finished
// first, so results repeat. (A last block that waits for the others by an atomic counter would save this launch, but its counters have to
// be cleared: a launch, too.)
//
// Macro: OUT (float, half or bfloat16), the type of y.
#include "qg.cuh"
using namespace qg;

constexpr int THREADS = 256;

QG_KERNEL __launch_bounds__(THREADS) weight_reduce(
    const float *__restrict__ partial, const float *__restrict__ row, const float *__restrict__ bias, OUT *__restrict__ y, int m, int n,
    int splits) {
  const int at = blockIdx.y * THREADS + threadIdx.x;
  if (at >= n) return;
  const size_t size = (size_t)m * n, i = (size_t)blockIdx.x * n + at;
  float sum = 0;
  for (int s = 0; s < splits; s++) sum += partial[s * size + i];
  y[i] = from_float<OUT>(sum * row[at] + (bias ? bias[at] : 0.f));
}
