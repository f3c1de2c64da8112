// weight_gemm.cu -- y[M,N] = x . W^T + bias on tensor cores, x half or bfloat16, weights of 2, 3, 4 or 8 bits (layout: weight_codes.cuh).
//
//   x [M, K], K a multiple of 8, 16-byte aligned; y [M, N] of type OUT, or partial [splits, M, N] float, which weight_reduce adds;
//   ratio [groups, padded N] half or float; row and bias [padded N] float. M is any, N even.
//
// Partition. Grid (tiles of M, tiles of 128 outputs, splits of K); tiles of M are neighbours, so that blocks that run together read the
// same weights. The product is y^T = W x^T: W is the A of mma.m16n8k16, so that few rows of x waste little (tiles have 8 or more, not 16).
//
//              K ->                                       one tile of y^T: 4 warps, one above the other
//   codes  +---------+---------+----                        TILE_M rows of x ->
//   128    | BITS kB | stage 1 | ...                  N   +-------------------+
//   x      +---------+---------+----                  |   | warp 0: 32        |  2 fragments of W, each for TILE_M / 8
//   TILE_M | x 64    |         | ...                  v   | warp 1: 32        |  accumulators of 4 floats
//   ratio  +---------+---------+----                      | ...               |
//          ring of STAGES in shared memory                +-------------------+
//
// A code is read from shared memory and decoded by one warp only, once for TILE_M rows.
//
// Ladder: 1. dequantize to half in memory, then a half GEMM: 8 times the bytes at 4 bits.  2. Decode in the kernel, to shared memory: the
// weight passes it three times.  3. The fragment-ordered layout: a lane reads 16 bytes that are its fragments of four steps, decodes them
// in registers, and hands them to mma; neither ldmatrix nor shuffles, no bank conflicts.  4. lop3 with magic numbers: (code | 0x6400) is
// the half 1024 + code, (code << 4 | 0x6400) is 1024 + 16 code: 13 instructions for 8 weights. bfloat16 has bits for 128 + code only, and
// too few for a scale: 20.
// 5. x by cp.async, in chunks of 16 bytes swizzled by row, and ldmatrix: no bank conflicts.  6. cp.async into a ring of STAGES with one
// barrier a stage; scales and zero points of a group come with the first stage that needs them, in a ring of their own.
// 7. Split K where the tiles are fewer than the multiprocessors: sums of floats in a fixed order, by a second kernel.
//
// The weight is rounded to x's type once, after the product with its ratio, as the reference rounds it; `row`, the rest of the scale, is a
// factor of the float sums.
//
// Macros: BITS, TILE_M (8, 32, 128), STAGES, BLOCKS (least to a multiprocessor), REAL (type of x), SCALE (type of ratio), OUT (type of y).
#include "weight_codes.cuh"
using namespace codes;

constexpr int WARPS = 4, THREADS = 32 * WARPS, TILE_N = 32 * WARPS;
constexpr int X_BYTES = TILE_M * 128, CODE_BYTES = TILE_N / 64 * SQUARE, STAGE = X_BYTES + CODE_BYTES;
constexpr int GROUPS = 2 * STAGES;   // of the stages under way at most: a group has 32 inputs or more
constexpr int RATIO_BYTES = TILE_N * sizeof(SCALE);
constexpr int LOW = BITS == 8 ? 16 : BITS == 4 ? 8 : 4;   // words of a lane's two tiles in a square
static_assert(TILE_M == 8 || TILE_M % 16 == 0, "ldmatrix reads 16 rows of x, or 8 for two steps");

struct Matrices {
  const REAL *x; const unsigned char *packed; const SCALE *ratio; const uint8_t *zeros;
  int m, k, m0, n0, padded_n, squares, zero; float inverse;
};
struct Ring { unsigned char *stages, *ratio, *zeros; };   // STAGES x (x, codes); GROUPS x ratio; GROUPS x zeros

