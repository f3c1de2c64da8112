// embedding.cu -- rows of a quantized table, gathered and dequantized: out[i] = (table[ids[i]] - zero) * scale.
//
//     ids      | 7 | 2 | 2 | ...          a warp: a piece of a row, EACH times 32 V columns; a lane makes 16 bytes of each,
//     table    rows of BITS-bit codes     V = 16 / sizeof(REAL) values out of V * BITS / 8 bytes
//     out      | row 7 | row 2 | row 2 |  warp w: row w / pieces, piece w % pieces of it
//
// Ladder. 1. Dequantize the table, then gather: all of the vocabulary is read and written. 2. Gather codes, then dequantize: they are
// written and read between. 3. One kernel: codes are read, values written, once. Adjacent lanes read adjacent codes and write adjacent
// 16-byte pieces, so every sector is used whole. 4. (this) EACH loads in flight for one look at ids, and the scales of a piece come with
// one load, a lane each, and go round by shuffles: 4 sectors for 64 groups of half instead of 16 (4096 columns of 4 bits: 1.01 of the
// least traffic instead of 1.09).
//
// BITS 8, or 4: two codes a byte, the first in the low half. table [vocabulary, stride bytes]; scale, zero (or null) [vocabulary, groups],
// a group being `group` columns, or one for all (groups = 0); out [rows, k]. Codes are signed with flip = 128 or 8, unsigned with 0; zeros,
// a byte each, likewise with zero_flip. ids null: row i of the table is row i of out (dequantization). An id that is in no row of the table
// gives a row of NaN: nothing here can stop the program.
//
// Whole accesses where rows of the table are a multiple of V * BITS / 8 bytes, those of out of 16 bytes, and groups of V columns; else a
// lane an element. Any k.
#include "qg.cuh"

using namespace qg;
constexpr int V = 16 / sizeof(REAL), THREADS = 256;
constexpr int EACH = 4, PIECE = EACH * 32 * V;   // columns of a warp: embedding.py's
struct Parameters { float scale; int zero; };

QG_DEVICE int code(const uint8_t *row, int column) {
#if BITS == 4
  return row[column / 2] >> 4 * (column & 1) & 15;
#else
  return row[column];
#endif
}
QG_DEVICE uint2 codes(const uint8_t *row, int column) {   // V of them
  constexpr int BYTES = V * BITS / 8;
  const uint8_t *p = row + column * BITS / 8;
  if constexpr (BYTES == 8) return load8(p);
  else if constexpr (BYTES == 4) return make_uint2(load4(p), 0);
  else return make_uint2(*reinterpret_cast<const uint16_t *>(p), 0);
}

QG_KERNEL __launch_bounds__(THREADS)
embedding_dequantize(const int64_t *ids, const uint8_t *table, const REAL *scale, const uint8_t *zero, REAL *out, int rows, int pieces,
                     int vocabulary, int k, int stride, int group, int groups, int flip, int zero_flip) {
  const unsigned lane = threadIdx.x % 32, warp = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, index = warp / pieces;
  if (index >= rows) return;
  const int first = int(warp % pieces) * PIECE, end = min(first + PIECE, k);
  int64_t id = ids ? ids[index] : int64_t(index);
  const bool inside = id >= 0 && id < vocabulary;
  if (!inside) id = 0;
  const uint8_t *row = table + size_t(id) * stride;
  out += size_t(index) * k;
  const size_t line = groups ? size_t(id) * groups : 0;
  auto group_of = [&](int column) { return groups > 1 ? column / group : 0; };
  auto parameters = [&](int g) {
    const float s = inside ? to_float(scale[line + g]) : __int_as_float(0x7fc00000);
    return Parameters{s, zero ? int(zero[line + g] ^ zero_flip) - zero_flip : 0};
  };
  auto value = [&](int q, Parameters p) { return from_float<REAL>(__fmul_rn(float((q ^ flip) - flip - p.zero), p.scale)); };
  if (k % V == 0 && stride % (V * BITS / 8) == 0 && (groups <= 1 || group % V == 0)) {
    uint2 raw[EACH] = {};
    QG_UNROLL for (int i = 0; i < EACH; i++) {
      const int column = first + (32 * i + lane) * V;
      if (column < end) raw[i] = codes(row, column);
    }
    const int from = group_of(first), count = group_of(end - 1) - from + 1;
    Parameters mine = {};
    if (count <= 32 && lane < count) mine = parameters(from + lane);
    QG_UNROLL for (int i = 0; i < EACH; i++) {
      if (first + 32 * i * V >= end) break;
      const int column = min(first + (32 * i + int(lane)) * V, end - V), g = group_of(column);
      Parameters p;
      if (count <= 32) p = {__shfl_sync(ALL, mine.scale, g - from), __shfl_sync(ALL, mine.zero, g - from)};
      else p = parameters(g);
      const uint32_t words[2] = {raw[i].x, raw[i].y};
      REAL found[V];
      uint4 together;
      QG_UNROLL for (int e = 0; e < V; e++) found[e] = value(words[e * BITS / 32] >> e * BITS % 32 & ((1 << BITS) - 1), p);
      memcpy(&together, found, 16);
      if (first + (32 * i + lane) * V < end) store16(out + column, together);
    }
    return;
  }
#pragma unroll 1
  for (int c = first + lane; c < end; c += 32) out[c] = value(code(row, c), parameters(group_of(c)));
}
