// weight_gemv.cu -- y[M,N] = x . W^T + bias for a few rows of x and weights of 2, 3, 4 or 8 bits (layout: weight_codes.cuh).
//
//   x [M, K] float, half or bfloat16, K a multiple of 8, 16-byte aligned; y [M, N] of x's type, or partial [splits, M, N] float, which
//   weight_reduce adds; ratio [groups, padded N] half, or float where x is float; row and bias [padded N] float. Sums are float, and so
//   are the products: x is read as it is.
//
// Partition. Grid (outputs / OUTPUTS, splits of K, rows / ROWS). A block has a warp for each 16 outputs and takes K in slabs of 1024
// inputs; a warp has TILES tiles of 16 outputs (1 for 8 bits, 2 for 2 and 4, 4 for 3; for 4 bits and several rows 1, which is what
// registers allow). Where fewer warps cover the outputs each takes its part of a slab, in one piece, so that few groups have two readers.
// 4 bits:
//
//             K ->  64 inputs                     in a warp: lane 4g + t has outputs 2g, 2g + 1 of each tile,
//   N   +----------------+------   +----------    and inputs 2t, 2t + 1, 2t + 8, 2t + 9 of each 16, for all rows of x.
//   32  | warp 0: 1 KiB  | 1 ...   | warp 4 ...   x: the slab as floats in shared memory, the lane's four as 16 bytes; 16 bytes are
//   32  | warp 1         | ...     | warp 5       left out behind 32 inputs, so that the stores of a warp meet all banks.
//       | ...            |         |
//
// Ladder: 1. a thread for each output, byte by byte: 1/32 of each sector is used.  2. A warp for each output, 4-byte loads, a reduction of
// five shuffles: coalesced, but x is read again for each output.  3. The fragment-ordered layout: 16 bytes a lane, 512 a warp, OUTPUTS
// for each read of x, and two shuffles at the end for all of K.  4. UNROLL loads in flight before the first is used, past the L1 cache.
// 5. No conversion of integers: byte_perm puts a code under the exponent of 128 (0x43), which is the float 128 + code (bfloat16's magic
// number 0x4300, widened); 128 + zero leaves the sum as a product with the sum of x, which is known for each 32 inputs:
//   sum (code - zero) x = sum (128 + code) x - (128 + zero) sum x.
// Two multiplications for 32 inputs apply the scale. Arithmetic per weight: 1.4 + 1.2 ROWS instructions. (8 bits: the magic number is
// 32768, too large to leave in the sums; it is subtracted at once.)  6. Two tiles of 4 bits to a warp: its 32 zero points fill a sector,
// and x is read from shared memory half as often.
//
// Traffic over the least possible, 1 x 1024 x 4096, x half, groups of 128 with zero points, every block's reads of x and the partial sums
// counted: 8 bits 1.02, 4 bits 1.04, 3 bits 1.03, 2 bits 1.04. A block of h outputs and w inputs reads 2w bytes of x, and writes and reads
// again 8h bytes of sums. B blocks so move 8 sqrt(B N K) bytes at least (2w = 8h), against N K BITS / 8: the shorter the codes, the fewer
// the blocks: for 1.05 it may be 16 here with 2 bits, 32 with 3, 52 with 4. So codes that are short beside x have blocks of 256 outputs
// and 16 warps, which do the work of two for one reading of x.
//
// Macros: BITS, ROWS (1, 2, 4, 8), OUTPUTS (of a block: 128, 256), REAL (type of x and y), SCALE (type of ratio).
#include "weight_codes.cuh"
using namespace codes;

constexpr int WARPS = OUTPUTS / 16, THREADS = 32 * WARPS;
constexpr int TILES = BITS == 3 ? 4 : BITS == 2 || (BITS == 4 && ROWS == 1) ? 2 : 1;   // of a warp
constexpr int VECTORS = BITS * TILES / 4;                                              // of a lane, in a square
constexpr int WARPS_N = OUTPUTS / (16 * TILES), WARPS_K = WARPS / WARPS_N;
constexpr int UNROLL = BITS == 4 || (BITS == 2 && ROWS == 1) ? 4 : 2;
constexpr int SLAB = 1024, PITCH = 36;                           // inputs in shared memory; floats that 32 of them take
constexpr int EACH = 16 / sizeof(REAL);                          // inputs in 16 bytes of x
constexpr float MAGIC = BITS == 8 ? 0.f : 128.f;                 // of a decoded weight
constexpr int NARROW_BLOCKS = ROWS == 1 && TILES == 1 ? 3 : ROWS == 1 || TILES < 4 ? 2 : 1;   // on a multiprocessor: what registers allow
constexpr int BLOCKS = OUTPUTS > 128 ? 1 : NARROW_BLOCKS;
static_assert(WARPS_K * OUTPUTS <= SLAB, "the sums of the warps take the place of x");