// Starts the copies of square q into `slot` of the ring. `fresh`: nothing of its first group has been copied yet.
QG_DEVICE void copy(const Ring &ring, const Matrices &a, int q, int slot, bool fresh) {
  unsigned char *stage = ring.stages + slot * STAGE;
  const int row = threadIdx.x / 8, chunk = threadIdx.x % 8, at = 64 * q + 8 * chunk;   // rows 16 apart have the same swizzle
  QG_UNROLL for (int i = 0; i < (TILE_M + 15) / 16; i++) {
    if (TILE_M < 16 && row >= TILE_M) break;
    const bool inside = a.m0 + row + 16 * i < a.m && at < a.k;
    const REAL *from = inside ? a.x + (size_t)(a.m0 + row + 16 * i) * a.k + at : a.x;
    copy16_async(stage + 128 * (row + 16 * i) + 16 * (chunk ^ (row & 7)), from, inside);
  }
  QG_UNROLL for (int block = 0; block < TILE_N / 64; block++) {
    const bool inside = a.n0 + 64 * block < a.padded_n;
    const unsigned char *from = a.packed + (inside ? ((size_t)(a.n0 / 64 + block) * a.squares + q) * SQUARE : 0);
    QG_UNROLL for (int first = 0; first < SQUARE; first += 16 * THREADS) {
      const int i = first + 16 * threadIdx.x;
      if (i < SQUARE) copy16_async(stage + X_BYTES + block * SQUARE + i, from + i, inside);
    }
  }
#pragma unroll 1   // none in most stages
  for (int g = fresh ? group_of(2 * q, a.inverse) : group_of(2 * q - 1, a.inverse) + 1; g <= group_of(2 * q + 1, a.inverse); g++) {
    const int i = threadIdx.x;
    const size_t line = (size_t)g * a.padded_n + a.n0;
    if (i < RATIO_BYTES / 16) {
      const int n = i * 16 / sizeof(SCALE);
      const bool inside = a.n0 + n < a.padded_n;
      copy16_async(ring.ratio + g % GROUPS * RATIO_BYTES + 16 * i, inside ? a.ratio + line + n : a.ratio, inside);
    } else if (a.zeros && i >= THREADS - TILE_N / 16) {
      const int n = 16 * (i - (THREADS - TILE_N / 16));
      const bool inside = a.n0 + n < a.padded_n;
      copy16_async(ring.zeros + g % GROUPS * TILE_N + n, inside ? a.zeros + line + n : a.zeros, inside);
    }
  }
}

// weight = (magic number and code - offset) * (scale + rest), for outputs 2g and 2g + 1 of a tile: two 16-bit floats each, or (bfloat16
// of 8 bits, whose codes have more bits than its magic number leaves) a float. `rest` is what bfloat16 cuts off the scale.
struct Affine { uint32_t offset[2], scale[2], rest[2]; };

QG_DEVICE Affine affine(const SCALE *ratio, const uint8_t *zeros, int zero) {
  const float2 s = two_scales(ratio);
  const Zeros z = zeros ? two_zeros(zeros) : Zeros{zero, zero};
  if constexpr (BITS == 8 && !IS_HALF<REAL>)
    return {{bits<uint32_t>(32768.f + z.first), bits<uint32_t>(32768.f + z.second)}, {bits<uint32_t>(s.x), bits<uint32_t>(s.y)}, {}};
  constexpr unsigned magic = IS_HALF<REAL> ? 0x6400 : 0x4300;
  constexpr int up = IS_HALF<REAL> && BITS != 8 ? 16 : 1;   // the second output's codes stay four bits higher
  const float second = s.y * (1.f / up);
  return {{(magic + z.first) * 0x10001u, (magic + up * z.second) * 0x10001u},
          {both<REAL>(s.x), both<REAL>(second)},
          {both<REAL>(s.x - to_float(from_float<REAL>(s.x))), both<REAL>(second - to_float(from_float<REAL>(second)))}};
}

