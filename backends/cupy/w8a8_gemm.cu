// w8a8_gemm.cu -- y[M,N] = finish(sum_k X[m,k] W[n,k]) on int8 tensor cores; w8a8.cuh has `finish`.
//
//   X  [M, K] int8 (uint8 where UNSIGNED_X), W [N, K] int8, both with rows of K bytes, K a multiple of 16 (padded with zeros; x that is
//   not so is copied first, w8a8.py); M and N are any. y [M, N] of type OUT. Addresses of X, W and y are multiples of 16.
//
// Partition. Grid (tiles of M, tiles of N, splits of K); tiles of M are neighbours, so that blocks that run together read the same W.
//
//        K ->                                     one tile of y: WARPS_M x WARPS_N warps, here 2 x 2
//   X  +--------+--------+----              N ->  +-----------------+-----------------+
//   M  | TILE_M x TILE_K | ...                 M  | warp 0          | warp 1          |   WARP_M x WARP_N each, in fragments
//   |  +--------+--------+----                 |  +-----------------+-----------------+   of m16n8k32: WARP_M/16 x WARP_N/8
//   W  +--------+--------+----                 v  | warp 2          | warp 3          |   accumulators of 4 int32 in a lane
//   N  | TILE_N x TILE_K | ...                    +-----------------+-----------------+
//      stage 0    stage 1   (ring of STAGES in shared memory)
//
// Ladder: 1. one thread an output, bytes from global memory: each byte is read 2N or 2M times.  2. Tiles in shared memory: 128x less
// traffic.  3. mma m16n8k32 instead of dp4a: 8x the products an instruction.  4. ldmatrix instead of 4-byte loads: a fragment of A in one
// instruction.  5. Chunks of 16 bytes swizzled, so that the 8 rows of an ldmatrix phase lie in 8 different bank groups (no padding needed,
// which cp.async's 16-byte alignment would double).  6. cp.async into a ring of STAGES: the copy of tile t + STAGES - 1 runs behind the
// products of tile t, with one barrier a tile.  7. 64x64 warp tiles: 4096 bytes of shared memory are read for 131,072 products, 32 cycles
// of an sm_80 against 64 of its tensor cores (32x32 tiles would need as many as these).  8. K is split where tiles are fewer than
// multiprocessors: partial sums go to a workspace in fragment order (16 bytes a lane, coalesced), and the block that comes last adds them;
// integers add up to the same in any order.  9. The epilogue turns fragments into rows through shared memory, each warp on its own: a lane
// then keeps four columns, whose parameters it loads once, and neighbouring lanes store neighbouring 4, 8 or 16 bytes.
//
// CONV: a convolution without an im2col in memory. X is then an image [B, H, W, C], already padded, C a multiple of 16; row m of the matrix
// is what the kernel's window sees from result m = (b, h, w), its K = (tap down, tap right, c), as in W. A chunk of 16 bytes lies in
// one pixel, so that a row is a place in the image, and a tile of K a step from there that is the same for all rows.
//
// Macros: TILE_M, TILE_N, TILE_K (64 or 128), WARPS_M, WARPS_N, STAGES, BLOCKS (least to a multiprocessor), UNSIGNED_X, OUT, CONV.
#include "w8a8.cuh"
using namespace w8a8;

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N, FRAGMENTS_M = WARP_M / 16, FRAGMENTS_N = WARP_N / 8;
constexpr int CHUNKS = TILE_K / 16;                // 16-byte chunks in a row of a tile
constexpr int COPIED_ROWS = THREADS / CHUNKS;      // rows that the block copies at once
constexpr int A_BYTES = TILE_M * TILE_K, STAGE = A_BYTES + TILE_N * TILE_K;
constexpr int STRIDE = WARP_N + 8;                 // of the epilogue's rows in words: 8 modulo 32, so that 4 rows of pairs fill the banks
constexpr int LANES = WARP_N / 4;                  // lanes to an output row
static_assert(CHUNKS == 4 || CHUNKS == 8, "the swizzle knows rows of 64 and 128 bytes");
static_assert(COPIED_ROWS % 8 == 0 && TILE_M % COPIED_ROWS == 0 && TILE_N % COPIED_ROWS == 0, "every thread copies as many chunks");
static_assert(WARP_M % 16 == 0 && (WARP_N == 32 || WARP_N == 64), "whole fragments; the epilogue's stride");
static_assert(TILE_M <= THREADS, "a thread reads the parameters of one row");
static_assert(WARPS_M * WARPS_N * 16 * STRIDE * 4 + TILE_M * 12 <= STAGES * STAGE, "the epilogue reuses the ring");

