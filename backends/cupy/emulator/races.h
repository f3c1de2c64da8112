// races.h -- who touched each byte of a block's shared memory last, for checks.h: races, reads of unwritten bytes, copies not waited for.
//
// Two accesses of one byte by two threads, one of them a write, need an order between them: a __syncthreads, or a __syncwarp that both
// lanes take part in (shuffles, votes and mma order no memory: CUDA C++ Programming Guide, "Warp Shuffle Functions"). Per byte the last
// write and the reads since are kept with their time, as in FastTrack (Flanagan, Freund, PLDI 2009): `epoch` counts the __syncthreads,
// `clock` of a warp its __syncwarps, and seen[b][a] is the clock at which lane b last met lane a.
#pragma once
namespace emu {
enum Written : uint8_t { NOT, PLAIN, BY_ATOMIC, IN_FLIGHT };   // IN_FLIGHT: by a cp.async that its thread has not waited for
constexpr uint8_t MANY = 255;
struct Touch { uint32_t epoch, clock, pc; uint16_t thread; };
struct Byte { Touch write, read; uint32_t lanes; uint16_t also; Written how; uint8_t warp; };   // lanes of `warp` that read, or of MANY; also: one before `read`

struct Conflict { const char *what; Touch other; };   // what: null if there is none

class Shadow {
 public:
  void launch_starts() {
    memset(clock, 0, sizeof clock);
    memset(seen, 0, sizeof seen);
    epoch++;
  }
  void block_starts() { first = ++epoch; }
  void barrier_passed() { epoch++; }
  void warp_synced(unsigned warp, unsigned mask) {
    uint32_t now = ++clock[warp], known[32] = {};
    for (unsigned b = 0; b < 32; b++) if (mask >> b & 1) for (unsigned a = 0; a < 32; a++) known[a] = std::max(known[a], seen[warp][b][a]);
    for (unsigned b = 0; b < 32; b++) if (mask >> b & 1)
      for (unsigned a = 0; a < 32; a++) seen[warp][b][a] = mask >> a & 1 ? now : known[a];
  }

  Conflict read(Byte &c, unsigned thread, uint32_t pc) {
    if (c.write.epoch < first) return {UNWRITTEN, {}};
    if (c.how == IN_FLIGHT) return {c.write.thread == thread ? EARLY : RACE, c.write};
    if (unordered(c.write, thread)) return {RACE, c.write};
    note_read(c, thread, pc);
    return {};
  }
  Conflict write(Byte &c, unsigned thread, uint32_t pc, Written how) {
    if (how == BY_ATOMIC && c.write.epoch < first) return {UNWRITTEN, {}};
    if (c.write.epoch >= first) {
      if (c.how == IN_FLIGHT) return {c.write.thread == thread ? EARLY : RACE, c.write};
      if (!(how == BY_ATOMIC && c.how == BY_ATOMIC) && unordered(c.write, thread)) return {RACE, c.write};
    }
    if (c.read.epoch == epoch && unordered_readers(c, thread)) {
      if (c.read.thread == thread) c.read.thread = c.also;
      return {RACE, c.read};
    }
    c.write = {epoch, clock[thread / 32], pc, (uint16_t)thread};
    c.how = how;
    c.read.epoch = 0;
    return {};
  }
  void arrived(Byte &c, unsigned thread) { c.write.epoch = epoch; c.write.clock = clock[thread / 32]; c.how = PLAIN; }

  static constexpr const char *RACE = "a race", *UNWRITTEN = "which nothing in this block has written", *EARLY = "which cp.async brings, before the wait for it";

 private:
  uint32_t epoch = 1, first = 1, clock[WARPS], seen[WARPS][32][32];

  bool unordered(const Touch &t, unsigned thread) const {
    return t.epoch == epoch && t.thread != thread && (t.thread / 32 != thread / 32 || seen[thread / 32][thread % 32][t.thread % 32] <= t.clock);
  }
  bool unordered_readers(const Byte &c, unsigned thread) const {
    unsigned warp = thread / 32, others = c.lanes & ~(1u << thread % 32);
    if (c.warp == MANY || (c.warp != warp && c.lanes)) return true;
    for (unsigned a = 0; a < 32; a++) if (others >> a & 1 && seen[warp][thread % 32][a] <= c.read.clock) return true;
    return false;
  }
  // A reader that is ordered after all before it stands for them; else the readers are collected.
  void note_read(Byte &c, unsigned thread, uint32_t pc) {
    uint8_t warp = thread / 32;
    if (c.read.epoch != epoch || !unordered_readers(c, thread)) { c.lanes = 1u << thread % 32; c.warp = warp; }
    else if (c.warp == warp) c.lanes |= 1u << thread % 32;
    else c.warp = MANY;
    if (c.read.thread != thread) c.also = c.read.thread;
    c.read = {epoch, clock[warp], pc, (uint16_t)thread};
  }
};
}  // namespace emu