struct Slab {
  float x[ROWS][SLAB / 32 * PITCH];   // of each 16 inputs: those of lane t = 0, then 1, 2, 3
  float sums[ROWS][SLAB / 32];        // a quarter of the sum of 32 inputs: each of four lanes subtracts it
};
struct Weights { uint32_t word[4 * VECTORS]; };
struct Group { float scale[TILES][2], offset[TILES][2]; };   // of the lane's outputs

QG_DEVICE void read(float (&v)[4], const float *x) {
  float4 a = bits<float4>(load16(x));
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
}
template <class Short> QG_DEVICE void read(float (&v)[8], const Short *x) {
  uint4 raw = load16(x);
  uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
  QG_UNROLL for (int i = 0; i < 8; i++) v[i] = to_float(bits<Short>((unsigned short)(i & 1 ? word[i / 2] >> 16 : word[i / 2])));
}

// x[rows][k0 .. min(k0 + SLAB, end)) to shared memory, zeros where there is none; 16 bytes a thread.
QG_DEVICE void stage(Slab &slab, const REAL *x, int rows, int k0, int end, int k) {
  for (int i = threadIdx.x; i < ROWS * SLAB / EACH; i += THREADS) {
    const int r = i / (SLAB / EACH), at = i % (SLAB / EACH) * EACH;
    float v[EACH] = {}, sum = 0;
    if (r < rows && k0 + at < end) read(v, x + (size_t)r * k + k0 + at);
    QG_UNROLL for (int e = 0; e < EACH; e += 2) {   // inputs 2t, 2t + 1 of eight
      store8(slab.x[r] + at / 32 * PITCH + (at & 16) + (at & 8 ? 2 : 0) + 2 * (at % 8 + e), bits<uint2>(make_float2(v[e], v[e + 1])));
      sum += v[e] + v[e + 1];
    }
    QG_UNROLL for (int o = 1; o < 32 / EACH; o *= 2) sum += __shfl_xor_sync(ALL, sum, o);
    if (at % 32 == 0) slab.sums[r][at / 32] = 0.25f * sum;
  }
}

QG_DEVICE Weights read(const uint4 *square) {
  Weights w;
  QG_UNROLL for (int v = 0; v < VECTORS; v++) {
    uint4 raw = load16_stream(square + 32 * v);
    w.word[4 * v] = raw.x, w.word[4 * v + 1] = raw.y, w.word[4 * v + 2] = raw.z, w.word[4 * v + 3] = raw.w;
  }
  return w;
}

// Byte i of w as the float MAGIC + byte.
QG_DEVICE float magic(uint32_t w, int i) {
  if constexpr (BITS == 8) return bits<float>(__byte_perm(w, 0x47u, 0x4505u | i << 4)) - 32768.f;
  return bits<float>(__byte_perm(w, 0x43u, 0x4055u | i << 8));
}
// The codes of (tile j, step s): of the lane's first output at its four inputs, then of the second.
QG_DEVICE void decode(float (&f)[8], const Weights &w, int j, int s) {
  if constexpr (BITS == 8) {
    uint32_t near = w.word[4 * (2 * j + s / 2) + s % 2 * 2], far = w.word[4 * (2 * j + s / 2) + s % 2 * 2 + 1];
    QG_UNROLL for (int i = 0; i < 8; i++) f[i] = magic(i & 2 ? far : near, i / 4 * 2 + (i & 1));
  } else {
    uint32_t word = nibbles(w.word, w.word + 8, j, s), even = word & 0x0f0f0f0fu, odd = (word >> 4) & 0x0f0f0f0fu;
    QG_UNROLL for (int i = 0; i < 8; i++) f[i] = magic(i < 4 ? even : odd, (i & 1) * 2 + (i >> 1 & 1));
  }
}

// ratio, zeros: at the lane's first output of the first tile. Lane 4g + t reads the zero points of tile t for four lanes: whole sectors.
QG_DEVICE void read_group(Group &group, const SCALE *ratio, const uint8_t *zeros, int zero, int lane) {
  const unsigned mine = zeros ? *reinterpret_cast<const unsigned short *>(zeros + 16 * (lane % TILES)) : 257 * zero;
  QG_UNROLL for (int j = 0; j < TILES; j++) {
    float2 s = two_scales(ratio + 16 * j);
    group.scale[j][0] = s.x, group.scale[j][1] = s.y;
    const unsigned two = TILES > 1 ? __shfl_sync(ALL, mine, (lane & ~3) + j) : mine;
    group.offset[j][0] = -(MAGIC + (two & 255)), group.offset[j][1] = -(MAGIC + (two >> 8));
  }
}