// The fragment of (tile j, step s) as 16-bit floats.
QG_DEVICE void decode(unsigned (&a)[4], const uint32_t *low, const uint32_t *high, int j, int s, const Affine &f) {
  if constexpr (BITS == 8) {
    QG_UNROLL for (int i = 0; i < 4; i++) {
      const uint32_t word = low[8 * j + 2 * s + i / 2];
      const int o = i & 1;
      if constexpr (IS_HALF<REAL>) a[i] = __byte_perm(word, 0x64646464u, o ? 0x4342 : 0x4140);
      else {
        float v[2];
        QG_UNROLL for (int e = 0; e < 2; e++) {
          const float code = bits<float>(__byte_perm(word, 0x47u, 0x4505u | (2 * o + e) << 4));   // 32768 + code
          v[e] = (code - bits<float>(f.offset[o])) * bits<float>(f.scale[o]);
        }
        a[i] = two<REAL>(v[0], v[1]);
      }
    }
    if constexpr (!IS_HALF<REAL>) return;
  } else {
    uint32_t word = nibbles(low, high, j, s);
    QG_UNROLL for (int i = 0; i < 4; i++) {
      if constexpr (IS_HALF<REAL>) a[i] = lop3<AND_OR>(i < 2 ? word : word >> 8, i & 1 ? 0x00f000f0u : 0x000f000fu, 0x64006400u);
      else a[i] = lop3<AND_OR>(word >> 4 * i, 0x000f000fu, 0x43004300u);
    }
  }
  QG_UNROLL for (int i = 0; i < 4; i++) {
    const uint32_t whole = sub2<REAL>(a[i], f.offset[i & 1]);
    if constexpr (IS_HALF<REAL>) a[i] = mul2<REAL>(whole, f.scale[i & 1]);
    else a[i] = fma2<REAL>(whole, f.scale[i & 1], mul2<REAL>(whole, f.rest[i & 1]));
  }
}

using Sums = float[2][TILE_M / 8][4];

// The products of square q, which lies in `slot`.
QG_DEVICE void multiply(Sums &sum, const Ring &ring, const Matrices &a, int q, int slot) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n = 32 * warp + 2 * (lane >> 2);
  const unsigned char *stage = ring.stages + slot * STAGE, *square = stage + X_BYTES + warp / 2 * SQUARE + 16 * lane;
  uint32_t low[LOW], high[2];
  QG_UNROLL for (int v = 0; v < LOW / 4; v++) {
    const uint4 raw = load16(square + (warp % 2 * (LOW / 4) + v) * VECTOR);
    low[4 * v] = raw.x, low[4 * v + 1] = raw.y, low[4 * v + 2] = raw.z, low[4 * v + 3] = raw.w;
  }
  if constexpr (BITS == 3) {
    const uint4 raw = load16(square + 2 * VECTOR);
    high[0] = warp % 2 ? raw.z : raw.x, high[1] = warp % 2 ? raw.w : raw.y;
  }
  const int groups[2] = {group_of(2 * q, a.inverse), group_of(2 * q + 1, a.inverse)};
  Affine f[2];
  QG_UNROLL for (int h = 0; h < 2; h++) {   // 32 inputs: within one group
    if (h == 0 || groups[0] != groups[1]) {
      const int place = groups[h] % GROUPS;
      const SCALE *ratio = reinterpret_cast<const SCALE *>(ring.ratio + place * RATIO_BYTES) + n;
      const uint8_t *zeros = ring.zeros + place * TILE_N + n;
      QG_UNROLL for (int j = 0; j < 2; j++) f[j] = affine(ratio + 16 * j, a.zeros ? zeros + 16 * j : nullptr, a.zero);
    }
    if constexpr (TILE_M == 8) {
      unsigned b[4];   // chunks 4h .. 4h + 3: both steps
      ldmatrix4(b, stage + 128 * (lane & 7) + 16 * ((4 * h + lane / 8) ^ (lane & 7)));
      QG_UNROLL for (int i = 0; i < 2; i++) QG_UNROLL for (int j = 0; j < 2; j++) {
        unsigned w[4];
        decode(w, low, high, j, 2 * h + i, f[j]);
        mma_float<REAL>(sum[j][0], w, {b[2 * i], b[2 * i + 1]});
      }
    } else {
      QG_UNROLL for (int s = 2 * h; s < 2 * h + 2; s++) {
        unsigned w[2][4];
        QG_UNROLL for (int j = 0; j < 2; j++) decode(w[j], low, high, j, s, f[j]);
        QG_UNROLL for (int p = 0; p < TILE_M / 16; p++) {   // rows 16p .. + 7 and + 8 .. + 15, chunks 2s and 2s + 1
          unsigned b[4];
          ldmatrix4(b, stage + 128 * (16 * p + lane / 16 * 8 + (lane & 7)) + 16 * ((2 * s + lane / 8 % 2) ^ (lane & 7)));
          QG_UNROLL for (int j = 0; j < 2; j++) {
            mma_float<REAL>(sum[j][2 * p], w[j], {b[0], b[1]});
            mma_float<REAL>(sum[j][2 * p + 1], w[j], {b[2], b[3]});
          }
        }
      }
    }
  }
}

