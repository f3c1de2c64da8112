// kv_attention.cu -- decode attention over a quantized cache (the layout of kv_append.cu):
//
//   out = softmax(q . dequantize(K)^T * scale) . dequantize(V)
//
//   q, out  REAL [batch, queries, kv_heads * group, HEAD_DIM]   the last query sees all tokens, the one before it all but one, ...
//   tokens  starts[b] (0 without) to min(lengths[b] + fresh, capacity) of sequence b
//
// Partition: a block does some tokens of one kv head for all its rows, the group x queries vectors that attend to this head, so that
// each byte of the cache is read once (up to ROWS = 8 TILES rows; beyond, slices of ROWS rows). A warp takes every fourth step of 16:
//
//   blockIdx.x = split:   tokens  | split 0            | split 1            | ...       blockIdx.y = kv head and slice, blockIdx.z = b
//   warps of a block:             |0000|1111|2222|3333|0000|1111| ...                   (one digit: 4 tokens)
//
// Each warp has its own ring of STAGES steps in shared memory, filled by cp.async: 16 tokens x ROW bytes lie side by side, so that 32
// lanes copy whole sectors whatever HEAD_DIM is, and warps never wait for each other before the end. Rows in shared memory are an odd
// number of 16-byte chunks apart: 8 rows x 16 bytes (keys) and 4 even rows x 32 bytes (values) are each all 32 banks once.
//
// Both products run on tensor cores with the cache as the A operand of mma.m16n8k16: tokens (then dimensions) are the 16 rows, attending
// rows the 8 columns, so that a group of 4 or 8 wastes little. Their order of k is ours to choose, so a word of codes is a lane's share:
//
//   scores [16 tokens, 8] = K [16, d] . Q^T           a word of a key row = 4 (8) values of k; Q, permuted alike, stays in registers
//   out^T  [16 of d, 8]  += V^T [d, 16 tokens] . P^T  words of 4 tokens, interleaved by byte permutes; P through movmatrix
//
// Codes become halves without conversions: 1024 + code is code | 0x6400, and 1024 + zero is subtracted exactly, two values an
// instruction. The scale of a key multiplies the score, that of a value the probability. The online maximum is that of p * v_scale, so
// that what is rounded to half lies below 2**15 for any scales; it is brought up to date only where a row outgrows it eight times.
// Float q (and then p) is two halves, high and low.
//
// Ladder: 1. dequantize the cache, then torch: 4 to 9 times the bytes. 2. a warp per query head with fp32 products: the cache is read
// `group` times, with a conversion and an FMA per code and head. 3. a block per kv head: read once, but bound by FMAs at int4 with groups
// of 4 or more. 4. tensor cores with heads as the 16 rows: half of the accumulators idle. 5. this, tokens as rows. Splits are merged in
// order (kv_merge), so that results do not depend on which block is first (T. Dao et al., "Flash-Decoding for long-context inference").
#include "qg.cuh"
using namespace qg;

constexpr int WARPS = 4, THREADS = 32 * WARPS, STEP = 16, ROUND = WARPS * STEP, ROWS = 8 * TILES;
constexpr int ROW = (HEAD_DIM * BITS / 8 + 15) / 16 * 16, CHUNKS = ROW / 16, STRIDE = ROW + (CHUNKS % 2 ? 0 : 16);
constexpr int PARAM = 2 * sizeof(REAL);                       // bytes of (scale, zero point) of a token
constexpr int STAGE = 2 * STEP * (STRIDE + PARAM);         // keys, values, their params
constexpr int WORD = 32 / BITS, PAIRS = WORD / 2;          // codes in a word
constexpr int KEY_TILES = CHUNKS * PAIRS / 2;              // k-tiles of the scores
constexpr int SPANS = (ROW + 31) / 32, TILES_OUT = SPANS * PAIRS, DIMS = 16 * TILES_OUT;   // 8 words of a value row; m-tiles of the output
constexpr int PITCH = DIMS + 4;                            // floats between rows of the sums: conflict-free 16-byte stores
constexpr int PARTS = sizeof(REAL) == 4 ? 2 : 1;
constexpr float NOTHING = -1e30f, HIDDEN = -3e38f, LOG2E = 1.4426950408889634f, HEADROOM = 12.0f, LAG = 3.0f;
constexpr float LEAST_SCALE = 8.67361737988403547e-19f;    // 2**-60: below, a scale does not count for the maximum

