// w8a8.cuh -- what becomes of an int32 sum of products X.W: qgraph.reference._finish, in its order of float32 roundings.
//
//   acc = sum_k (X - zx)(W - zw) = sum_k X W - zw * sum_k X - zx * sum_k (W - zw)      (mod 2**32)
//                                             row_sum[m]      w_sum[n], made offline
//   an int32 bias joins acc; s = x_scale * w_scale; then, with one rounding to the output's type at the end,
//   1. float output:                        y = relu(acc * s (+ bias))
//   2. bytes, no float bias and no relu:    saturate(round(acc * (s / y_scale)) + zy)
//   3. bytes otherwise:                     saturate(round(relu(acc * s + bias) / y_scale) + zy)
// relu is there or not; before it in case 3, values are rounded to the float type that the layer has without quantization of its result.
#pragma once
#include "qg.cuh"

namespace w8a8 {
using namespace qg;

// `how`, as w8a8.py makes it
constexpr int X_SCALE_TYPE = 3;           // a Type
constexpr int SCALE_PER_TOKEN = 1 << 2, ZERO_PER_TOKEN = 1 << 3, X_UNSIGNED = 1 << 4, BIAS_INT32 = 1 << 5;
constexpr int RELU = 1 << 6, Y_UNSIGNED = 1 << 7;
constexpr int Y_TYPE = 8;                 // two bits from here: a Type
enum Type { FLOAT, HALF, BFLOAT };
constexpr unsigned MINUS_ZERO = 0x80000000u;

// The last arguments of a kernel. Pointers may be null: x_zero, w_zero (with row_sum), bias, y_scale (float output), y_zero.
#define W8A8_FINISH                                                                                                                      \
  const void *x_scale, const uint8_t *x_zero, const float *w_scale, const int *w_sum, const int *w_zero, const int *row_sum,             \
      const int *bias, const float *y_scale, const uint8_t *y_zero, int how, int low, int high
#define W8A8_FINISH_GIVEN {x_scale, x_zero, w_scale, w_sum, w_zero, row_sum, bias, y_scale, y_zero, how, low, high}

QG_DEVICE float round_as(int type, float y) {
  return type == HALF ? to_float(from_float<__half>(y)) : type == BFLOAT ? to_float(from_float<__nv_bfloat16>(y)) : y;
}
QG_DEVICE int byte_at(const uint8_t *p, size_t i, bool is_unsigned) { return is_unsigned ? (int)p[i] : (int)(int8_t)p[i]; }

struct Row { float scale; int zero, sum; };
// V columns of y. Without a float bias `bias` is -0, which added to any number leaves it alone; without an int32 bias `joined` is 0.
template <int V> struct Columns { float scale[V]; int sum[V], zero[V], joined[V]; float bias[V]; };

struct Finish {
  const void *x_scale; const uint8_t *x_zero; const float *w_scale; const int *w_sum, *w_zero, *row_sum, *bias;
  const float *y_scale; const uint8_t *y_zero;
  int how, low, high;

  QG_DEVICE bool is(int bit) const { return (how & bit) != 0; }
  QG_DEVICE int y_type() const { return how >> Y_TYPE & 3; }