// per_group: 32s of inputs that share a scale; squares: of a split.
QG_KERNEL __launch_bounds__(THREADS, BLOCKS) weight_gemv(
    const REAL *__restrict__ x, const uint4 *__restrict__ packed, const SCALE *__restrict__ ratio, const uint8_t *__restrict__ zeros,
    const float *__restrict__ row, const float *__restrict__ bias, REAL *__restrict__ y, float *__restrict__ partial,
    int m, int n, int k, int per_group, int zero, int squares) {
  __shared__ Slab slab;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
  const int all_squares = (k + 63) / 64, padded_n = (n + 63) & ~63;
  const int tile = (blockIdx.x * WARPS_N + warp_n) * TILES, n0 = 16 * tile + 2 * (lane >> 2);   // the lane's first output
  const int first_row = blockIdx.z * ROWS, rows = min(ROWS, m - first_row);
  const int begin = blockIdx.y * squares, end = min(begin + squares, all_squares);
  const bool inside = 16 * tile < padded_n;
  const uint4 *mine = packed + ((size_t)(tile / 4) * all_squares * BITS + BITS * (tile % 4) / 4) * 32 + lane;
  const float inverse = 1.f / per_group;
  x += (size_t)first_row * k;

  Group group;
  int until = 0;   // the 32 inputs from which on another group begins
  float sum[ROWS][TILES][2] = {};
  for (int s0 = begin; s0 < end; s0 += SLAB / 64) {
    const int here = inside ? min(SLAB / 64, end - s0) : 0;   // squares of this slab; a warp beyond N has none
    const int each = (here + WARPS_K - 1) / WARPS_K, from = warp_k * each, to = min(here, from + each);
    const uint4 *squares_here = mine + (size_t)s0 * BITS * 32;
    Weights ahead[UNROLL];
    QG_UNROLL for (int u = 0; u < UNROLL; u++)
      if (from + u < to) ahead[u] = read(squares_here + (from + u) * BITS * 32);
    __syncthreads();   // the slab before has been read
    stage(slab, x, rows, 64 * s0, min(k, 64 * end), k);
    __syncthreads();
    for (int c0 = from; c0 < to; c0 += UNROLL) {
      QG_UNROLL for (int u = 0; u < UNROLL; u++) {
        const int c = c0 + u, next = c + UNROLL;
        if (c >= to) break;
        const Weights w = ahead[u];
        if (next < to) ahead[u] = read(squares_here + next * BITS * 32);
        QG_UNROLL for (int h = 0; h < 2; h++) {   // 32 inputs: within one group
          if (2 * (s0 + c) + h >= until) {
            const int index = group_of(2 * (s0 + c) + h, inverse);
            until = (index + 1) * per_group;
            read_group(group, ratio + (size_t)index * padded_n + n0, zeros ? zeros + (size_t)index * padded_n + n0 : nullptr, zero, lane);
          }
          float f[TILES][2][8];
          QG_UNROLL for (int j = 0; j < TILES; j++) QG_UNROLL for (int i = 0; i < 2; i++) decode(f[j][i], w, j, 2 * h + i);
          QG_UNROLL for (int r = 0; r < ROWS; r++) {
            if (r >= rows) break;
            const float *at = slab.x[r] + (2 * c + h) * PITCH + 4 * (lane & 3), quarter = slab.sums[r][2 * c + h];
            const float4 a = bits<float4>(load16(at)), b = bits<float4>(load16(at + 16));
            QG_UNROLL for (int j = 0; j < TILES; j++) QG_UNROLL for (int o = 0; o < 2; o++) {
              const float *p = f[j][0] + 4 * o, *q = f[j][1] + 4 * o;
              float part = group.offset[j][o] * quarter;
              part += a.x * p[0], part += a.y * p[1], part += a.z * p[2], part += a.w * p[3];
              part += b.x * q[0], part += b.y * q[1], part += b.z * q[2], part += b.w * q[3];
              sum[r][j][o] += group.scale[j][o] * part;
            }
          }
        }
      }
    }
  }

  __syncthreads();
  float *sums = slab.x[0];   // [ROWS][WARPS_K][OUTPUTS]
  QG_UNROLL for (int r = 0; r < ROWS; r++) QG_UNROLL for (int j = 0; j < TILES; j++) QG_UNROLL for (int o = 0; o < 2; o++) {
    float v = sum[r][j][o];
    v += __shfl_xor_sync(ALL, v, 1);
    v += __shfl_xor_sync(ALL, v, 2);
    if ((lane & 3) == 0) sums[(r * WARPS_K + warp_k) * OUTPUTS + 16 * (warp_n * TILES + j) + 2 * (lane >> 2) + o] = v;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * OUTPUTS; i += THREADS) {
    const int r = i / OUTPUTS, o = i % OUTPUTS, at = blockIdx.x * OUTPUTS + o;
    if (at >= n) continue;
    float v = 0;
    QG_UNROLL for (int w = 0; w < WARPS_K; w++) v += sums[(r * WARPS_K + w) * OUTPUTS + o];
    if (partial) partial[((size_t)blockIdx.y * m + first_row + r) * n + at] = v;
    else y[(size_t)(first_row + r) * n + at] = from_float<REAL>(v * row[at] + (bias ? bias[at] : 0.f));
  }
}