// The tokens that a sequence attends to, from a multiple of STEP on, and how many of them each split does.
struct Tokens { int hidden, base, end, each; };   // those before `hidden` are masked
QG_DEVICE Tokens tokens_of(int b, const int *lengths, const int *starts, int fresh, int capacity, int splits) {
  int end = min(lengths[b] + fresh, capacity), hidden = starts ? min(max(starts[b], 0), end) : 0, base = hidden / STEP * STEP;
  return {hidden, base, end, max(((end - base + splits - 1) / splits + ROUND - 1) / ROUND * ROUND, 2 * ROUND)};
}

// --- codes to halves
struct Zero { __half2 large, small; };   // 1024 + zero, and -(64 + zero), of two values
QG_DEVICE Zero zeros(float a, float b) { return {__floats2half2_rn(1024.0f + a, 1024.0f + b), __floats2half2_rn(-64.0f - a, -64.0f - b)}; }

// A word of codes minus their zero points, two halves a register: codes (0, 1), (2, 3) of 8 bits; (0, 4), (1, 5), (2, 6), (3, 7) of 4 bits.
QG_DEVICE void expand(unsigned (&out)[PAIRS], unsigned word, const Zero &zero) {
  if (BITS == 8) {
    out[0] = bits<unsigned>(__hsub2(bits<__half2>(__byte_perm(word, 0x64646464, 0x4140)), zero.large));
    out[1] = bits<unsigned>(__hsub2(bits<__half2>(__byte_perm(word, 0x64646464, 0x4342)), zero.large));
  } else {
    __half2 sixteenth = __floats2half2_rn(0.0625f, 0.0625f);   // codes 4 bits up are 1024 + 16 code
    QG_UNROLL for (int i = 0; i < PAIRS; i += 2, word >>= 8) {
      out[i] = bits<unsigned>(__hsub2(bits<__half2>(lop3<AND_OR>(word, 0x000f000f, 0x64006400)), zero.large));
      out[i + 1] = bits<unsigned>(__hfma2(bits<__half2>(lop3<AND_OR>(word, 0x00f000f0, 0x64006400)), sixteenth, zero.small));
    }
  }
}

// Two floats as halves; part 1 is what part 0 leaves.
QG_DEVICE void split(unsigned (&out)[PARTS], float a, float b) {
  __half2 high = __floats2half2_rn(a, b);
  out[0] = bits<unsigned>(high);
  if (PARTS == 2) out[PARTS - 1] = bits<unsigned>(__floats2half2_rn(a - __low2float(high), b - __high2float(high)));
}

struct Param { float scale, zero; };
QG_DEVICE Param param(const void *p) {
  REAL pair[2];
  if (sizeof(REAL) == 4) {
    uint2 words = load8(p);
    memcpy(pair, &words, PARAM);
  } else {
    unsigned word = load4(p);
    memcpy(pair, &word, 4);
  }
  return {to_float(pair[0]), to_float(pair[1])};
}

QG_DEVICE void read(float (&out)[WORD], const REAL *p) {   // WORD neighbours, 8 or 16 bytes at a time
  constexpr int BYTES = WORD * sizeof(REAL);
  REAL values[WORD];
  if (BYTES == 8) {
    uint2 raw = load8(p);
    memcpy(values, &raw, 8);
  } else QG_UNROLL for (int i = 0; i < BYTES / 16; i++) {
    uint4 raw = load16((const char *)p + 16 * i);
    memcpy((char *)values + 16 * i, &raw, 16);
  }
  QG_UNROLL for (int i = 0; i < WORD; i++) out[i] = to_float(values[i]);
}

