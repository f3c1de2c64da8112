// emu.h -- runs an unchanged .cu file on the CPU: one fiber per CUDA thread, the blocks of a grid one after another.
//
// g++ -include emu.h ... wrapper.cpp, where wrapper.cpp includes the .cu and says QG_EXPORT(kernel) for each kernel. NVIDIA's own
// headers give the half and bfloat16 types. What waits for other threads (barriers, shuffles, votes, mma) suspends its fiber; the last
// thread to arrive does the work for all. device.h and warp.h have what a kernel calls, checks.h what -DQG_CHECKED adds.
//
// schedule 0 runs the threads of a block in order, 1 in reverse, more: shuffled with that seed. Results must not depend on it.
#pragma once
#define QG_EMULATE 1
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <tuple>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <immintrin.h>
#include <sys/mman.h>
#include <vector_types.h>

#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __constant__
#define __shared__ static  // blocks run one after another, so static storage is shared by the threads of one block
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __constant__ static
#define __restrict__ __restrict
#define QG_UNCHECKED __attribute__((no_sanitize("thread")))
#define QG_PUBLIC __attribute__((used, visibility("default")))   // all else is hidden: libraries share nothing
#define QG_EXPORT(kernel) \
  extern "C" QG_PUBLIC int emu_launch_##kernel(const unsigned *dims, unsigned shared, void **args) { return emu::launch(kernel, dims, shared, args); }