QG_DEVICE void put(float *p, float first, float second) { store8(p, bits<uint2>(make_float2(first, second))); }
template <class Short> QG_DEVICE void put(Short *p, float first, float second) { store4(p, two<Short>(first, second)); }

// per_group: 32s of inputs that share a scale; squares: of a split.
QG_KERNEL __launch_bounds__(THREADS, BLOCKS) weight_gemm(
    const REAL *__restrict__ x, const unsigned char *__restrict__ packed, const SCALE *__restrict__ ratio,
    const uint8_t *__restrict__ zeros, const float *__restrict__ row, const float *__restrict__ bias, OUT *__restrict__ y,
    float *__restrict__ partial, int m, int n, int k, int per_group, int zero, int squares) {
  QG_DYNAMIC_SHARED(shared);
  const Ring ring{shared, shared + STAGES * STAGE, shared + STAGES * STAGE + GROUPS * RATIO_BYTES};
  const int all_squares = (k + 63) / 64, begin = blockIdx.z * squares, end = min(begin + squares, all_squares);
  const int first_m = blockIdx.x * TILE_M, first_n = blockIdx.y * TILE_N;
  const Matrices a{x, packed, ratio, zeros, m, k, first_m, first_n, (n + 63) & ~63, all_squares, zero, 1.f / per_group};

  Sums sum = {};
  QG_UNROLL for (int i = 0; i < STAGES - 1; i++) {
    if (begin + i < end) copy(ring, a, begin + i, i, i == 0);
    copy_commit();
  }
  for (int q = begin, slot = 0; q < end; q++) {
    copy_wait<STAGES - 2>();
    __syncthreads();   // square q has arrived for all; square q - 1, whose place comes next, has been read by all
    const int next = q + STAGES - 1;
    if (next < end) copy(ring, a, next, slot == 0 ? STAGES - 1 : slot - 1, false);
    copy_commit();
    multiply(sum, ring, a, q, slot);
    slot = slot == STAGES - 1 ? 0 : slot + 1;
  }
  copy_wait<0>();

  const int lane = threadIdx.x & 31, n0 = a.n0 + 32 * (threadIdx.x >> 5) + 2 * (lane >> 2), m0 = a.m0 + 2 * (lane & 3);
  QG_UNROLL for (int j = 0; j < 2; j++) {
    const int at = n0 + 16 * j;
    if (at >= n) continue;
    const float2 none = {0, 0}, scale = partial ? none : bits<float2>(load8(row + at));
    const float2 shift = partial || !bias ? none : bits<float2>(load8(bias + at));
    QG_UNROLL for (int i = 0; i < TILE_M / 8; i++) QG_UNROLL for (int e = 0; e < 2; e++) {
      const int token = m0 + 8 * i + e;
      if (token >= m) continue;
      const float first = sum[j][i][e], second = sum[j][i][2 + e];
      if (partial) put(partial + ((size_t)blockIdx.z * m + token) * n + at, first, second);
      else put(y + (size_t)token * n + at, first * scale.x + shift.x, second * scale.y + shift.y);
    }
  }
}