using Sums = int[FRAGMENTS_M][FRAGMENTS_N][4];

#if CONV
// `pixels` results and `image` pixels to an image, `width` results to a row. Distances in pixels: `down` and `right` from a result to the
// next one, `tap_down` and `tap_right` from a tap to the next one, of `taps` in a row.
#define X_WINDOW , int channels, int pixels, int image, int width, int down, int right, int taps, int tap_down, int tap_right
#else
#define X_WINDOW
#endif

// Where chunk 0 of `row` lies within its row; chunk c is at this xor 16 c.
QG_DEVICE int swizzle(int row) { return 16 * (row / (8 / CHUNKS) % CHUNKS); }

// One tile of K: fragments by ldmatrix, FRAGMENTS_M * FRAGMENTS_N mma for each 32 of K. `a` and `b` point to the lane's row of the
// warp's first fragments, `at_a` and `at_b` are the lane's places in such a row at k = 0.
QG_DEVICE void multiply(Sums &sums, const unsigned char *a, int at_a, const unsigned char *b, int at_b) {
  QG_UNROLL for (int k = 0; k < TILE_K; k += 32) {
    unsigned fa[FRAGMENTS_M][4], fb[FRAGMENTS_N][2];
    QG_UNROLL for (int i = 0; i < FRAGMENTS_M; i++) ldmatrix4(fa[i], a + 16 * i * TILE_K + (at_a ^ k));
    QG_UNROLL for (int j = 0; j < FRAGMENTS_N; j += 2) {
      unsigned two[4];
      ldmatrix4(two, b + 8 * j * TILE_K + (at_b ^ k));
      fb[j][0] = two[0], fb[j][1] = two[1], fb[j + 1][0] = two[2], fb[j + 1][1] = two[3];
    }
    QG_UNROLL for (int i = 0; i < FRAGMENTS_M; i++)
      QG_UNROLL for (int j = 0; j < FRAGMENTS_N; j++) mma_int8<UNSIGNED_X>(sums[i][j], fa[i], fb[j]);
  }
}

// Split K: leaves this block's sums in the workspace; true for the block that came last, whose sums are then those of all. A lane's
// fragments are its own in every block, so no two lanes exchange anything. `before`: a word of shared memory.
QG_DEVICE bool sum_of_splits(Sums &sums, int *partial, int *arrived, int *before) {
  const int splits = gridDim.z;
  const size_t tile = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
  int *of_tile = partial + tile * splits * (TILE_M * TILE_N) + 4 * threadIdx.x, *mine = of_tile + (size_t)blockIdx.z * (TILE_M * TILE_N);
  QG_UNROLL for (int i = 0; i < FRAGMENTS_M; i++)
    QG_UNROLL for (int j = 0; j < FRAGMENTS_N; j++) store16(mine + 4 * THREADS * (i * FRAGMENTS_N + j), together<uint4>(sums[i][j]));
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *before = atomicAdd(arrived + tile, 1);
  __syncthreads();
  if (*before != splits - 1) return false;
  __threadfence();   // what the others wrote before they arrived is read behind this
  for (int z = 0; z < splits; z++) {
    if (z == blockIdx.z) continue;
    const int *other = of_tile + (size_t)z * (TILE_M * TILE_N);
    QG_UNROLL for (int i = 0; i < FRAGMENTS_M; i++) {
      QG_UNROLL for (int j = 0; j < FRAGMENTS_N; j++) {
        const uint4 v = load16(other + 4 * THREADS * (i * FRAGMENTS_N + j));
        sums[i][j][0] += v.x, sums[i][j][1] += v.y, sums[i][j][2] += v.z, sums[i][j][3] += v.w;
      }
      __syncwarp();   // no more loads in flight than these: all at once would need as many registers as the sums
    }
  }
  return true;
}

