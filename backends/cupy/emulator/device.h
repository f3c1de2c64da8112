// device.h -- CUDA's device functions of one thread, for emu.h: what NVIDIA's headers do not give to g++.
#pragma once
__forceinline__ void __syncthreads() { emu::block_barrier(); }
__forceinline__ void __syncwarp(unsigned mask = ~0u) { emu::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// One OS thread runs a whole grid, so a plain read-modify-write is atomic.
#define QG_ATOMIC(name, changed)                                                                   \
  template <class T> QG_SEEN T name(T *p, std::common_type_t<T> v) {                               \
    emu::access(p, sizeof(T), emu::ATOMIC, QG_PC);                                                 \
    T old = *p;                                                                                    \
    *p = changed;                                                                                  \
    return old;                                                                                    \
  }
QG_ATOMIC(atomicAdd, old + v)
QG_ATOMIC(atomicSub, old - v)
QG_ATOMIC(atomicMax, old > v ? old : v)
QG_ATOMIC(atomicMin, old < v ? old : v)
QG_ATOMIC(atomicAnd, old & v)
QG_ATOMIC(atomicOr, old | v)
QG_ATOMIC(atomicExch, v)
#undef QG_ATOMIC
template <class T> QG_SEEN T atomicCAS(T *p, std::common_type_t<T> compare, std::common_type_t<T> v) {
  emu::access(p, sizeof(T), emu::ATOMIC, QG_PC);
  T old = *p;
  if (old == compare) *p = v;
  return old;
}
template <class T> QG_SEEN T __ldg(const T *p) {
  emu::access(p, sizeof(T), emu::READ, QG_PC);
  return *p;
}

inline int __dp4a(int a, int b, int c) {
  QG_COUNT(DP4A);
  for (int i = 0; i < 4; i++) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
  return c;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  uint64_t bytes = (uint64_t(y) << 32) | x;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    unsigned b = bytes >> 8 * (selector >> 4 * i & 7) & 255;
    if (selector >> 4 * i & 8) b = b & 128 ? 255 : 0;
    r |= b << 8 * i;
  }
  return r;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

// Rounded as the names say and never contracted (the build has -ffp-contract=off).
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __int2float_rn(int x) { return (float)x; }
inline int __float2int_rn(float x) { return std::isnan(x) ? 0 : x >= 2147483648.f ? INT32_MAX : x <= -2147483648.f ? INT32_MIN : (int)std::nearbyint(x); }
// Approximations of the device, exact here.
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline int __float_as_int(float f) { int i; memcpy(&i, &f, 4); return i; }
inline float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned i; memcpy(&i, &f, 4); return i; }
inline float __uint_as_float(unsigned i) { float f; memcpy(&f, &i, 4); return f; }
using std::max;
using std::min;

// Fused in cuda_fp16.h and cuda_bf16.h on the device only: one rounding (a product of two halves and their sum are exact in double).
inline half __hfma(half a, half b, half c) { return __double2half((double)__half2float(a) * (double)__half2float(b) + (double)__half2float(c)); }
inline half2 __hfma2(half2 a, half2 b, half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)), __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16((double)__bfloat162float(a) * (double)__bfloat162float(b) + (double)__bfloat162float(c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)), __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}

// 16-bit floats by their bits; NVIDIA's host versions take longer.
namespace emu {
template <bool HALF> __forceinline__ float wide(uint32_t v) { return HALF ? _cvtsh_ss(uint16_t(v)) : __uint_as_float(v << 16); }
template <bool HALF> __forceinline__ uint32_t narrow(float v) {
  if (HALF) return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
  uint32_t bits = __float_as_uint(v);
  return std::isnan(v) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <bool HALF> __forceinline__ uint32_t narrow2(float first, float second) { return narrow<HALF>(first) | narrow<HALF>(second) << 16; }
}  // namespace emu