  QG_DEVICE Row row(int m) const {
    const int s = is(SCALE_PER_TOKEN) ? m : 0, type = how & X_SCALE_TYPE;
    Row r;
    if (type == HALF) r.scale = to_float(((const __half *)x_scale)[s]);
    else if (type == BFLOAT) r.scale = to_float(((const __nv_bfloat16 *)x_scale)[s]);
    else r.scale = ((const float *)x_scale)[s];
    r.zero = x_zero != nullptr ? byte_at(x_zero, is(ZERO_PER_TOKEN) ? m : 0, is(X_UNSIGNED)) : 0;
    r.sum = w_zero != nullptr ? row_sum[m] : 0;
    return r;
  }
  // Four columns from n, a multiple of 4: the arrays are padded to a multiple of 4.
  QG_DEVICE Columns<4> columns4(int n) const {
    const uint4 none = make_uint4(0, 0, 0, 0), minus = make_uint4(MINUS_ZERO, MINUS_ZERO, MINUS_ZERO, MINUS_ZERO);
    const uint4 b = bias != nullptr ? load16(bias + n) : minus;
    const uint4 all[5] = {load16(w_scale + n), load16(w_sum + n), w_zero != nullptr ? load16(w_zero + n) : none, is(BIAS_INT32) ? b : none,
                          is(BIAS_INT32) ? minus : b};
    Columns<4> c;
    memcpy(c.scale, &all[0], 16);
    memcpy(c.sum, &all[1], 16);
    memcpy(c.zero, &all[2], 16);
    memcpy(c.joined, &all[3], 16);
    memcpy(c.bias, &all[4], 16);
    return c;
  }
  QG_DEVICE Columns<1> column(int n) const {
    const int b = bias != nullptr ? bias[n] : (int)MINUS_ZERO;
    const int zero = w_zero != nullptr ? w_zero[n] : 0;
    return {{w_scale[n]}, {w_sum[n]}, {zero}, {is(BIAS_INT32) ? b : 0}, {is(BIAS_INT32) ? -0.f : bits<float>(b)}};
  }
};

// The sum after zero points and an int32 bias. Unsigned: sums are modulo 2**32.
template <int V> QG_DEVICE int corrected(int acc, const Row &r, const Columns<V> &c, int i) {
  return (int)((unsigned)acc - (unsigned)r.zero * (unsigned)c.sum[i] - (unsigned)c.zero[i] * (unsigned)r.sum + (unsigned)c.joined[i]);
}

// How results become the output's type; `uint8_t` stands for the bytes of int8 and uint8. Made once, so that nothing branches in a loop.
template <class Out> struct Result {
  float least;   // 0 with relu, else -inf
  QG_DEVICE explicit Result(const Finish &f) : least(f.is(RELU) ? 0.f : -__int_as_float(0x7f800000)) {}
  QG_DEVICE float real(int acc, float factor, float bias) const {
    const float y = __fadd_rn(__fmul_rn(__int2float_rn(acc), factor), bias);
    return y < least ? least : y;   // keeps NaN
  }
  QG_DEVICE float factor(float s) const { return s; }
  QG_DEVICE Out of(int acc, float factor, float bias) const { return from_float<Out>(real(acc, factor, bias)); }
};
template <> struct Result<uint8_t> {
  Result<float> before;
  float y_scale, zero, low, high;
  int type;          // that values are rounded to before they are quantized
  bool one_factor;   // case 2: what the sum is multiplied with is s / y_scale
  QG_DEVICE explicit Result(const Finish &f)
      : before(f), y_scale(*f.y_scale), zero(f.y_zero != nullptr ? (float)byte_at(f.y_zero, 0, f.is(Y_UNSIGNED)) : 0.f),
        low((float)f.low), high((float)f.high), type(f.is(RELU) ? f.y_type() : FLOAT),
        one_factor((f.bias == nullptr || f.is(BIAS_INT32)) && !f.is(RELU)) {}
  QG_DEVICE float factor(float s) const { return one_factor ? __fdiv_rn(s, y_scale) : s; }
  QG_DEVICE uint8_t of(int acc, float factor, float bias) const {
    float y = round_as(type, before.real(acc, factor, bias));
    if (!one_factor) y = __fdiv_rn(y, y_scale);
    return (uint8_t)(int)fminf(fmaxf(__fadd_rn(rintf(y), zero), low), high);   // fmaxf(NaN, low) is low
  }
};

// Four neighbours in one access of 4, 8 or 16 bytes.
template <class V, class Out> QG_DEVICE V together(const Out (&four)[4]) {
  V v;
  memcpy(&v, four, sizeof v);
  return v;
}
QG_DEVICE void store_four(uint8_t *to, const uint8_t (&v)[4]) { store4(to, together<uint32_t>(v)); }
QG_DEVICE void store_four(__half *to, const __half (&v)[4]) { store8(to, together<uint2>(v)); }
QG_DEVICE void store_four(__nv_bfloat16 *to, const __nv_bfloat16 (&v)[4]) { store8(to, together<uint2>(v)); }
QG_DEVICE void store_four(float *to, const float (&v)[4]) { store16(to, together<uint4>(v)); }
}  // namespace w8a8
