// traffic.h -- what a kernel asks of memory, for checks.h: sectors of global memory, wavefronts of shared memory, by place in the code.
//
// An access of a warp is what its lanes do at one place in the code, at their n-th visit of it since the warp last met. Global memory moves
// in sectors of 32 bytes. Shared memory has 32 banks of 4 bytes; a wavefront serves one word of each bank to all lanes that ask for it:
// accesses of up to 4 bytes take the lanes of a warp together, those of 8 bytes by halves, of 16 bytes (ldmatrix, cp.async) by quarters.
#pragma once
namespace emu {
struct Place {   // as profile.py reads it
  uint64_t pc, shared, kind, warps, lanes, bytes, served, least;   // served: sectors or wavefronts; least: how few could have done it
};
struct Asked { uint32_t place; uint32_t bytes; uintptr_t at; };
struct Together { unsigned lanes; uint32_t bytes; uintptr_t at[32]; };

class Traffic {
 public:
  std::vector<Place> places;

  void launch_starts() {
    places.clear();
    index.clear();
    memset(recent, 0, sizeof recent);
    for (auto &l : lanes) l.clear();
  }
  void note(unsigned thread, uintptr_t at, unsigned bytes, bool shared, Access kind, uint64_t pc) {
    lanes[thread].push_back({place(pc, shared, kind), bytes, at});
    busy[thread / 32] = true;
  }
  // Puts together what the lanes of a warp did.
  void warp_met(unsigned warp) {
    if (!busy[warp]) return;
    busy[warp] = false;
    together.resize(places.size());
    visits.assign(places.size(), 0);
    used.assign(places.size(), 0);
    for (unsigned l = 0; l < 32; l++) {
      auto &log = lanes[warp * 32 + l];
      for (const Asked &a : log) {
        auto &all = together[a.place];
        unsigned n = visits[a.place]++;
        if (n == all.size()) all.emplace_back();
        if (n == used[a.place]) { all[n].lanes = 0; used[a.place]++; }
        all[n].at[__builtin_popcount(all[n].lanes)] = a.at;
        all[n].lanes |= 1u << l;
        all[n].bytes = a.bytes;
      }
      for (const Asked &a : log) visits[a.place] = 0;
      log.clear();
    }
    for (size_t p = 0; p < places.size(); p++) for (unsigned n = 0; n < used[p]; n++) count(places[p], together[p][n]);
  }

 private:
  std::map<std::tuple<uint64_t, bool, Access>, uint32_t> index;
  struct Recent { uint64_t pc; uint32_t place; bool shared; Access kind; } recent[1024];
  std::vector<Asked> lanes[THREADS];
  bool busy[WARPS] = {};   // whether its lanes have anything to put together
  std::vector<std::vector<Together>> together;
  std::vector<unsigned> visits, used;

  uint32_t place(uint64_t pc, bool shared, Access kind) {
    Recent &r = recent[(pc ^ pc >> 10) & 1023];
    if (r.pc == pc && r.shared == shared && r.kind == kind) return r.place;
    auto [found, fresh] = index.try_emplace({pc, shared, kind}, (uint32_t)places.size());
    if (fresh) places.push_back({pc, shared, kind});
    r = {pc, found->second, shared, kind};
    return found->second;
  }
  static void count(Place &p, Together &t) {
    unsigned n = __builtin_popcount(t.lanes);
    p.warps++;
    p.lanes += n;
    p.bytes += (uint64_t)n * t.bytes;
    if (p.shared) wavefronts(p, t); else sectors(p, t, n);
  }
  static void sectors(Place &p, Together &t, unsigned n) {
    if (!std::is_sorted(t.at, t.at + n)) std::sort(t.at, t.at + n);
    uintptr_t next = 0, sector = 0;   // the first address, and the first sector + 1, that were not counted yet
    uint64_t unique = 0;
    for (unsigned i = 0; i < n; i++) {
      uintptr_t from = t.at[i], to = from + t.bytes;
      if (to > next) { unique += to - std::max(from, next); next = to; }
      uintptr_t last = (to - 1) / 32 + 1, before = std::max(sector, from / 32);
      if (last > before) { p.served += last - before; sector = last; }
    }
    p.least += (unique + 31) / 32;
  }
  static void wavefronts(Place &p, const Together &t) {
    unsigned in_phase = t.bytes <= 4 ? 32 : t.bytes <= 8 ? 16 : 8;
    for (unsigned phase = 0, i = 0; phase < 32; phase += in_phase) {
      unsigned mine = t.lanes >> phase & (in_phase == 32 ? ~0u : (1u << in_phase) - 1);
      if (!mine) continue;
      uintptr_t words[32 * 4];
      unsigned n = 0, per_bank[32] = {}, most = 0;
      for (; mine; mine &= mine - 1, i++)
        for (uintptr_t w = t.at[i] / 4; w <= (t.at[i] + t.bytes - 1) / 4; w++) words[n++] = w;
      std::sort(words, words + n);
      for (unsigned k = 0; k < n; k++)   // an atomic takes its turn at a word, everything else shares it
        if (p.kind == ATOMIC || k == 0 || words[k] != words[k - 1]) most = std::max(most, ++per_bank[words[k] % 32]);
      p.served += most;
      p.least++;
    }
  }
};

// Which bytes of a tensor were read and written, and by which block.
struct Touched {
  std::vector<uint64_t> read, written;
  static constexpr uint32_t SEVERAL = ~0u;
  std::vector<uint32_t> writer, reader;   // of each byte: its block + 1, or several
  void mark(std::vector<uint64_t> &bits, size_t bytes, size_t from, size_t n) {
    if (bits.empty()) bits.resize(bytes / 64 + 1);
    for (size_t b = from; b < from + n;) {
      size_t some = std::min<size_t>(64 - b % 64, from + n - b);
      bits[b / 64] |= (some == 64 ? ~0ull : (1ull << some) - 1) << b % 64;
      b += some;
    }
  }
  static uint64_t count(const std::vector<uint64_t> &bits) {
    uint64_t n = 0;
    for (uint64_t b : bits) n += __builtin_popcountll(b);
    return n;
  }
};
}  // namespace emu
