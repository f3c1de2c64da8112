// qg.cuh -- what every kernel is written with. Each function is one instruction of the GPU, and its meaning for the emulator
// (QG_EMULATE: g++ with emulator/emu.h). This file alone knows of both; a kernel has no inline PTX of its own.
//
// Memory is read and written in whole accesses, load4/8/16 and store4/8/16, so that what the emulator counts is what the GPU does.
// Arithmetic that must equal the reference bit for bit uses __fmul_rn, __fadd_rn, __fdiv_rn, which no compiler contracts.
#pragma once
#ifdef __CUDACC_RTC__   // NVRTC has no <stdint.h>
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
#else
#include <stdint.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef QG_EMULATE
#define QG_DEVICE __forceinline__   // so that what is in it belongs to the kernel's line for the checks
#define QG_DYNAMIC_SHARED(name) unsigned char *name = emu::dynamic_shared
#define QG_UNROLL
#else
#define QG_DEVICE __device__ __forceinline__
#define QG_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define QG_UNROLL _Pragma("unroll")
#endif
#define QG_KERNEL extern "C" __global__ void

namespace qg {
constexpr unsigned ALL = 0xffffffffu;   // every lane of a warp

// --- memory, one access each. Addresses are multiples of the size.
#ifdef QG_EMULATE
#define QG_ACCESS(T, n)                                                                                                        \
  QG_SEEN T load##n(const void *p) { emu::access(p, n, emu::READ, QG_PC); T v; memcpy(&v, p, n); return v; }                    \
  QG_SEEN void store##n(void *p, T v) { emu::access(p, n, emu::WRITE, QG_PC); memcpy(p, &v, n); }
#else
#define QG_ACCESS(T, n)                                                                       \
  QG_DEVICE T load##n(const void *p) { return *reinterpret_cast<const T *>(p); }              \
  QG_DEVICE void store##n(void *p, T v) { *reinterpret_cast<T *>(p) = v; }
#endif
QG_ACCESS(uint32_t, 4)
QG_ACCESS(uint2, 8)
QG_ACCESS(uint4, 16)
#undef QG_ACCESS

// load16_stream: as load16, for global memory that is read once (weights): it should not displace what is read again.
QG_DEVICE uint4 load16_stream(const void *p) {
#ifdef QG_EMULATE
  return load16(p);
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
#endif
}

// --- numbers
QG_DEVICE float to_float(float v) { return v; }
QG_DEVICE float to_float(__half v) { return __half2float(v); }
QG_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T> struct From;
template <> struct From<float> { static QG_DEVICE float of(float v) { return v; } };
template <> struct From<__half> { static QG_DEVICE __half of(float v) { return __float2half_rn(v); } };
template <> struct From<__nv_bfloat16> { static QG_DEVICE __nv_bfloat16 of(float v) { return __float2bfloat16_rn(v); } };
template <class T> QG_DEVICE T from_float(float v) { return From<T>::of(v); }

template <class T, class U> QG_DEVICE T bits(U v) {   // the same bits as another type
  static_assert(sizeof(T) == sizeof(U), "bits() keeps the size");
  T r;
  memcpy(&r, &v, sizeof r);
  return r;
}

// Two 16-bit floats in a word, the first in its low half: T is __half or __nv_bfloat16.
template <class T> constexpr bool IS_HALF = false;
template <> constexpr bool IS_HALF<__half> = true;
template <class T> QG_DEVICE uint32_t two(float first, float second) {
  if constexpr (IS_HALF<T>) return bits<uint32_t>(__floats2half2_rn(first, second));
  else return bits<uint32_t>(__floats2bfloat162_rn(first, second));
}
template <class T> QG_DEVICE uint32_t both(float v) { return two<T>(v, v); }
#ifdef QG_EMULATE   // NVIDIA's host versions convert bit by bit; through float the difference and the product are as exact
#define QG_ARITHMETIC2(name, op)                                                                                                  \
  template <class T> QG_DEVICE uint32_t name(uint32_t a, uint32_t b) {                                                            \
    return emu::narrow2<IS_HALF<T>>(emu::wide<IS_HALF<T>>(a) op emu::wide<IS_HALF<T>>(b), emu::wide<IS_HALF<T>>(a >> 16) op emu::wide<IS_HALF<T>>(b >> 16)); \
  }
QG_ARITHMETIC2(sub2, -)
QG_ARITHMETIC2(mul2, *)
#else
#define QG_ARITHMETIC2(name)                                                                                                      \
  template <class T> QG_DEVICE uint32_t name(uint32_t a, uint32_t b) {                                                            \
    if constexpr (IS_HALF<T>) return bits<uint32_t>(__h##name(bits<__half2>(a), bits<__half2>(b)));                               \
    else return bits<uint32_t>(__h##name(bits<__nv_bfloat162>(a), bits<__nv_bfloat162>(b)));                                      \
  }
QG_ARITHMETIC2(sub2)
QG_ARITHMETIC2(mul2)
#endif
template <class T> QG_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {   // a b + c, rounded once
  if constexpr (IS_HALF<T>) return bits<uint32_t>(__hfma2(bits<__half2>(a), bits<__half2>(b), bits<__half2>(c)));
  else return bits<uint32_t>(__hfma2(bits<__nv_bfloat162>(a), bits<__nv_bfloat162>(b), bits<__nv_bfloat162>(c)));
}
#undef QG_ARITHMETIC2

// saturate(round_half_even(x / scale) + zero) in [low, high], as the reference does it: NaN gives low.
QG_DEVICE int quantize(float x, float scale, float zero, int low, int high) {
  float q = __fadd_rn(rintf(__fdiv_rn(x, scale)), zero);
  return (int)fminf(fmaxf(q, (float)low), (float)high);   // fmaxf(NaN, low) is low
}

// (a & b) | c by its truth table, and any other function of three words: bit i of the table is the result for a, b, c = bits of i.
template <unsigned TABLE> QG_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef QG_EMULATE
  if (TABLE == ((0xf0 & 0xcc) | 0xaa)) return (a & b) | c;
  auto term = [&](int i) { return TABLE >> i & 1 ? (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c) : 0; };
  return term(0) | term(1) | term(2) | term(3) | term(4) | term(5) | term(6) | term(7);
#else
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
  return r;
#endif
}
constexpr unsigned AND_OR = (0xf0 & 0xcc) | 0xaa;

// c + sum of four products; a unsigned or signed bytes, b signed
template <bool UNSIGNED_A> QG_DEVICE int dp4a(uint32_t a, uint32_t b, int c) {
#ifdef QG_EMULATE
  QG_COUNT(DP4A);
  for (int i = 0; i < 4; i++) c += (UNSIGNED_A ? int(uint8_t(a >> 8 * i)) : int(int8_t(a >> 8 * i))) * int(int8_t(b >> 8 * i));
  return c;
#else
  int d;
  if (UNSIGNED_A) asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}

// --- warps
QG_DEVICE float warp_sum(float v) {
  QG_UNROLL for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
  return v;
}
QG_DEVICE int warp_sum(int v) {
  QG_UNROLL for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
  return v;
}
QG_DEVICE float warp_max(float v) {
  QG_UNROLL for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL, v, o));
  return v;
}
QG_DEVICE float warp_min(float v) {
  QG_UNROLL for (int o = 16; o > 0; o >>= 1) v = fminf(v, __shfl_xor_sync(ALL, v, o));
  return v;
}

