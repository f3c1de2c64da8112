// weight_codes.cuh -- how weights of 2, 3, 4 and 8 bits lie in memory, and how a lane gets them out. One layout for weight_gemv.cu and
// weight_gemm.cu; weight_packing.py writes it.
//
//   codes [N/64][K/64][BITS] vectors of 512 bytes: 16 bytes for each of 32 lanes. N and K are padded to multiples of 64.
//
// A square of 64 outputs x 64 inputs is so 512 BITS bytes that follow each other, and the squares of 64 outputs follow each other along
// K: a warp reads 512 bytes at once and goes straight on. The weight is the A of mma.m16n8k16 (y^T = W x^T), and the 16 bytes of lane
// 4g + t are its fragments, for tiles j = 0..3 of 16 outputs and steps s = 0..3 of 16 inputs:
//
//                     k = 16s + 2t + {0, 1}    k = 16s + 8 + 2t + {0, 1}
//   n = 16j + 2g               a0                       a2               The row g of a fragment is output 2g, and row g + 8 is
//   n = 16j + 2g + 1           a1                       a3               2g + 1 (any order will do): a lane's two are neighbours.
//
// The eight codes of (j, s) are a word: code i, of a_(i % 4), its low or high half i / 4, has the four bits from 4i. One lop3 with the
// mask 0x000f000f then gives two neighbours in k as the two halves of a register, in order.
//   4 bits  vector j: the words of s = 0..3.
//   2 bits  vector j / 2: words 2(j % 2) + s / 2; the codes of odd s lie two bits above those of even s.
//   3 bits  the low two bits as above, then a vector of the third bits: word j, in which bit s of four belongs to step s. 3 bits a weight.
//   8 bits  vector 2j + s / 2: words 2(s % 2) + {0: a0 and a1, 1: a2 and a3}, bytes in order.
//
// Codes are unsigned: q - smallest of the type. The weight is (code - zero) * ratio[k / group][n] * row[n]. `row` is float, the largest
// scale of the output over 16; `ratio`, at most 16, is a group's scale in units of it. So half has the range for it whatever the scales
// are, and one scale per output loses nothing. `zeros` [groups][N] bytes, or null: then `zero` is everyone's.
#pragma once
#include "qg.cuh"

namespace codes {
using namespace qg;
constexpr int VECTOR = 512;          // bytes
constexpr int SQUARE = BITS * VECTOR;

// The word of (tile j, step s), eight codes in four bits each. `low`: the words of the tiles from j = 0; `high`: 3 bits, the third bits.
QG_DEVICE uint32_t nibbles(const uint32_t *low, const uint32_t *high, int j, int s) {
  if constexpr (BITS == 4) return low[4 * j + s];
  uint32_t two = (s & 1 ? low[2 * j + s / 2] >> 2 : low[2 * j + s / 2]) & 0x33333333u;
  if constexpr (BITS == 2) return two;
  return lop3<AND_OR>(s < 2 ? high[j] << (2 - s) : high[j] >> (s - 2), 0x44444444u, two);
}

// Group of the 32 inputs from 32u: u / per_group. The product is off by less than half a step for u below 2^21.
QG_DEVICE int group_of(int u, float inverse) { return (int)(__fmul_rn((float)u + 0.5f, inverse)); }

// Two neighbouring scales as floats, and zero points as integers.
QG_DEVICE float2 two_scales(const float *p) { return bits<float2>(load8(p)); }
QG_DEVICE float2 two_scales(const __half *p) {
  __half2 v = bits<__half2>(load4(p));
  return make_float2(to_float(__low2half(v)), to_float(__high2half(v)));
}
struct Zeros { int first, second; };
QG_DEVICE Zeros two_zeros(const uint8_t *p) {
  unsigned v = *reinterpret_cast<const unsigned short *>(p);
  return {int(v & 255), int(v >> 8)};
}
}  // namespace codes