QG_DEVICE uint4 words(float4 v) { return make_uint4(bits<unsigned>(v.x), bits<unsigned>(v.y), bits<unsigned>(v.z), bits<unsigned>(v.w)); }

QG_DEVICE void write(REAL *p, float4 v) {   // four neighbours
  REAL values[4] = {from_float<REAL>(v.x), from_float<REAL>(v.y), from_float<REAL>(v.z), from_float<REAL>(v.w)};
  if (sizeof(REAL) == 4) store16(p, words(v));
  else {
    uint2 raw;
    memcpy(&raw, values, 8);
    store8(p, raw);
  }
}

// --- a warp's copy of 16 tokens into its ring; rows of tokens from `end` on become zeros. Eight lanes write to shared memory at once: a
// piece of a row or of rows that touch; where rows are padded and no multiple of 8 chunks, one chunk each of 8 rows.
struct Cache { const unsigned char *codes[2], *params[2]; };   // keys and values of one head of one sequence
QG_DEVICE void fetch(unsigned char *stage, const Cache &cache, int token, int end, int lane) {
  QG_UNROLL for (int j = 0; j < CHUNKS; j++) {
    int e = 32 * j + lane, row = e / CHUNKS, chunk = e % CHUNKS;
    if (CHUNKS % 2 == 0 && CHUNKS % 8) row = e / 8 / CHUNKS * 8 + e % 8, chunk = e / 8 % CHUNKS;
    int t = token + row % STEP;
    const unsigned char *from = (row < STEP ? cache.codes[0] : cache.codes[1]) + (size_t)t * ROW + 16 * chunk;
    copy16_async(stage + row * STRIDE + 16 * chunk, from, t < end);
  }
  constexpr int EACH = STEP * PARAM / 16;
  if (lane < 2 * EACH) {
    int chunk = lane % EACH;
    const unsigned char *from = (lane < EACH ? cache.params[0] : cache.params[1]) + (size_t)token * PARAM + 16 * chunk;
    copy16_async(stage + 2 * STEP * STRIDE + 16 * lane, from, token + chunk * (16 / PARAM) < end);
  }
}

// --- rows that attend, as a warp holds them. Lane (g, c) = (lane / 4, lane % 4) has columns 2c, 2c + 1 of every tile of 8 rows.
struct Attending {
  unsigned q[TILES][KEY_TILES][2][PARTS];   // B of the scores: row g
  float factor[TILES][2];                   // of the raw scores, in powers of two
  int limit[TILES][2];                      // tokens that the row sees, from Tokens.hidden on
  float top[TILES][2], sum[TILES][2];       // running maximum; this lane's part of the sum of exp2(score - top)
  float out[TILES][TILES_OUT][4];
};

// q divided by the power of two that brings its largest value into [1, 2), so that it fits a half. `from` null: a row of zeros.
QG_DEVICE float load_query(unsigned (&q)[KEY_TILES][2][PARTS], const REAL *from, int c) {
  float x[CHUNKS][WORD], largest = 0.0f;
  QG_UNROLL for (int j = 0; j < CHUNKS; j++) {
    int d = (4 * j + c) * WORD;
    if (from && d < HEAD_DIM) read(x[j], from + d);
    else QG_UNROLL for (int i = 0; i < WORD; i++) x[j][i] = 0.0f;
    QG_UNROLL for (int i = 0; i < WORD; i++) largest = fmaxf(largest, fabsf(x[j][i]));
  }
  QG_UNROLL for (int o = 1; o < 4; o <<= 1) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, o));
  unsigned exponent = min(max(bits<unsigned>(largest) >> 23, 27u), 227u);
  float inverse = bits<float>((254 - exponent) << 23);
  QG_UNROLL for (int j = 0; j < CHUNKS; j++) QG_UNROLL for (int p = 0; p < PAIRS; p++)
    split(q[(j * PAIRS + p) / 2][p % 2], x[j][BITS == 8 ? 2 * p : p] * inverse, x[j][BITS == 8 ? 2 * p + 1 : p + 4] * inverse);
  return bits<float>(exponent << 23);
}