// --- tensor cores. Fragments are those of the PTX ISA, "Matrix Fragments for mma.m16n8k16 / k32": lane l has rows l / 4 and l / 4 + 8
// of A and D, column l / 4 of B; registers hold 2 halves or 4 bytes that follow each other in k.
#ifdef QG_EMULATE
template <bool UNSIGNED_A> QG_DEVICE void mma_int8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { emu::mma_int8<UNSIGNED_A>(d, a, b); }
template <class T> QG_DEVICE void mma_float(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emu::mma_float<std::is_same_v<T, __nv_bfloat16>>(d, a, b);
}
#else
#define QG_MMA(shape, types, acc)                                                                                      \
  asm volatile("mma.sync.aligned." shape ".row.col." types " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"       \
               : acc(d[0]), acc(d[1]), acc(d[2]), acc(d[3])                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <bool UNSIGNED_A> QG_DEVICE void mma_int8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if (UNSIGNED_A) QG_MMA("m16n8k32", "s32.u8.s8.s32", "+r");
  else QG_MMA("m16n8k32", "s32.s8.s8.s32", "+r");
}
template <class T> QG_DEVICE void mma_float(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <> QG_DEVICE void mma_float<__half>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { QG_MMA("m16n8k16", "f32.f16.f16.f32", "+f"); }
template <> QG_DEVICE void mma_float<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { QG_MMA("m16n8k16", "f32.bf16.bf16.f32", "+f"); }
#undef QG_MMA
#endif

// Four 8x8 matrices of 16-bit elements (or 8 rows of 16 bytes) from shared memory: lane l gives the address of row l % 8 of matrix l / 8,
// and gets in r[i] bytes 4(l % 4) .. +3 of row l / 4 of matrix i.
QG_DEVICE void ldmatrix4(unsigned (&r)[4], const void *row) {
#ifdef QG_EMULATE
  emu::ldmatrix<4, false>(r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
#endif
}
QG_DEVICE void ldmatrix2(unsigned (&r)[2], const void *row) {
#ifdef QG_EMULATE
  emu::ldmatrix<2, false>(r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
#endif
}
// The matrices transposed: lane l gets column l / 4 of rows 2(l % 4), + 1 (16-bit elements).
QG_DEVICE void ldmatrix4_transposed(unsigned (&r)[4], const void *row) {
#ifdef QG_EMULATE
  emu::ldmatrix<4, true>(r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
#endif
}

// An 8x8 matrix of 16-bit elements in registers, transposed (movmatrix): lane l holds columns 2(l % 4), + 1 of row l / 4, before and after.
// So a column of D, packed to halves, becomes the B of the next mma.
QG_DEVICE unsigned transpose8(unsigned r) {
#ifdef QG_EMULATE
  return emu::transpose8(r);
#else
  unsigned d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(r));
  return d;
#endif
}

// --- cp.async: global to shared memory without registers. 16 bytes, of which `inside` says whether they exist (else zeros arrive).
// Copies belong to the group that the next commit closes; wait<N> returns when all but the N newest groups have arrived for this
// thread. Other threads' copies need a barrier behind the wait.
QG_DEVICE void copy16_async(void *shared, const void *global, bool inside = true) {
#ifdef QG_EMULATE
  emu::copy_async(shared, global, 16, inside ? 16 : 0);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global), "r"(inside ? 16 : 0) : "memory");
#endif
}
QG_DEVICE void copy_commit() {
#ifdef QG_EMULATE
  emu::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING> QG_DEVICE void copy_wait() {
#ifdef QG_EMULATE
  emu::copy_wait(PENDING);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}
}  // namespace qg
