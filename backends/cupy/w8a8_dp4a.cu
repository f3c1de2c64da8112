// w8a8_dp4a.cu -- y[M,N] = finish(sum_k X[m,k] W[n,k]) with dp4a: M <= 8, where reading W is all the time there is, and all M on sm_75.
//
//   X [M, K] int8 or uint8, W [N, K] int8, K a multiple of 16 (padded with zeros), y [M, N]; addresses are multiples of 16.
//
// Partition. Grid (columns of y, groups of ROWS rows). A block has 8 or 16 warps of 4 outputs each, and goes through its columns in
// `rounds` of so many; the lanes of a warp share out K:
//
//                K ->  lane 0 | lane 1 | ... | lane 31 | lane 0 | ...     16 bytes each
//   W   n + 0         [======= 512 bytes of one row ===][=======          4 loads of 16 bytes, kept out of L1
//       n + 1..3      ...
//   X   ROWS rows     staged in shared memory for all warps, CHUNK bytes of each at once; for all rounds, if that is all of K
//
// Ladder: 1. A thread an output: neighbouring lanes read addresses K apart.  2. A warp an output: coalesced, but x comes from memory for
// each.  3. x staged for the B outputs of a block: its traffic is M / B of W's.  4. Four outputs to a warp: four loads in flight and each
// byte of x is read from shared memory once for four.  5. ROWS rows at once: W is read once for all of them.  6. The 4 * ROWS sums of a
// warp are reduced together: each step halves what a lane holds, 31 shuffles for 32 sums instead of 160, and ends with one sum a lane.
// 7. Sums meet in shared memory, so that a thread finishes a column, and whole sectors of parameters and of y are read and written once.
// 8. Wide blocks for several rows where N is large (`vectors` in w8a8.py): B = 64, and up to three rounds.
//
// Traffic over the least possible, with every block's reads of x counted (they hit the second-level cache: memory sees x once), for N x K
// and 108 multiprocessors:
//
//          1536 x 576   4096 x 4096   14336 x 4096
//   M = 1        1.05          1.03           1.03      N / B blocks read x, M K bytes, N / B - 1 times more than they must: less than
//   M = 2        1.08          1.03           1.02      a twentieth of N K if they are 1 + N / (20 M) at most. For M = 8 that is 7 blocks
//   M = 4        1.14          1.06           1.03      for N = 1024 and 26 for 4096, which would leave most multiprocessors idle, and
//   M = 8        1.26          1.13           1.05      splitting K in s instead moves 8 s M N bytes of sums: as much. So there the bound
//                                                       is missed on purpose.
//
// Macros: ROWS (1, 2, 4, 8).
#include "w8a8.cuh"
using namespace w8a8;

constexpr int OUTPUTS = 4, SUMS = ROWS * OUTPUTS;   // of a warp; of a lane
constexpr int THREADS = ROWS == 1 ? 256 : 512;      // at most
constexpr int ROUNDS = ROWS == 1 ? 1 : 3;           // at most: w8a8.py's
constexpr int CHUNK = ROWS <= 4 ? 8192 : 5120;      // with the sums, 48 KiB at most: blocks of 8 warps have room for two in 100 KiB
constexpr int PITCH = SUMS | 4;                     // of a warp's sums, so that the finishing threads meet all banks
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

// Column n of `count` rows of y, from their sums [ROWS][OUTPUTS].
template <class Out> QG_DEVICE void finish(Out *y, const Finish &f, const int *sums, const Row *rows, int count, int n, int N) {
  const Columns<1> c = f.column(n);
  const Result<Out> result(f);
  for (int r = 0; r < count; r++) {
    const int sum = corrected(sums[r * OUTPUTS], rows[r], c, 0);
    y[(size_t)r * N + n] = result.of(sum, result.factor(__fmul_rn(rows[r].scale, c.scale[0])), c.bias[0]);
  }
}

// x[m0 .. m0 + ROWS)[k .. k + bytes) to shared memory, zeros where there are no rows.
QG_DEVICE void stage(unsigned char *staged, const unsigned char *x, int m0, int M, int k, int bytes, int K) {
  for (int i = threadIdx.x; i < ROWS * (CHUNK / 16); i += blockDim.x) {
    const int r = i / (CHUNK / 16), at = i % (CHUNK / 16) * 16;
    if (at < bytes) store16(staged + r * CHUNK + at, m0 + r < M ? load16(x + (size_t)(m0 + r) * K + k + at) : make_uint4(0, 0, 0, 0));
  }
}

QG_KERNEL __launch_bounds__(THREADS, ROWS == 1 ? 3 : 1) w8a8_dp4a(void *y, const unsigned char *x, const unsigned char *w, int M, int N,
                                                                   int K, int rounds, W8A8_FINISH) {
  __shared__ __align__(16) unsigned char staged[ROWS * CHUNK];
  __shared__ int found[ROUNDS * (THREADS / 32) * PITCH];   // sums of each round and warp: [ROWS][OUTPUTS]
  __shared__ Row parameters[ROWS];
  const Finish f W8A8_FINISH_GIVEN;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, m0 = blockIdx.y * ROWS, count = min(ROWS, M - m0);
  if (threadIdx.x < count) parameters[threadIdx.x] = f.row(m0 + threadIdx.x);
  const int columns = rounds * warps * OUTPUTS, first = blockIdx.x * columns;
  for (int slot = warp; slot < rounds * warps; slot += warps) {
    const unsigned char *rows[OUTPUTS];   // beyond N: one that exists
    QG_UNROLL for (int o = 0; o < OUTPUTS; o++) rows[o] = w + (size_t)min(first + slot * OUTPUTS + o, N - 1) * K;
    int sums[SUMS] = {};
    for (int k = 0; k < K; k += CHUNK) {
      const int bytes = min(CHUNK, K - k);
      if (K > CHUNK || slot == warp) {   // not there yet
        __syncthreads();
        stage(staged, x, m0, M, k, bytes, K);
        __syncthreads();
      }
      if (f.is(X_UNSIGNED)) multiply<true>(sums, staged, rows, bytes, lane);
      else multiply<false>(sums, staged, rows, bytes, lane);
      QG_UNROLL for (int o = 0; o < OUTPUTS; o++) rows[o] += CHUNK;
    }
    const int sum = reduce(sums, lane);
    if (lane % (32 / SUMS) == 0) found[slot * PITCH + lane / (32 / SUMS)] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < min(columns, N - first); i += blockDim.x) {
    const int *sums = found + i / OUTPUTS * PITCH + i % OUTPUTS;
    const int n = first + i;
    const size_t to = (size_t)m0 * N;
    if (y_scale != nullptr) finish((uint8_t *)y + to, f, sums, parameters, count, n, N);
    else if (f.y_type() == HALF) finish((__half *)y + to, f, sums, parameters, count, n, N);
    else if (f.y_type() == BFLOAT) finish((__nv_bfloat16 *)y + to, f, sums, parameters, count, n, N);
    else finish((float *)y + to, f, sums, parameters, count, n, N);
  }
}

// sums[m] = sum_k X[m,k], for weights with zero points: a warp a row, 16 bytes a lane.
QG_KERNEL __launch_bounds__(256) w8a8_row_sums(int *sums, const unsigned char *x, int M, int K, int x_unsigned) {
  const int lane = threadIdx.x % 32, m = blockIdx.x * 8 + threadIdx.x / 32;
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