QG_DEVICE void score(float (&s)[TILES][4], const Attending &rows, const unsigned char *stage, int g, int c) {
  const unsigned char *params = stage + 2 * STEP * STRIDE;
  Param lower = param(params + g * PARAM), upper = param(params + (g + 8) * PARAM);
  Zero zero[2] = {zeros(lower.zero, lower.zero), zeros(upper.zero, upper.zero)};
  QG_UNROLL for (int n = 0; n < TILES; n++) QG_UNROLL for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
  QG_UNROLL for (int j = 0; j < CHUNKS; j++) {
    const unsigned char *word = stage + g * STRIDE + 16 * j + 4 * c;
    unsigned low[PAIRS], high[PAIRS];   // tokens g and g + 8
    expand(low, load4(word), zero[0]);
    expand(high, load4(word + 8 * STRIDE), zero[1]);
    QG_UNROLL for (int t = 0; t < PAIRS / 2; t++) {
      unsigned a[4] = {low[2 * t], high[2 * t], low[2 * t + 1], high[2 * t + 1]};
      QG_UNROLL for (int n = 0; n < TILES; n++) QG_UNROLL for (int part = 0; part < PARTS; part++) {
        unsigned b[2] = {rows.q[n][j * PAIRS / 2 + t][0][part], rows.q[n][j * PAIRS / 2 + t][1][part]};
        mma_float<__half>(s[n], a, b);
      }
    }
  }
  QG_UNROLL for (int n = 0; n < TILES; n++) QG_UNROLL for (int i = 0; i < 4; i++)
    s[n][i] *= (i < 2 ? lower.scale : upper.scale) * rows.factor[n][i % 2];
}