// Four results of one row, from column n on.
QG_DEVICE void finish_four(OUT *y, const Result<OUT> &result, uint4 sums, const Row &row, const Columns<4> &c, const float (&factor)[4],
                           int n, int N) {
  const int acc[4] = {(int)sums.x, (int)sums.y, (int)sums.z, (int)sums.w};
  OUT v[4];
  QG_UNROLL for (int i = 0; i < 4; i++) v[i] = result.of(corrected(acc[i], row, c, i), factor[i], c.bias[i]);
  if (N % 4 == 0) store_four(y, v);
  else QG_UNROLL for (int i = 0; i < 4; i++) if (n + i < N) y[i] = v[i];
}

QG_KERNEL __launch_bounds__(THREADS, BLOCKS) w8a8_gemm(OUT *y, const unsigned char *x, const unsigned char *w, int M, int N, int K,
                                                       int tiles_of_split, int *partial, int *arrived X_WINDOW, W8A8_FINISH) {
  QG_DYNAMIC_SHARED(shared);
  const Finish f W8A8_FINISH_GIVEN;
  const int thread = threadIdx.x, lane = thread % 32, warp_m = thread / 32 / WARPS_N, warp_n = thread / 32 % WARPS_N;
  const int m0 = blockIdx.x * TILE_M, n0 = blockIdx.y * TILE_N;
  const int first = blockIdx.z * tiles_of_split, tiles = min(tiles_of_split, (K + TILE_K - 1) / TILE_K - first);

  // Copies: this thread's chunk of rows copied, copied + COPIED_ROWS, ... Rows and chunks that do not exist become zeros.
  const int copied = thread / CHUNKS, chunk = 16 * (thread % CHUNKS), at = copied * TILE_K + (swizzle(copied) ^ chunk);
  const size_t step = (size_t)COPIED_ROWS * K;
  const unsigned char *from_b = w + (size_t)(n0 + copied) * K + chunk;
#if CONV
  int places[TILE_M / COPIED_ROWS];   // of rows of X, in chunks
  QG_UNROLL for (int i = 0; i < TILE_M / COPIED_ROWS; i++) {
    const int m = m0 + copied + i * COPIED_ROWS;
    places[i] = (m / pixels * image + m % pixels / width * down + m % pixels % width * right) * (channels / 16);
  }
  const int first_tap = (first * TILE_K + chunk) / channels;
  int channel = (first * TILE_K + chunk) % channels, tap_x = first_tap % taps, tap_y = first_tap / taps;   // of the next tile
#else
  const unsigned char *from_a = x + (size_t)(m0 + copied) * K + chunk;
#endif
  auto copy = [&](int tile, int slot) {   // tiles come one after the other
    unsigned char *to = shared + slot * STAGE + at;
    const bool inside = tile * TILE_K + chunk < K;
#if CONV
    const unsigned char *a = x + ((size_t)(tap_y * tap_down + tap_x * tap_right) * channels + channel);
    QG_UNROLL for (int i = 0, r = 0; r < TILE_M; i++, r += COPIED_ROWS)
      copy16_async(to + r * TILE_K, a + (size_t)places[i] * 16, inside && m0 + copied + r < M);
    for (channel += TILE_K; channel >= channels; channel -= channels)
      if (++tap_x == taps) tap_x = 0, tap_y++;
#else
    const unsigned char *a = from_a + (size_t)tile * TILE_K;
    QG_UNROLL for (int r = 0; r < TILE_M; r += COPIED_ROWS, a += step) copy16_async(to + r * TILE_K, a, inside && m0 + copied + r < M);
#endif
    const unsigned char *b = from_b + (size_t)tile * TILE_K;
    QG_UNROLL for (int r = 0; r < TILE_N; r += COPIED_ROWS, b += step)
      copy16_async(to + A_BYTES + r * TILE_K, b, inside && n0 + copied + r < N);
  };

  // Fragments: matrix lane / 8 of an ldmatrix4. A: rows +0, +8, then k + 16. B: k + 16 first, then rows + 8, for two fragments at once.
  const int row_a = warp_m * WARP_M + lane % 16, row_b = warp_n * WARP_N + lane % 8 + lane / 16 * 8;
  const int at_a = swizzle(row_a) ^ 16 * (lane / 16), at_b = swizzle(row_b) ^ 16 * (lane / 8 % 2);

  Sums sums = {};
  QG_UNROLL for (int t = 0; t < STAGES - 1; t++) {
    if (t < tiles) copy(first + t, t);
    copy_commit();
  }
  int slot = 0, next = STAGES - 1;
  for (int t = 0; t < tiles; t++) {
    copy_wait<STAGES - 2>();   // tile t is here
    __syncthreads();           // for all; and all have read tile t - 1, whose place the next copy takes
    if (t + STAGES - 1 < tiles) copy(first + t + STAGES - 1, next);
    copy_commit();
    const unsigned char *stage = shared + slot * STAGE;
    multiply(sums, stage + row_a * TILE_K, at_a, stage + A_BYTES + row_b * TILE_K, at_b);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
  }
  copy_wait<0>();
  if (gridDim.z > 1 && !sum_of_splits(sums, partial, arrived, reinterpret_cast<int *>(shared) + STAGES * STAGE / 4 - 1)) return;

  // Epilogue. The ring is free: rows' parameters, then 16 rows of sums for each warp.
  __syncthreads();
  Row *rows = reinterpret_cast<Row *>(shared + WARPS_M * WARPS_N * 16 * STRIDE * 4);
  if (thread < TILE_M && m0 + thread < M) rows[thread] = f.row(m0 + thread);
  __syncthreads();
  int *staged = reinterpret_cast<int *>(shared) + (warp_m * WARPS_N + warp_n) * 16 * STRIDE;
  const int column = lane % LANES * 4, n = n0 + warp_n * WARP_N + column;
  const Result<OUT> result(f);
  Columns<4> c = {};
  if (n < N) c = f.columns4(n);
  float factor[4];
  // Of every row, where x has one scale.
  QG_UNROLL for (int i = 0; i < 4; i++) factor[i] = result.factor(__fmul_rn(rows[0].scale, c.scale[i]));
  QG_UNROLL for (int i = 0; i < FRAGMENTS_M; i++) {
    QG_UNROLL for (int j = 0; j < FRAGMENTS_N; j++) {
      int *to = staged + lane / 4 * STRIDE + 8 * j + lane % 4 * 2;
      store8(to, make_uint2(sums[i][j][0], sums[i][j][1]));
      store8(to + 8 * STRIDE, make_uint2(sums[i][j][2], sums[i][j][3]));
    }
    __syncwarp();
#pragma unroll 1
    for (int r = lane / LANES; r < 16; r += 32 / LANES) {
      const int local = warp_m * WARP_M + 16 * i + r, m = m0 + local;
      if (m >= M || n >= N) continue;
      const Row of = rows[local];
      if (f.is(SCALE_PER_TOKEN))
        QG_UNROLL for (int e = 0; e < 4; e++) factor[e] = result.factor(__fmul_rn(of.scale, c.scale[e]));
      finish_four(y + (size_t)m * N + n, result, load16(staged + r * STRIDE + column), of, c, factor, n, N);
    }
    __syncwarp();
  }
}
