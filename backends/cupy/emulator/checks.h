// checks.h -- the checked mode: every access of a kernel, judged. A unit of its own, built without the hooks that it supplies.
//
// g++ -fsanitize=thread calls __tsan_read4(p) ... before each access of the kernel, and the functions of emu.h that access memory for it
// (load16, atomicAdd, ldmatrix, cp.async) call access() themselves. An access may be to the tensors of the launch, to shared memory, to the thread's own
// stack, to the parameters or, reading, to constants; anything else is out of bounds. Not seen: what a call of memcpy does that g++ did not
// expand, and accesses that g++ removed (registers on the GPU as well).
#pragma once
#include <map>
#include <vector>

#include "emu.h"
#include "races.h"
#include "traffic.h"

extern "C" char __ehdr_start __attribute__((visibility("hidden"))), __bss_start __attribute__((visibility("hidden"))), _end __attribute__((visibility("hidden")));

namespace emu {
struct Tensor { uintptr_t at; size_t bytes; int argument; Touched touched; };
struct Array { uintptr_t at; size_t bytes; const char *name; size_t shadow; };   // of shared memory; its bytes are shadowed from `shadow` on
static std::vector<Tensor> tensors;
static std::vector<Array> arrays(1, {(uintptr_t)dynamic_shared, 0, "dynamic shared memory", 0});   // the dynamic one, then the static ones
static std::vector<Byte> bytes_of_shared;
static Shadow shadow;
static Traffic traffic;
static bool block_used_atomics;   // since then its accesses may be ordered after other blocks', as by a semaphore

static const char *named(Access kind) { return kind == READ ? "a read" : kind == WRITE ? "a write" : "an atomic"; }
static uint32_t offset(const void *pc) { return (uint32_t)((const char *)pc - &__ehdr_start); }
static const void *code(uint32_t offset) { return &__ehdr_start + offset; }

static void coordinates(char (&out)[40], unsigned thread) {
  const uint3 &t = fibers[thread].tid;
  snprintf(out, sizeof out, "thread (%u,%u,%u)", t.x, t.y, t.z);
}
static void report(const char *what, const void *pc) {
  char who[40];
  coordinates(who, B.now - fibers);
  fail("%s, by %s of block (%u,%u,%u) at {%p}", what, who, B.id.x, B.id.y, B.id.z, pc);
}

static void out_of_bounds(uintptr_t at, unsigned bytes, Access kind, const void *pc) {
  char what[256], where[160] = "to no tensor of the launch";
  uintptr_t nearest = 1 << 20;   // farther than that it has nothing to do with an array
  auto consider = [&](uintptr_t from, size_t size, const char *format, auto name) {
    uintptr_t behind = at + bytes - (from + size), before = from - at;
    char named[64];
    snprintf(named, sizeof named, format, name);
    if (at + bytes > from + size && behind < nearest) {
      nearest = behind;
      snprintf(where, sizeof where, "that ends %zu bytes beyond the end of %s (%zu bytes)", (size_t)behind, named, size);
    } else if (at < from && before < nearest) {
      nearest = before;
      snprintf(where, sizeof where, "that starts %zu bytes before the start of %s (%zu bytes)", (size_t)before, named, size);
    }
  };
  for (auto &t : tensors) consider(t.at, t.bytes, "argument %d", t.argument);
  for (auto &a : arrays) consider(a.at, a.bytes, "%s", a.name);
  for (unsigned i = 0; i < B.threads; i++)
    if (at - (uintptr_t)fibers[i].stack < STACK) snprintf(where, sizeof where, "of a local variable of another thread");
  if (at < 4096) snprintf(where, sizeof where, "of a null pointer");
  snprintf(what, sizeof what, "out of bounds: %s of %u bytes %s", named(kind), bytes, where);
  report(what, pc);
}

static void shared_access(const Array &array, uintptr_t at, unsigned bytes, Access kind, const void *pc, Written how) {
  unsigned thread = B.now - fibers;
  Byte *bytes_there = &bytes_of_shared[array.shadow + (at - array.at)];
  for (unsigned i = 0; i < bytes; i++) {
    Conflict c = kind == READ ? shadow.read(bytes_there[i], thread, offset(pc)) : shadow.write(bytes_there[i], thread, offset(pc), how);
    if (!c.what) continue;
    char what[320], who[40];
    const char *kind_of = named(kind);
    coordinates(who, c.other.thread);
    if (c.what == Shadow::RACE)
      snprintf(what, sizeof what, "a race on byte %zu of %s: nothing orders %s and an access by %s at {%p}", (size_t)(at + i - array.at), array.name, kind_of, who, code(c.other.pc));
    else snprintf(what, sizeof what, "%s of byte %zu of %s, %s", kind_of, (size_t)(at + i - array.at), array.name, c.what);
    report(what, pc);
  }
}
// Blocks run in any order, so one must not read or write what another writes, unless by atomics or behind one.
static void between_blocks(Tensor &tensor, size_t from, unsigned bytes, Access kind, const void *pc) {
  uint32_t block = B.id.x + B.grid.x * (B.id.y + B.grid.y * B.id.z) + 1;
  auto &writer = tensor.touched.writer, &reader = tensor.touched.reader, &mine = kind == READ ? reader : writer;
  if (mine.empty()) mine.resize(tensor.bytes);
  auto other = [block](const std::vector<uint32_t> &by, size_t i) { return !by.empty() && by[i] && by[i] != block; };
  for (size_t i = from; i < from + bytes; i++) {
    const char *does = other(writer, i) ? "writes" : kind == WRITE && other(reader, i) ? "reads" : nullptr;
    if (does && !block_used_atomics) {
      char what[160];
      snprintf(what, sizeof what, "%s of byte %zu of argument %d, which another block %s: nothing orders blocks", named(kind), i, tensor.argument, does);
      report(what, pc);
    }
    mine[i] = kind == READ && other(reader, i) ? Touched::SEVERAL : block;
  }
}
static void global_access(Tensor &tensor, uintptr_t at, unsigned bytes, Access kind, const void *pc) {
  size_t from = at - tensor.at;
  Touched &touched = tensor.touched;
  if (kind != WRITE) touched.mark(touched.read, tensor.bytes, from, bytes);
  if (kind != READ) touched.mark(touched.written, tensor.bytes, from, bytes);
  if (kind == ATOMIC) block_used_atomics = true;
  else between_blocks(tensor, from, bytes, kind, pc);
}

// A piece of memory that has [at, at + bytes) whole, or null.
template <class Piece> static Piece *holding(std::vector<Piece> &pieces, uintptr_t at, unsigned bytes) {
  for (auto &p : pieces) if (at - p.at < p.bytes && at + bytes <= p.at + p.bytes) return &p;
  return nullptr;
}
static bool emulators_own(uintptr_t at, Access kind) {
  auto within = [at](const void *from, size_t bytes) { return at - (uintptr_t)from < bytes; };
  if (kind != READ) return false;
  if (within(B.argument, B.argument_bytes) || within(&B, sizeof B) || within(fibers, sizeof fibers)) return true;
  bool image = within(&__ehdr_start, &_end - &__ehdr_start), variables = within(&__bss_start, &_end - &__bss_start);
  return image && !variables;   // constants
}
static void judge(uintptr_t at, unsigned bytes, Access kind, const void *pc, bool copy = false) {
  if (!B.now || at - (uintptr_t)B.now->stack < STACK) return;
  Tensor *tensor = holding(tensors, at, bytes);
  Array *array = tensor ? nullptr : holding(arrays, at, bytes);
  if (!tensor && !array) {
    if (!emulators_own(at, kind)) out_of_bounds(at, bytes, kind, pc);
    return;
  }
  if (at % bytes) {
    char what[160];
    snprintf(what, sizeof what, "misaligned: %s of %u bytes at an address that is %u more than a multiple of %u", named(kind), bytes, unsigned(at % bytes), bytes);
    report(what, pc);
  }
  if (tensor) global_access(*tensor, at, bytes, kind, pc);
  else shared_access(*array, at, bytes, kind, pc, copy ? IN_FLIGHT : kind == ATOMIC ? BY_ATOMIC : PLAIN);
  traffic.note(B.now - fibers, tensor ? at : at - array->at, bytes, !tensor, kind, offset(pc));
}

void access(const void *p, unsigned bytes, Access kind, const void *pc) { judge((uintptr_t)p, bytes, kind, pc); }
void copy_issued(void *to, unsigned bytes, const void *pc) { judge((uintptr_t)to, bytes, WRITE, pc, true); }
void copy_arrived(void *to, unsigned bytes) {
  if (Array *a = holding(arrays, (uintptr_t)to, bytes))
    for (unsigned i = 0; i < bytes; i++) shadow.arrived(bytes_of_shared[a->shadow + ((uintptr_t)to - a->at) + i], B.now - fibers);
}
void launch_starts() {
  arrays[0].bytes = B.shared;
  size_t bytes = B.shared;
  for (size_t i = 1; i < arrays.size(); i++) { arrays[i].shadow = bytes; bytes += arrays[i].bytes; }
  if (bytes_of_shared.size() < bytes) bytes_of_shared.resize(bytes);
  shadow.launch_starts();
  traffic.launch_starts();
  memset(counts, 0, sizeof counts);
}
void block_starts() { shadow.block_starts(); block_used_atomics = false; }
void block_ends() { for (unsigned w = 0; w < B.threads / 32; w++) traffic.warp_met(w); }
void barrier_passed() { shadow.barrier_passed(); block_ends(); }
void warp_met(unsigned warp, unsigned mask, Kind kind) {
  if (kind == SYNC) shadow.warp_synced(warp, mask);
  if (mask == ~0u) traffic.warp_met(warp);
}
}  // namespace emu

