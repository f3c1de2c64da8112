// unpack.cu -- 4-bit integers, two a byte and the first in the low half -> one a byte.
//
//     packed   | 8 bytes | 8 bytes | ...     a thread takes 8 bytes and writes 16:
//     out      |    16 bytes   | ...         a word of nibbles 76543210 -> words 3_2_1_0 and 7_6_5_4 by two spreading shifts each
//
// Ladder. 1. A thread a byte: accesses of 1 and 2 bytes. 2. (this) 8 and 16 bytes, adjacent lanes adjacent.
//
// packed [rows, stride bytes], out [rows, k]. Signed integers (is_signed) are widened with their sign. Whole accesses where k is a multiple
// of 16 and stride of 8, else a thread an integer. Block (i, t): tile t of row i.
#include "qg.cuh"

using namespace qg;

QG_DEVICE uint32_t spread(uint32_t four, int is_signed) {   // the low 16 bits
  four = (four | four << 8) & 0x00ff00ff;
  four = (four | four << 4) & 0x0f0f0f0f;
  return is_signed ? four | (four & 0x08080808) * 30 : four;   // bit 3 into bits 4 to 7 of its byte
}

QG_KERNEL __launch_bounds__(256) unpack(const uint8_t *packed, uint8_t *out, int k, int stride, int is_signed) {
  int tile = blockIdx.y * blockDim.x * 16, column = tile + threadIdx.x * 16;
  packed += size_t(blockIdx.x) * stride;
  out += size_t(blockIdx.x) * k;
  if (k % 16 == 0 && stride % 8 == 0) {
    if (column >= k) return;
    uint2 w = load8(packed + column / 2);
    uint2 low = make_uint2(spread(w.x & 0xffff, is_signed), spread(w.x >> 16, is_signed));
    uint2 high = make_uint2(spread(w.y & 0xffff, is_signed), spread(w.y >> 16, is_signed));
    store16(out + column, make_uint4(low.x, low.y, high.x, high.y));
    return;
  }
#pragma unroll 1
  for (int c = tile + threadIdx.x; c < min(tile + int(blockDim.x) * 16, k); c += blockDim.x)
    out[c] = uint8_t(spread(packed[c / 2] >> 4 * (c & 1) & 15, is_signed));
}
