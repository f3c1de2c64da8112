// warp.h -- what the lanes of a warp do together, for emu.h: shuffles, votes, ldmatrix, mma (fragment layouts of the PTX ISA), cp.async.
#pragma once
namespace emu {
template <class T> QG_SEEN T shuffle(unsigned mask, T value, unsigned source) {
  struct Operand { T value, result; unsigned source; } mine{value, value, source};
  if (Group *g = meet(mask, SHUFFLE, &mine, QG_PC)) {
    for (unsigned l = 0; l < 32; l++) if (mask >> l & 1) {
      auto *to = (Operand *)g->operand[l];
      if (!(mask >> to->source & 1)) fail("lane %u reads lane %u in a shuffle, which is not in its mask %08x, at {%p}", l, to->source, mask, QG_PC);
      to->result = ((Operand *)g->operand[to->source])->value;
    }
    release(g);
  }
  return mine.result;
}
QG_SEEN unsigned vote(unsigned mask, bool predicate) {
  struct Operand { bool predicate; unsigned result; } mine{predicate, 0};
  if (Group *g = meet(mask, VOTE, &mine, QG_PC)) {
    unsigned r = 0;
    for (unsigned l = 0; l < 32; l++) if (mask >> l & 1) r |= unsigned(((Operand *)g->operand[l])->predicate) << l;
    for (unsigned l = 0; l < 32; l++) if (mask >> l & 1) ((Operand *)g->operand[l])->result = r;
    release(g);
  }
  return mine.result;
}

// ldmatrix .x4 / .x2: matrix i has 8 rows of 16 bytes, whose addresses lanes 8i .. 8i+7 give; lane l gets bytes 4(l % 4) .. +3 of row l / 4.
// .trans moves 16-bit elements: lane l gets column l / 4 of rows 2(l % 4), +1.
template <int N, bool TRANSPOSED> QG_SEEN void ldmatrix(unsigned *r, const void *row) {
  struct Operand { unsigned *r; const unsigned char *row; } mine{r, (const unsigned char *)row};
  if ((int)B.now->lane < 8 * N) access(row, 16, READ, QG_PC);
  Group *g = meet(~0u, LDMATRIX, &mine, QG_PC);
  if (!g) return;
  for (int i = 0; i < N; i++) for (int l = 0; l < 32; l++) {
    unsigned *to = ((Operand *)g->operand[l])->r + i;
    auto rows = (Operand **)g->operand + 8 * i;
    if (!TRANSPOSED) { memcpy(to, rows[l / 4]->row + 4 * (l % 4), 4); continue; }
    uint16_t pair[2];
    for (int e = 0; e < 2; e++) memcpy(&pair[e], rows[2 * (l % 4) + e]->row + 2 * (l / 4), 2);
    memcpy(to, pair, 4);
  }
  release(g);
}

// movmatrix .trans: element (i, j) is half j % 2 of lane 4i + j / 2.
QG_SEEN unsigned transpose8(unsigned r) {
  struct Operand { unsigned r, result; } mine{r, 0};
  if (Group *g = meet(~0u, MOVMATRIX, &mine, QG_PC)) {
    for (int l = 0; l < 32; l++) for (int e = 0; e < 2; e++) {
      auto *from = (Operand *)g->operand[4 * (2 * (l % 4) + e) + l / 8];
      ((Operand *)g->operand[l])->result |= (from->r >> 16 * (l / 4 % 2) & 0xffff) << 16 * e;
    }
    release(g);
  }
  return mine.result;
}

// --- tensor cores: D[16][8] += A[16][k] B[k][8], k in 8 registers of 4 bytes. Lane l has of A, registers r: row l / 4 + 8 (r % 2), words
// l % 4 + 4 (r / 2); of B column l / 4, words l % 4 + 4 r; of D rows l / 4 and l / 4 + 8, columns 2 (l % 4) and + 1.
// Every lane puts its A and B into the warp's tile; the last makes the products, and every lane adds its own to D.
struct Tile { alignas(32) unsigned a[16][8], b[8][8], d[16][8]; };
inline Tile tiles[WARPS];
QG_UNCHECKED inline Tile &put(const unsigned *a, const unsigned *b) {
  Tile &t = tiles[B.now->warp];
  int row = B.now->lane >> 2, word = B.now->lane & 3;
  for (int r = 0; r < 4; r++) t.a[row + 8 * (r & 1)][word + 4 * (r >> 1)] = a[r];
  for (int r = 0; r < 2; r++) t.b[row][word + 4 * r] = b[r];
  return t;
}
template <class N> QG_UNCHECKED inline void add(N *d, const Tile &t) {
  int row = B.now->lane >> 2, column = 2 * (B.now->lane & 3);
  for (int i = 0; i < 4; i++) {
    N product;
    memcpy(&product, &t.d[row + 8 * (i >> 1)][column + (i & 1)], 4);
    d[i] += product;
  }
}
template <bool UNSIGNED> QG_UNCHECKED inline __m256i widened(const unsigned *bytes) {   // 16 bytes as 16-bit integers
  __m128i v = _mm_load_si128((const __m128i *)bytes);
  return UNSIGNED ? _mm256_cvtepu8_epi16(v) : _mm256_cvtepi8_epi16(v);
}
template <bool UNSIGNED_A> QG_UNCHECKED inline void multiply_int8(Tile &t) {
  __m256i column[8][2];
  for (int j = 0; j < 8; j++) for (int h = 0; h < 2; h++) column[j][h] = widened<false>(t.b[j] + 4 * h);
  for (int i = 0; i < 16; i++) {
    __m256i low = widened<UNSIGNED_A>(t.a[i]), high = widened<UNSIGNED_A>(t.a[i] + 4), s[8];   // s[j]: eight parts of D[i][j]
    for (int j = 0; j < 8; j++) s[j] = _mm256_add_epi32(_mm256_madd_epi16(low, column[j][0]), _mm256_madd_epi16(high, column[j][1]));
    __m256i p = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
    __m256i q = _mm256_hadd_epi32(_mm256_hadd_epi32(s[4], s[5]), _mm256_hadd_epi32(s[6], s[7]));
    _mm256_store_si256((__m256i *)t.d[i], _mm256_add_epi32(_mm256_permute2x128_si256(p, q, 0x20), _mm256_permute2x128_si256(p, q, 0x31)));
  }
}
template <bool UNSIGNED_A> QG_SEEN void mma_int8(int *d, const unsigned *a, const unsigned *b) {
  Tile &t = put(a, b);
  if (Group *g = meet(~0u, MMA, nullptr, QG_PC)) {
    QG_COUNT(MMA_INT8);
    multiply_int8<UNSIGNED_A>(t);
    release(g);
  }
  add((unsigned *)d, t);   // modulo 2**32
}
template <bool BFLOAT> QG_UNCHECKED inline __m256 floats(const unsigned *pairs) {   // 8 halves or bfloats as floats
  __m128i v = _mm_load_si128((const __m128i *)pairs);
  return BFLOAT ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)) : _mm256_cvtph_ps(v);
}
// The products are exact in float; their sums are rounded one by one in the order of k, which the device does otherwise.
template <bool BFLOAT> QG_UNCHECKED inline void multiply_float(Tile &t) {
  alignas(32) float A[16][16], column[16], Bm[16][8];
  for (int i = 0; i < 16; i++) for (int h = 0; h < 2; h++) _mm256_store_ps(&A[i][8 * h], floats<BFLOAT>(t.a[i] + 4 * h));
  for (int j = 0; j < 8; j++) {
    for (int h = 0; h < 2; h++) _mm256_store_ps(&column[8 * h], floats<BFLOAT>(t.b[j] + 4 * h));
    for (int k = 0; k < 16; k++) Bm[k][j] = column[k];
  }
  for (int i = 0; i < 16; i++) {
    __m256 sum = _mm256_setzero_ps();
    for (int k = 0; k < 16; k++) sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_set1_ps(A[i][k]), _mm256_load_ps(Bm[k])));
    _mm256_store_ps((float *)t.d[i], sum);
  }
}
template <bool BFLOAT> QG_SEEN void mma_float(float *d, const unsigned *a, const unsigned *b) {
  Tile &t = put(a, b);
  if (Group *g = meet(~0u, MMA, nullptr, QG_PC)) {
    QG_COUNT(MMA_FLOAT);
    multiply_float<BFLOAT>(t);
    release(g);
  }
  add(d, t);
}