// Scores -> weights p * v_scale in s, with the maximum and all that is measured by it brought up to date where it is outgrown.
// `token`: of lane row 0, counted from Tokens.hidden, so that an unsigned comparison finds those before it as well as those behind limit.
QG_DEVICE void weigh(float (&s)[TILES][4], Attending &rows, const unsigned char *stage, int token, int g) {
  const unsigned char *params = stage + 2 * STEP * STRIDE + STEP * PARAM;
  float scale[2] = {param(params + g * PARAM).scale, param(params + (g + 8) * PARAM).scale};
  float offset[2] = {log2f(fmaxf(scale[0], LEAST_SCALE)) - HEADROOM, log2f(fmaxf(scale[1], LEAST_SCALE)) - HEADROOM};
  bool outgrown = false;
  QG_UNROLL for (int n = 0; n < TILES; n++) QG_UNROLL for (int i = 0; i < 4; i++) {
    if ((unsigned)(token + g + 8 * (i / 2)) >= (unsigned)rows.limit[n][i % 2]) s[n][i] = HIDDEN;
    outgrown |= s[n][i] + offset[i / 2] > rows.top[n][i % 2] + LAG;
  }
  if (__any_sync(ALL, outgrown)) QG_UNROLL for (int n = 0; n < TILES; n++) QG_UNROLL for (int j = 0; j < 2; j++) {
    float top = fmaxf(rows.top[n][j], fmaxf(s[n][j] + offset[0], s[n][2 + j] + offset[1]));
    QG_UNROLL for (int o = 4; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
    float shrink = exp2f(rows.top[n][j] - top);
    rows.top[n][j] = top;
    rows.sum[n][j] *= shrink;
    QG_UNROLL for (int t = 0; t < TILES_OUT; t++) rows.out[n][t][j] *= shrink, rows.out[n][t][2 + j] *= shrink;
  }
  QG_UNROLL for (int n = 0; n < TILES; n++) QG_UNROLL for (int i = 0; i < 4; i++) {
    float p = exp2f(s[n][i] - rows.top[n][i % 2]);
    rows.sum[n][i % 2] += p;
    s[n][i] = s[n][i] == HIDDEN ? 0.0f : p * scale[i / 2];   // a hidden token's scale may be anything
  }
}

QG_DEVICE void add_values(Attending &rows, const float (&weight)[TILES][4], const unsigned char *stage, int g, int c) {
  const unsigned char *params = stage + 2 * STEP * STRIDE + STEP * PARAM, *values = stage + STEP * STRIDE;
  Zero zero[2];   // tokens 2c, 2c + 1 and 2c + 8, 2c + 9
  QG_UNROLL for (int r = 0; r < 2; r++) {
    const unsigned char *pair = params + (2 * c + 8 * r) * PARAM;
    zero[r] = zeros(param(pair).zero, param(pair + PARAM).zero);
  }
  unsigned p[TILES][PARTS][2];
  QG_UNROLL for (int n = 0; n < TILES; n++) QG_UNROLL for (int r = 0; r < 2; r++) {
    unsigned halves[PARTS];
    split(halves, weight[n][2 * r], weight[n][2 * r + 1]);
    QG_UNROLL for (int part = 0; part < PARTS; part++) p[n][part][r] = transpose8(halves[part]);
  }
  QG_UNROLL for (int i = 0; i < SPANS; i++) {
    // The last words of an odd number of chunks are the next row's (or the first params): they end up in dimensions that nobody reads.
    const unsigned char *from = values + 2 * c * STRIDE + 4 * (8 * i + g);
    unsigned codes[2][WORD];   // [tokens][dimension]: the two tokens of a register, minus their zero points
    QG_UNROLL for (int r = 0; r < 2; r++) {
      unsigned first = load4(from + 8 * r * STRIDE), second = load4(from + (8 * r + 1) * STRIDE), half[PAIRS];
      expand(half, __byte_perm(first, second, BITS == 8 ? 0x5140 : 0x5410), zero[r]);
      QG_UNROLL for (int d = 0; d < PAIRS; d++) codes[r][d] = half[d];
      expand(half, __byte_perm(first, second, BITS == 8 ? 0x7362 : 0x7632), zero[r]);
      QG_UNROLL for (int d = 0; d < PAIRS; d++) codes[r][PAIRS + d] = half[d];
    }
    QG_UNROLL for (int t = 0; t < PAIRS; t++) {
      unsigned a[4] = {codes[0][2 * t], codes[0][2 * t + 1], codes[1][2 * t], codes[1][2 * t + 1]};
      QG_UNROLL for (int n = 0; n < TILES; n++) QG_UNROLL for (int part = 0; part < PARTS; part++)
        mma_float<__half>(rows.out[n][i * PAIRS + t], a, p[n][part]);
    }
  }
}

// The warps' rows to shared memory: sums [WARPS][ROWS][PITCH], then (maximum, sum) [WARPS][ROWS][2].
QG_DEVICE void put(unsigned char *shared, Attending &rows, int warp, int g, int c) {
  float *sums = (float *)shared + warp * ROWS * PITCH, *tops = (float *)shared + WARPS * ROWS * PITCH + warp * ROWS * 2;
  bool turned = PAIRS == 4 && g % 2;   // of two pieces, odd lanes store the second first: else they would meet the banks of even lanes
  QG_UNROLL for (int n = 0; n < TILES; n++) QG_UNROLL for (int j = 0; j < 2; j++) {
    int row = 8 * n + 2 * c + j;
    QG_UNROLL for (int i = 0; i < SPANS; i++) QG_UNROLL for (int t = 0; t < PAIRS; t += 2) {
      unsigned piece[4];
      QG_UNROLL for (int d = 0; d < 4; d++) {
        int tile = i * PAIRS + t + d / 2, e = 2 * (d % 2) + j;
        piece[d] = bits<unsigned>(turned ? rows.out[n][PAIRS == 4 ? tile ^ 2 : tile][e] : rows.out[n][tile][e]);
      }
      store16(sums + row * PITCH + (8 * i + g) * WORD + 2 * (turned ? t ^ 2 : t), make_uint4(piece[0], piece[1], piece[2], piece[3]));
    }
    float sum = rows.sum[n][j];
    QG_UNROLL for (int o = 4; o < 32; o <<= 1) sum += __shfl_xor_sync(ALL, sum, o);
    if (g == 0) store8(tops + 2 * row, make_uint2(bits<unsigned>(rows.top[n][j]), bits<unsigned>(sum)));
  }
}

// Four neighbours of the sum of `count` partial results, which lie sums_apart floats apart, with the maximum and the sum of all of them.
struct Merged { float4 v; float top, sum; };
QG_DEVICE Merged merge(const float *tops, int tops_apart, const float *sums, int sums_apart, int count) {
  Merged all = {{0.0f, 0.0f, 0.0f, 0.0f}, NOTHING, 0.0f};
  for (int i = 0; i < count; i++) all.top = fmaxf(all.top, bits<float>(load8(tops + i * tops_apart).x));
  for (int i = 0; i < count; i++) {
    uint2 pair = load8(tops + i * tops_apart);
    uint4 v = load16(sums + (size_t)i * sums_apart);
    float weight = exp2f(bits<float>(pair.x) - all.top);
    all.sum += weight * bits<float>(pair.y);
    all.v.x += weight * bits<float>(v.x), all.v.y += weight * bits<float>(v.y);
    all.v.z += weight * bits<float>(v.z), all.v.w += weight * bits<float>(v.w);
  }
  return all;
}
QG_DEVICE float4 quotient(const Merged &m) {   // a sequence without tokens gives 0
  float r = m.sum > 0.0f ? 1.0f / m.sum : 0.0f;
  return {m.v.x * r, m.v.y * r, m.v.z * r, m.v.w * r};
}

// Row r of a kv head, in q and out: query r / group, head r % group of the group.
struct Shape { int kv_heads, group, queries; };
QG_DEVICE size_t vector(const Shape &shape, int b, int head, int r) {
  return (((size_t)b * shape.queries + r / shape.group) * shape.kv_heads * shape.group + head * shape.group + r % shape.group) * HEAD_DIM;
}

// With one split (gridDim.x) the result goes to out; else to partial [batch, kv_heads, group * queries, splits, HEAD_DIM] and tops [.., 2].
QG_KERNEL __launch_bounds__(THREADS) kv_attention(const REAL *q, const unsigned char *codes, const REAL *params, const int *lengths,
                                                  const int *starts, REAL *out, float *partial, float *tops, float scale, int fresh,
                                                  int kv_heads, int group, int queries, int capacity) {
  QG_DYNAMIC_SHARED(shared);
  Shape shape = {kv_heads, group, queries};
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4, b = blockIdx.z;
  int slices = gridDim.y / kv_heads, head = blockIdx.y / slices, first = blockIdx.y % slices * ROWS;
  int count = min(group * queries - first, ROWS);
  Tokens tokens = tokens_of(b, lengths, starts, fresh, capacity, gridDim.x);
  int begin = tokens.base + blockIdx.x * tokens.each, end = min(begin + tokens.each, tokens.end);
  if (begin >= end && blockIdx.x) return;   // block 0 stays, for a sequence without tokens

  Attending rows;
  QG_UNROLL for (int n = 0; n < TILES; n++) {
    bool exists = 8 * n + g < count;
    int row = exists ? first + 8 * n + g : 0, limit = exists ? max(tokens.end - (queries - 1 - row / group) - tokens.hidden, 0) : 0;
    float unit = load_query(rows.q[n], exists ? q + vector(shape, b, head, row) : nullptr, c) * scale * LOG2E;
    QG_UNROLL for (int j = 0; j < 2; j++) {
      rows.factor[n][j] = __shfl_sync(ALL, unit, 4 * (2 * c + j));
      rows.limit[n][j] = __shfl_sync(ALL, limit, 4 * (2 * c + j));
      rows.top[n][j] = NOTHING, rows.sum[n][j] = 0.0f;
    }
    QG_UNROLL for (int t = 0; t < TILES_OUT; t++) QG_UNROLL for (int i = 0; i < 4; i++) rows.out[n][t][i] = 0.0f;
  }

  size_t row = ((size_t)b * kv_heads + head) * capacity, plane = (size_t)gridDim.z * kv_heads * capacity;   // of keys, of values
  const unsigned char *pairs = (const unsigned char *)params;
  Cache cache = {{codes + row * ROW, codes + (plane + row) * ROW}, {pairs + row * PARAM, pairs + (plane + row) * PARAM}};
  unsigned char *ring = shared + warp * STAGES * STAGE;
  int steps = (end - begin - warp * STEP + ROUND - 1) / ROUND, start = begin + warp * STEP;
  QG_UNROLL for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) fetch(ring + s * STAGE, cache, start + s * ROUND, end, lane);
    copy_commit();
  }
  for (int s = 0; s < steps; s++) {
    copy_wait<STAGES - 2>();
    __syncwarp();   // all lanes' copies of this step are there, and all are done with the step before, whose place the next copy takes
    int next = s + STAGES - 1;
    if (next < steps) fetch(ring + next % STAGES * STAGE, cache, start + next * ROUND, end, lane);
    copy_commit();
    const unsigned char *stage = ring + s % STAGES * STAGE;
    float weight[TILES][4];
    score(weight, rows, stage, g, c);
    weigh(weight, rows, stage, start + s * ROUND - tokens.hidden, g);
    add_values(rows, weight, stage, g, c);
  }
  copy_wait<0>();
  __syncthreads();   // the rings become the sums of the warps
  put(shared, rows, warp, g, c);
  __syncthreads();

  for (int e = threadIdx.x; e < count * (HEAD_DIM / 4); e += THREADS) {
    int r = e / (HEAD_DIM / 4), d = e % (HEAD_DIM / 4) * 4, whole = first + r;
    const float *sums = (const float *)shared;
    Merged m = merge(sums + WARPS * ROWS * PITCH + 2 * r, 2 * ROWS, sums + r * PITCH + d, ROWS * PITCH, WARPS);
    if (gridDim.x == 1) {
      write(out + vector(shape, b, head, whole) + d, quotient(m));
      continue;
    }
    size_t place = (((size_t)b * kv_heads + head) * group * queries + whole) * gridDim.x + blockIdx.x;
    store16(partial + place * HEAD_DIM + d, words(m.v));
    if (d == 0) store8(tops + 2 * place, make_uint2(bits<unsigned>(m.top), bits<unsigned>(m.sum)));
  }
}

// A warp adds up the splits of one row, in their order.
QG_KERNEL __launch_bounds__(THREADS) kv_merge(const float *partial, const float *tops, const int *lengths, const int *starts, REAL *out,
                                              int fresh, int rows, int kv_heads, int group, int queries, int capacity, int splits) {
  int row = blockIdx.x * WARPS + threadIdx.x / 32, r = row % (group * queries), head = row / (group * queries), b = head / kv_heads;
  if (row >= rows) return;
  Tokens tokens = tokens_of(b, lengths, starts, fresh, capacity, splits);
  int count = max((tokens.end - tokens.base + tokens.each - 1) / tokens.each, 1);
  REAL *to = out + vector({kv_heads, group, queries}, b, head % kv_heads, r);
  for (int d = threadIdx.x % 32 * 4; d < HEAD_DIM; d += 128) {
    size_t place = (size_t)row * splits;
    write(to + d, quotient(merge(tops + place * 2, 2, partial + place * HEAD_DIM + d, HEAD_DIM, count)));
  }
}
