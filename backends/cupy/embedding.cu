// embedding.cu -- rows of a quantized table, gathered and dequantized: out[i] = (table[ids[i]] - zero) * scale.
//
//     ids      | 7 | 2 | 2 | ...          block (i, t): tile t of output row i; a thread makes 16 bytes of it,
//     table    rows of BITS-bit codes     V = 16 / sizeof(REAL) values out of V * BITS / 8 bytes
//     out      | row 7 | row 2 | row 2 |
//
// Ladder. 1. Dequantize the table, then gather: all of the vocabulary is read and written. 2. Gather codes, then dequantize: they are
// written and read between. 3. (this) One kernel: codes are read, values written, once. Adjacent lanes read adjacent codes and write
// adjacent 16-byte pieces, so every sector is used whole. The scale of a group comes with one cached load a thread.
//
// BITS 8, or 4: two codes a byte, the first in the low half. table [vocabulary, stride bytes]; scale, zero (or null) [vocabulary, groups],
// a group being `group` columns, or one for all (groups = 0); out [rows, k]. Codes are signed with flip = 128 or 8, unsigned with 0; zeros,
// a byte each, likewise with zero_flip. ids null: row i of the table is row i of out (dequantization). An id that is in no row of the table
// gives a row of NaN: nothing here can stop the program.
//
// Whole accesses where rows of the table are a multiple of V * BITS / 8 bytes, those of out of 16 bytes, and groups of V columns; else a
// thread an element. Any k.
#include "qg.cuh"

using namespace qg;
constexpr int V = 16 / sizeof(REAL);

QG_DEVICE int code(const uint8_t *row, int column) {
#if BITS == 4
  return row[column / 2] >> 4 * (column & 1) & 15;
#else
  return row[column];
#endif
}
QG_DEVICE void codes(const uint8_t *row, int column, int (&out)[V]) {
  constexpr int BYTES = V * BITS / 8;
  const uint8_t *p = row + column * BITS / 8;
  uint32_t words[2];
  if constexpr (BYTES == 8) {
    uint2 both = load8(p);
    words[0] = both.x, words[1] = both.y;
  } else if constexpr (BYTES == 4) words[0] = load4(p);
  else words[0] = *reinterpret_cast<const uint16_t *>(p);
  QG_UNROLL for (int i = 0; i < V; i++) out[i] = words[i * BITS / 32] >> i * BITS % 32 & ((1 << BITS) - 1);
}

QG_KERNEL __launch_bounds__(256)
embedding_dequantize(const int64_t *ids, const uint8_t *table, const REAL *scale, const uint8_t *zero, REAL *out, int vocabulary, int k,
                     int stride, int group, int groups, int flip, int zero_flip) {
  int tile = blockIdx.y * blockDim.x * V, column = tile + threadIdx.x * V;
  int64_t id = ids ? ids[blockIdx.x] : int64_t(blockIdx.x);
  bool inside = id >= 0 && id < vocabulary;
  if (!inside) id = 0;
  const uint8_t *row = table + size_t(id) * stride;
  out += size_t(blockIdx.x) * k;
  auto parameters = [&](int c, float &s, int &z) {
    size_t at = groups ? size_t(id) * groups + c / group : 0;
    s = inside ? to_float(scale[at]) : __int_as_float(0x7fc00000);
    z = zero ? int(zero[at] ^ zero_flip) - zero_flip : 0;
  };
  auto value = [&](int q, float s, int z) { return from_float<REAL>(__fmul_rn(float((q ^ flip) - flip - z), s)); };
  float s;
  int z;
  if (k % V == 0 && stride % (V * BITS / 8) == 0 && (groups <= 1 || group % V == 0)) {
    if (column >= k) return;
    int q[V];
    REAL found[V];
    uint4 raw;
    codes(row, column, q);
    parameters(column, s, z);
    QG_UNROLL for (int i = 0; i < V; i++) found[i] = value(q[i], s, z);
    memcpy(&raw, found, 16);
    store16(out + column, raw);
    return;
  }
#pragma unroll 1
  for (int c = tile + threadIdx.x; c < min(tile + int(blockDim.x) * V, k); c += blockDim.x) {
    parameters(c, s, z);
    out[c] = value(code(row, c), s, z);
  }
}