// --- cp.async: the bytes arrive when the group is waited for, not before.
QG_SEEN void copy_async(void *to, const void *from, unsigned bytes, unsigned valid) {
  Copies &c = my_copies();
  if (((uintptr_t)to | (valid ? (uintptr_t)from : 0)) % bytes) fail("cp.async of %u bytes at an address that is not a multiple of %u, at {%p}", bytes, bytes, QG_PC);
  if (valid) access(from, valid, READ, QG_PC);
  copy_issued(to, bytes, QG_PC);
  if (c.first == c.end) c.first = c.end = 0;
  if (c.end == c.room) c.queue = (Copy *)realloc(c.queue, (c.room = 2 * c.room + 16) * sizeof(Copy));
  c.queue[c.end++] = {to, from, bytes, valid, c.committed};
}
QG_UNCHECKED inline void copy_commit() { my_copies().committed++; }
QG_UNCHECKED inline void copy_wait(unsigned pending) {
  Copies &c = my_copies();
  for (; c.first < c.end && c.queue[c.first].group + pending < c.committed; c.first++) {
    const Copy &copy = c.queue[c.first];
    memcpy(copy.to, copy.from, copy.valid);
    memset((char *)copy.to + copy.valid, 0, copy.bytes - copy.valid);
    copy_arrived(copy.to, copy.bytes);
  }
}
}  // namespace emu

template <class T> __forceinline__ T __shfl_sync(unsigned m, T v, int source, int w = 32) {
  unsigned l = emu::B.now->lane;
  return emu::shuffle(m, v, (l & ~(w - 1)) | (source & (w - 1)));
}
template <class T> __forceinline__ T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
  unsigned l = emu::B.now->lane, s = l ^ x;
  return emu::shuffle(m, v, (s & ~(w - 1)) > (l & ~(w - 1)) ? l : s);
}
template <class T> __forceinline__ T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  unsigned l = emu::B.now->lane, s = l + d;
  return emu::shuffle(m, v, (l & (w - 1)) + d >= (unsigned)w ? l : s);
}
template <class T> __forceinline__ T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  unsigned l = emu::B.now->lane;
  return emu::shuffle(m, v, (l & (w - 1)) < d ? l : l - d);
}
__forceinline__ unsigned __ballot_sync(unsigned m, int p) { return emu::vote(m, p != 0); }
__forceinline__ int __any_sync(unsigned m, int p) { return emu::vote(m, p != 0) != 0; }
__forceinline__ int __all_sync(unsigned m, int p) { return emu::vote(m, p != 0) == m; }