// --- what emulate.py calls
extern "C" {
QG_PUBLIC uint64_t emu_base() { return (uint64_t)&__ehdr_start; }
QG_PUBLIC void emu_tensors(unsigned n, const uint64_t *at, const uint64_t *bytes, const int *argument) {
  emu::tensors.clear();
  for (unsigned i = 0; i < n; i++) emu::tensors.push_back({at[i], bytes[i], argument[i], {}});
}
QG_PUBLIC void emu_static_shared(uint64_t at, uint64_t bytes, const char *name) { emu::arrays.push_back({emu_base() + at, bytes, strdup(name), 0}); }
// totals: bytes of the tensors that were read, written and touched at all, each once; then the counts. Returns the number of places.
QG_PUBLIC unsigned emu_profile(uint64_t *totals) {
  using emu::Touched;
  totals[0] = totals[1] = 0;
  for (auto &t : emu::tensors) { totals[0] += Touched::count(t.touched.read); totals[1] += Touched::count(t.touched.written); }
  for (int i = 0; i < emu::COUNTS; i++) totals[2 + i] = emu::counts[i];
  return emu::traffic.places.size();
}
QG_PUBLIC const emu::Place *emu_places() { return emu::traffic.places.data(); }

// --- what -fsanitize=thread calls
#define QG_HOOKS(n)                                                                                           \
  void __tsan_read##n(void *p) { emu::judge((uintptr_t)p, n, emu::READ, QG_PC); }                             \
  void __tsan_write##n(void *p) { emu::judge((uintptr_t)p, n, emu::WRITE, QG_PC); }                           \
  void __tsan_unaligned_read##n(void *p) { emu::judge((uintptr_t)p, n, emu::READ, QG_PC); }                   \
  void __tsan_unaligned_write##n(void *p) { emu::judge((uintptr_t)p, n, emu::WRITE, QG_PC); }                 \
  void __tsan_volatile_read##n(void *p) { emu::judge((uintptr_t)p, n, emu::READ, QG_PC); }                    \
  void __tsan_volatile_write##n(void *p) { emu::judge((uintptr_t)p, n, emu::WRITE, QG_PC); }
QG_HOOKS(1) QG_HOOKS(2) QG_HOOKS(4) QG_HOOKS(8) QG_HOOKS(16)
#undef QG_HOOKS
// A structure that is no power of two long: word by word.
static void pieces(uintptr_t at, size_t bytes, emu::Access kind, const void *pc) {
  unsigned piece = (at | bytes) % 4 ? 1 : 4;
  for (size_t i = 0; i < bytes; i += piece) emu::judge(at + i, piece, kind, pc);
}
void __tsan_read_range(void *p, size_t bytes) { pieces((uintptr_t)p, bytes, emu::READ, QG_PC); }
void __tsan_write_range(void *p, size_t bytes) { pieces((uintptr_t)p, bytes, emu::WRITE, QG_PC); }
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
void __tsan_init() {}
void __tsan_func_entry(void *) {
  uintptr_t here = (uintptr_t)__builtin_frame_address(0);
  if (emu::B.now && (uintptr_t)emu::B.now->stack + emu::STACK - here > emu::STACK / 2) emu::fail("a thread's local variables take more than %zu bytes", emu::STACK / 2);
}
void __tsan_func_exit() {}
}
