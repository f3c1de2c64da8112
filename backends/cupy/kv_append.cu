// kv_append.cu -- quantizes new keys and values and appends them to a cache, in one kernel.
//
//   k, v     REAL   [batch, step, heads, HEAD_DIM]   one row is one token of one head
//   codes    uint8  [2, batch, heads, capacity, ROW] keys, then values; a row holds HEAD_DIM unsigned codes of BITS (8 or 4: two in a
//                                                    byte, the even one low), filled up with zeros to a multiple of 16 bytes
//   params   REAL   [2, batch, heads, capacity, 2]   (scale, zero point) of each row
//   lengths  int32  [batch]                          tokens that are there already: token i goes to lengths[b] + i
//
// Each row is reference.dynamic_quantize(row, "uint8" or "uint4", symmetric), bit for bit.
//
//   a warp, head_dim 128, halves:   | row 0: 16 lanes x 16 bytes | row 1: 16 lanes x 16 bytes |   -> 8 bytes of codes a lane (4 for int4)
//
// Ladder: 1. absmax, scale, quantize and copy as torch ops: six passes over k and v, and a copy of the whole cache. 2. a block a row, range
// in shared memory, a second read for the codes. 3. this: a row stays in the registers of 4 to 32 lanes, its range is found by shuffles, so
// that each byte is read once and written once, and there is no barrier. A prompt's warps `repeat` this, up to 32 rows, so that params are
// written in whole sectors. HEAD_DIM is a multiple of 16; rows of k and v are 16-byte aligned.
#include "qg.cuh"
using namespace qg;

constexpr int SEGMENT = 16 / sizeof(REAL);              // values of one 16-byte load
constexpr int LOADS = HEAD_DIM / SEGMENT;               // of a row
constexpr int LANES = LOADS <= 4 ? 4 : LOADS <= 8 ? 8 : LOADS <= 16 ? 16 : 32;
constexpr int SEGMENTS = (LOADS + LANES - 1) / LANES;   // of a lane
constexpr int THREADS = 128, WARPS = THREADS / 32, GROUPS = 32 / LANES;   // rows that a warp does at once
constexpr int ROW = (HEAD_DIM * BITS / 8 + 15) / 16 * 16;
constexpr int TOP = (1 << BITS) - 1;

struct Range { float scale, zero; };

// qgraph.reference.dynamic_quantize: scale is rounded to REAL before the zero point is computed with it.
QG_DEVICE Range range(float low, float high, int symmetric) {
  float exact = symmetric ? __fdiv_rn(fmaxf(-low, high), (float)(TOP / 2)) : __fdiv_rn(__fsub_rn(high, low), (float)TOP);
  float scale = to_float(from_float<REAL>(low == high ? 1.0f : exact));
  if (symmetric) return {scale, (float)(TOP / 2 + 1)};
  float zero = __fsub_rn(0.0f, __fdiv_rn(low, scale));
  return {scale, zero != zero ? (float)TOP : rintf(fminf(fmaxf(zero, 0.0f), (float)TOP))};   // 0 / 0 is the largest
}

QG_KERNEL __launch_bounds__(THREADS) kv_append(const REAL *k, const REAL *v, unsigned char *codes, REAL *params, const int *lengths,
                                               int symmetric, int rows, int step, int heads, int capacity, int repeat) {
  // Lane i keeps the books of row `first + i` of the warp's GROUPS * repeat: tokens of a head follow each other, as they do in the cache.
  int lane = threadIdx.x % 32, part = lane % LANES, first = (blockIdx.x * WARPS + threadIdx.x / 32) * GROUPS * repeat;
  int row = min(first + lane, rows - 1), token = row % step, head = row / step % heads, b = row / step / heads, batch = rows / step / heads;
  int position = lane < GROUPS * repeat && first + lane < rows ? lengths[b] + token : capacity;
  long long source = ((long long)b * step + token) * heads + head;
  long long place = (((long long)blockIdx.y * batch + b) * heads + head) * capacity + position;
  if (position >= capacity) place = -1;   // the caller keeps count; this only protects what lies behind the cache
  Range kept = {0.0f, 0.0f};

  for (int j = 0; j < repeat; j++) {
    int group = j * GROUPS + lane / LANES;
    const REAL *from = (blockIdx.y ? v : k) + __shfl_sync(ALL, source, group) * HEAD_DIM;
    long long to = __shfl_sync(ALL, place, group);
    float x[SEGMENTS][SEGMENT], low = 0.0f, high = 0.0f;   // the range contains 0, and NaN does not count
    QG_UNROLL for (int s = 0; s < SEGMENTS; s++) {
      int index = (s * LANES + part) * SEGMENT;
      uint4 raw = index < HEAD_DIM && to >= 0 ? load16(from + index) : make_uint4(0, 0, 0, 0);
      REAL values[SEGMENT];
      memcpy(values, &raw, 16);
      QG_UNROLL for (int i = 0; i < SEGMENT; i++) {
        x[s][i] = to_float(values[i]);
        low = fminf(low, x[s][i]);
        high = fmaxf(high, x[s][i]);
      }
    }
    QG_UNROLL for (int o = LANES / 2; o > 0; o >>= 1) {
      low = fminf(low, __shfl_xor_sync(ALL, low, o));
      high = fmaxf(high, __shfl_xor_sync(ALL, high, o));
    }
    Range r = range(low, high, symmetric);
    QG_UNROLL for (int s = 0; s < SEGMENTS; s++) {
      int index = (s * LANES + part) * SEGMENT;
      if (index >= HEAD_DIM || to < 0) continue;
      unsigned packed[2] = {0, 0};
      QG_UNROLL for (int i = 0; i < SEGMENT; i++)
        packed[i * BITS / 32] |= (unsigned)quantize(x[s][i], r.scale, r.zero, 0, TOP) << i * BITS % 32;
      unsigned char *at = codes + to * ROW + index * BITS / 8;
      if (SEGMENT * BITS == 64) store8(at, make_uint2(packed[0], packed[1]));
      else if (SEGMENT * BITS == 32) store4(at, packed[0]);
      else *reinterpret_cast<unsigned short *>(at) = packed[0];
    }
    float scale = __shfl_sync(ALL, r.scale, lane % GROUPS * LANES), zero = __shfl_sync(ALL, r.zero, lane % GROUPS * LANES);
    if (lane / GROUPS == j) kept = {scale, zero};
  }
  if (place < 0) return;
  REAL pair[2] = {from_float<REAL>(kept.scale), from_float<REAL>(kept.zero)};
  if (sizeof(REAL) == 4) store8(params + 2 * place, make_uint2(bits<unsigned>(kept.scale), bits<unsigned>(kept.zero)));
  else {
    unsigned word;
    memcpy(&word, pair, 4);
    store4(params + 2 * place, word);
  }
}
