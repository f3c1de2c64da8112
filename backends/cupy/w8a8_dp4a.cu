// w8a8_dp4a.cu -- y[M,N] = finish(sum_k X[m,k] W[n,k]) with dp4a: M <= 8, where reading W is all the time there is, and all M on sm_75.
//
//   X [M, K] int8 or uint8, W [N, K] int8, K a multiple of 16 (padded with zeros), y [M, N]; addresses are multiples of 16.
//
// Partition. Grid (groups of 32 outputs, groups of ROWS rows); 8 warps of 4 outputs; the lanes of a warp share out K:
//
//                K ->  lane 0 | lane 1 | ... | lane 31 | lane 0 | ...     16 bytes each
//   W   n + 0         [======= 512 bytes of one row ===][=======          4 loads of 16 bytes, kept out of L1
//       n + 1..3      ...
//   X   ROWS rows     staged in shared memory, CHUNK bytes of each at once, for the 32 outputs of the block
//
// Ladder: 1. A thread an output: neighbouring lanes read addresses K apart.  2. A warp an output: coalesced, but x comes from memory for
// each.  3. x staged for 32 outputs: its traffic is M / 32 of W's.  4. Four outputs to a warp: four loads in flight and each byte of x is
// read from shared memory once for four.  5. ROWS rows at once: W is read once for all of them.  6. The 4 * ROWS sums of a
// warp are reduced together: each step halves what a lane holds, 31 shuffles for 32 sums instead of 160, and ends with one sum a lane.
//
// Macros: ROWS (1, 2, 4, 8).
#include "w8a8.cuh"
using namespace w8a8;

constexpr int WARPS = 8, OUTPUTS = 4, THREADS = 32 * WARPS, SUMS = ROWS * OUTPUTS;
constexpr int CHUNK = ROWS <= 4 ? 4096 : 2048;
static_assert(SUMS <= 32 && (SUMS & (SUMS - 1)) == 0, "a lane ends with one sum");

// sums[r * OUTPUTS + o] of all lanes added up: lane l gets that of index l / (32 / SUMS).
QG_DEVICE int reduce(int (&sums)[SUMS], int lane) {
  int held = SUMS;
  QG_UNROLL for (int o = 16; o > 0; o >>= 1) {
    if (held > 1) {
      held /= 2;
      const bool upper = lane & o;
      QG_UNROLL for (int i = 0; i < SUMS / 2; i++) if (i < held) {
        const int sent = upper ? sums[i] : sums[i + held], kept = upper ? sums[i + held] : sums[i];
        sums[i] = kept + __shfl_xor_sync(ALL, sent, o);
      }
    } else {
      sums[0] += __shfl_xor_sync(ALL, sums[0], o);
    }
  }
  return sums[0];
}

// The products of one staged chunk: `bytes` of it exist.
template <bool UNSIGNED>
QG_DEVICE void multiply(int (&sums)[SUMS], const unsigned char *staged, const unsigned char *const (&w)[OUTPUTS], int bytes, int lane) {
#pragma unroll 2
  for (int k = 16 * lane; k < bytes; k += 512) {
    uint4 weights[OUTPUTS];
    QG_UNROLL for (int o = 0; o < OUTPUTS; o++) weights[o] = load16_stream(w[o] + k);
    QG_UNROLL for (int r = 0; r < ROWS; r++) {
      const uint4 v = load16(staged + r * CHUNK + k);
      QG_UNROLL for (int o = 0; o < OUTPUTS; o++) {
        int &s = sums[r * OUTPUTS + o];
        s = dp4a<UNSIGNED>(v.x, weights[o].x, s);
        s = dp4a<UNSIGNED>(v.y, weights[o].y, s);
        s = dp4a<UNSIGNED>(v.z, weights[o].z, s);
        s = dp4a<UNSIGNED>(v.w, weights[o].w, s);
      }
    }
  }
}

template <class Out> QG_DEVICE Out result(const Finish &f, int sum, int m, int n) {
  const Row row = f.row(m);
  const Columns<1> c = f.column(n);
  const Result<Out> result(f);
  return result.of(corrected(sum, row, c, 0), result.factor(__fmul_rn(row.scale, c.scale[0])), c.bias[0]);
}

QG_KERNEL __launch_bounds__(THREADS, 2) w8a8_dp4a(void *y, const unsigned char *x, const unsigned char *w, int M, int N, int K,
                                                        W8A8_FINISH) {
  __shared__ __align__(16) unsigned char staged[ROWS * CHUNK];
  const Finish f W8A8_FINISH_GIVEN;
  const int lane = threadIdx.x % 32, n0 = (blockIdx.x * WARPS + threadIdx.x / 32) * OUTPUTS, m0 = blockIdx.y * ROWS;
  const unsigned char *rows[OUTPUTS];
  QG_UNROLL for (int o = 0; o < OUTPUTS; o++) rows[o] = w + (size_t)min(n0 + o, N - 1) * K;   // beyond N: a row that exists, not stored
  int sums[SUMS] = {};
  for (int k = 0; k < K; k += CHUNK) {
    const int bytes = min(CHUNK, K - k);
    if (k > 0) __syncthreads();
    for (int i = threadIdx.x; i < ROWS * (CHUNK / 16); i += THREADS) {
      const int r = i / (CHUNK / 16), at = i % (CHUNK / 16) * 16;
      if (at < bytes) store16(staged + r * CHUNK + at, m0 + r < M ? load16(x + (size_t)(m0 + r) * K + k + at) : make_uint4(0, 0, 0, 0));
    }
    __syncthreads();
    if (f.is(X_UNSIGNED)) multiply<true>(sums, staged, rows, bytes, lane);
    else multiply<false>(sums, staged, rows, bytes, lane);
    QG_UNROLL for (int o = 0; o < OUTPUTS; o++) rows[o] += CHUNK;
  }
  const int sum = reduce(sums, lane), index = lane / (32 / SUMS), m = m0 + index / OUTPUTS, n = n0 + index % OUTPUTS;
  if (lane % (32 / SUMS) != 0 || m >= M || n >= N) return;
  const size_t to = (size_t)m * N + n;
  if (y_scale != nullptr) ((uint8_t *)y)[to] = result<uint8_t>(f, sum, m, n);
  else if (f.y_type() == HALF) ((__half *)y)[to] = result<__half>(f, sum, m, n);
  else if (f.y_type() == BFLOAT) ((__nv_bfloat16 *)y)[to] = result<__nv_bfloat16>(f, sum, m, n);
  else ((float *)y)[to] = result<float>(f, sum, m, n);
}

// sums[m] = sum_k X[m,k], for weights with zero points: a warp a row, 16 bytes a lane.
QG_KERNEL __launch_bounds__(THREADS) w8a8_row_sums(int *sums, const unsigned char *x, int M, int K, int x_unsigned) {
  const int lane = threadIdx.x % 32, m = blockIdx.x * WARPS + threadIdx.x / 32;
  if (m >= M) return;
  int sum = 0;
#pragma unroll 2
  for (int k = 16 * lane; k < K; k += 512) {
    const uint4 v = load16(x + (size_t)m * K + k);
    const uint32_t four[4] = {v.x, v.y, v.z, v.w}, ones = 0x01010101;
    QG_UNROLL for (int i = 0; i < 4; i++) sum = x_unsigned ? dp4a<true>(four[i], ones, sum) : dp4a<false>(four[i], ones, sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) sums[m] = sum;
}