namespace emu {
constexpr size_t STACK = 128 << 10;
constexpr unsigned THREADS = 1024, WARPS = THREADS / 32;
constexpr unsigned DYNAMIC_SHARED = 227 << 10;  // the most that a block of sm_90 can have
enum State : uint8_t { RUNNING, AT_BARRIER, AT_COLLECTIVE, DONE };
enum Kind : uint8_t { SYNC, SHUFFLE, VOTE, LDMATRIX, MOVMATRIX, MMA };   // what a warp does together

struct Copy { void *to; const void *from; unsigned bytes, valid, group; };   // one cp.async: `valid` bytes are copied, the rest is zero
struct Copies { Copy *queue; unsigned first, end, room, committed; };        // those of a thread that have not arrived: queue[first .. end)
struct alignas(64) Fiber { void *sp; char *stack; uint3 tid; State state; unsigned lane, warp; const void *waits; };
struct Group { unsigned mask, arrived; Kind kind; void *operand[32]; };      // lanes of one warp that wait for each other
struct Warp { unsigned waiting; Group groups[32]; };
struct Block {
  unsigned threads, alive, at_barrier, shared, at; uint3 id; dim3 dim, grid; Fiber *now; void *caller;   // now: the thread that runs, the at-th
  void (*entry)(void *); void *argument; size_t argument_bytes;
};
inline Block B;
inline Fiber fibers[THREADS];
inline Copies copies[THREADS];
inline Warp warps[WARPS];
inline unsigned order[THREADS], place[THREADS];   // threads run in this order; where a thread is in it
inline uint64_t ready[THREADS / 64];              // a bit for each place: that thread can run
inline char error[1024];
inline unsigned schedule = 0;
alignas(1024) inline unsigned char dynamic_shared[DYNAMIC_SHARED];

// What happens is told to the checks (checks.h); in an unchecked build that is nothing. `pc` is where in the kernel.
enum Access : uint8_t { READ, WRITE, ATOMIC };
enum Count : uint8_t { MMA_INT8, MMA_FLOAT, DP4A, COUNTS };
#ifdef QG_CHECKED
void access(const void *p, unsigned bytes, Access kind, const void *pc);
void copy_issued(void *to, unsigned bytes, const void *pc);
void copy_arrived(void *to, unsigned bytes);
void launch_starts();
void block_starts();
void block_ends();
void barrier_passed();
void warp_met(unsigned warp, unsigned mask, Kind kind);
inline unsigned long long counts[COUNTS];
#define QG_SEEN inline __attribute__((noinline)) QG_UNCHECKED   // what tells of its accesses itself: its caller is the kernel
QG_SEEN void count(int what) { counts[what]++; }   // a call, so that it is no access of the kernel
#define QG_COUNT(what) emu::count(emu::what)
#else
#define QG_SEEN inline
inline void access(const void *, unsigned, Access, const void *) {}
inline void copy_issued(void *, unsigned, const void *) {}
inline void copy_arrived(void *, unsigned) {}
inline void launch_starts() {}
inline void block_starts() {}
inline void block_ends() {}
inline void barrier_passed() {}
inline void warp_met(unsigned, unsigned, Kind) {}
#define QG_COUNT(what) ((void)0)
#endif
#define QG_PC __builtin_return_address(0)

// --- fibers: save the callee-saved registers, swap stacks
#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif
extern "C" void qg_emu_swap(void **save, void *to);
asm(R"(
.text
.weak qg_emu_swap
.type qg_emu_swap,@function
qg_emu_swap:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  popq %rdx; jmp *%rdx
.size qg_emu_swap,.-qg_emu_swap
)");
QG_UNCHECKED inline void wake(unsigned thread) { ready[place[thread] / 64] |= 1ull << place[thread] % 64; }
QG_UNCHECKED inline void wake_all() { for (unsigned i = 0; i < B.threads; i += 32) ready[i / 64] |= 0xffffffffull << i % 64; }
// The next thread in the order that can run, from the place after this one on and around; null if there is none.
QG_UNCHECKED inline Fiber *next_ready() {
  unsigned words = (B.threads + 63) / 64, w = B.at / 64;
  uint64_t bits = ready[w] & ~0ull << B.at % 64 << 1;
  for (unsigned i = 0; !bits && i < words; i++) bits = ready[w = w + 1 < words ? w + 1 : 0];
  if (!bits) return nullptr;
  ready[w] &= ~(bits & -bits);
  B.at = w * 64 + __builtin_ctzll(bits);
  Fiber *f = &fibers[order[B.at]];
  f->state = RUNNING;
  return f;
}
// Goes on with another thread; returns when this one's turn has come again. Where none can run, or after an error, the launch goes on.
__attribute__((noinline)) QG_UNCHECKED inline void suspend() {
  Fiber *me = B.now;
  B.now = error[0] ? nullptr : next_ready();
  if (B.now != me) qg_emu_swap(&me->sp, B.now ? B.now->sp : B.caller);
}
// Ends the launch with an error; a thread that calls it does not go on. "{pc}" stands for a place in the code (emulate.py finds the line).
template <class... A> QG_UNCHECKED inline void fail(const char *format, A... a) {
  if (!error[0]) snprintf(error, sizeof error, format, a...);
  if (B.now) suspend();
}
QG_UNCHECKED inline Copies &my_copies() { return copies[B.now - fibers]; }
[[noreturn]] QG_UNCHECKED inline void fiber_main() {
  B.entry(B.argument);
  if (my_copies().first != my_copies().end) fail("a thread ends with copies of cp.async that it never waited for");
  B.now->state = DONE;
  B.alive--;
  suspend();
  __builtin_unreachable();
}
QG_UNCHECKED inline void *fresh_stack(char *base, unsigned thread) {
  void **top = (void **)(base + STACK - thread * 11 % 64 * 64);   // tops that are apart modulo 4096 do not fight for the same lines of the cache
  *--top = nullptr;
  *--top = (void *)&fiber_main;   // leaves rsp % 16 == 8 at its entry, as a call would
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}

// --- waiting for other threads
QG_SEEN void block_barrier() {
  B.now->state = AT_BARRIER;
  B.now->waits = QG_PC;
  if (++B.at_barrier == B.alive) {
    if (B.alive != B.threads)
      fail("__syncthreads in block (%u,%u,%u) after %u of %u threads have exited, at {%p}", B.id.x, B.id.y, B.id.z, B.threads - B.alive, B.threads, QG_PC);
    B.at_barrier = 0;
    barrier_passed();
    wake_all();
  }
  suspend();
}

// The lanes of `mask` meet: the last to arrive gets the group with each lane's `operand` and must release it; the others sleep until then.
QG_UNCHECKED inline Group *meet(unsigned mask, Kind kind, void *operand, const void *pc) {
  Fiber *me = B.now;
  Warp &warp = warps[me->warp];
  unsigned bit = 1u << me->lane, i = 0;
  if (!(mask & bit)) fail("lane %u is not in the mask %08x that it waits with, at {%p}", me->lane, mask, pc);
  while (i < warp.waiting && (warp.groups[i].mask != mask || warp.groups[i].kind != kind)) i++;
  Group &g = warp.groups[i];
  if (i == warp.waiting) { warp.waiting++; g.mask = mask; g.arrived = 0; g.kind = kind; }
  g.arrived |= bit;
  g.operand[me->lane] = operand;
  if (g.arrived == mask) return &g;
  me->state = AT_COLLECTIVE;
  me->waits = pc;
  suspend();
  return nullptr;
}
QG_UNCHECKED inline void release(Group *g) {
  unsigned warp = B.now->warp, mask = g->mask;
  warp_met(warp, mask, g->kind);
  Group &last = warps[warp].groups[--warps[warp].waiting];
  if (&last != g) *g = last;
  for (unsigned m = mask & ~(1u << B.now->lane); m; m &= m - 1) wake(warp * 32 + __builtin_ctz(m));
}
QG_SEEN void warp_barrier(unsigned mask) { if (Group *g = meet(mask, SYNC, nullptr, QG_PC)) release(g); }

// --- a launch
QG_UNCHECKED inline void report_deadlock() {
  unsigned barrier = 0, warp = 0;
  const void *at = nullptr, *in = nullptr;
  for (unsigned i = B.threads; i-- > 0;) {
    const Fiber &f = fibers[i];
    if (f.state == AT_BARRIER) { barrier++; at = f.waits; }
    if (f.state == AT_COLLECTIVE) { warp++; in = f.waits; }
  }
  char where[2][64] = {"", ""};
  if (at) snprintf(where[0], sizeof where[0], " at {%p}", at);
  if (in) snprintf(where[1], sizeof where[1], " at {%p}", in);
  fail("divergent barrier in block (%u,%u,%u): %u threads wait at __syncthreads%s, %u in a warp operation%s, %u of %u have exited", B.id.x, B.id.y, B.id.z,
       barrier, where[0], warp, where[1], B.threads - B.alive, B.threads);
}
QG_UNCHECKED inline bool run_block() {
  for (unsigned i = 0; i < B.threads; i++) {
    Fiber &f = fibers[i];
    f.tid = {i % B.dim.x, i / B.dim.x % B.dim.y, i / (B.dim.x * B.dim.y)};
    f.lane = i & 31; f.warp = i >> 5; f.sp = fresh_stack(f.stack, i);
    copies[i].first = copies[i].end = copies[i].committed = 0;
    place[order[i]] = i;
  }
  for (unsigned w = 0; w < B.threads / 32; w++) warps[w].waiting = 0;
  wake_all();
  B.at = B.threads - 1;
  B.now = next_ready();
  qg_emu_swap(&B.caller, B.now->sp);
  if (B.alive && !error[0]) report_deadlock();
  memset(ready, 0, sizeof ready);
  B.now = nullptr;
  return !error[0];
}
QG_UNCHECKED inline bool run(dim3 grid, dim3 dim, unsigned shared, void (*entry)(void *), void *argument, size_t argument_bytes) {
  unsigned n = dim.x * dim.y * dim.z;
  error[0] = 0;
  B.now = nullptr;
  if (n > THREADS || n == 0 || n % 32) fail("a block of %u threads: 32, 64, ... %u are possible here", n, THREADS);
  if (shared > DYNAMIC_SHARED) fail("%u bytes of shared memory; %u are possible", shared, DYNAMIC_SHARED);
  if (error[0]) return false;
  B.threads = n; B.grid = grid; B.dim = dim; B.entry = entry; B.argument = argument; B.argument_bytes = argument_bytes; B.shared = shared;
  for (unsigned i = 0; i < n; i++) order[i] = schedule == 1 ? n - 1 - i : i;
  std::mt19937 random(schedule);
  launch_starts();
  for (unsigned z = 0; z < grid.z; z++) for (unsigned y = 0; y < grid.y; y++) for (unsigned x = 0; x < grid.x; x++) {
    B.id = {x, y, z}; B.alive = n; B.at_barrier = 0;
    if (schedule > 1) std::shuffle(order, order + n, random);
    block_starts();
    if (!run_block()) return false;
    block_ends();
  }
  return true;
}
template <class... A, size_t... I> int call(void (*kernel)(A...), const unsigned *d, unsigned shared, void **args, std::index_sequence<I...>) {
  struct Bound { void (*kernel)(A...); std::tuple<std::decay_t<A>...> args; } bound{kernel, {*(std::decay_t<A> *)args[I]...}};
  auto entry = [](void *b) { std::apply(((Bound *)b)->kernel, ((Bound *)b)->args); };
  return !run(dim3(d[0], d[1], d[2]), dim3(d[3], d[4], d[5]), shared, entry, &bound, sizeof bound);
}
template <class... A> int launch(void (*kernel)(A...), const unsigned *d, unsigned shared, void **args) {
  return call(kernel, d, shared, args, std::index_sequence_for<A...>{});
}
}  // namespace emu

extern "C" QG_PUBLIC inline const char *emu_error() { return emu::error; }
// The stacks of all threads, which libraries share: the lowest page of each is closed, to stop what overflows.
extern "C" QG_PUBLIC inline size_t emu_stack_bytes() { return emu::THREADS * emu::STACK; }
extern "C" QG_PUBLIC inline void emu_stacks(char *memory) {
  for (unsigned i = 0; i < emu::THREADS; i++) mprotect(emu::fibers[i].stack = memory + i * emu::STACK, 4096, PROT_NONE);
}
extern "C" QG_PUBLIC inline void emu_schedule(unsigned s) { emu::schedule = s; }

#define threadIdx (emu::B.now->tid)
#define blockIdx (emu::B.id)
#define blockDim (emu::B.dim)
#define gridDim (emu::B.grid)
#define warpSize 32
#include "device.h"
#include "warp.h"
