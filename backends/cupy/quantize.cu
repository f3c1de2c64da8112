// quantize.cu -- float -> integers of at most 8 bits: rows with their own scales, or a whole tensor with one.
//
// quantize_rows: each row takes its scale from its own range (dynamic, "per token"), or has it given. A team of LANES threads a row:
//
//     LANES = 32                                          LANES = BLOCK = 256 or 512
//     block 0   warp 0   row 0   |v v v v ... |           block 0   row 0   |v v v v v v v v ... |    v: a vector of 16 bytes, KEEP of
//               warp 1   row 1   |            |           block 1   row 1   |                    |    them in a thread's registers
//
// tensor_range + quantize_tensor: one scale for everything, nothing waits for the host. A tile is BLOCK * TILE vectors:
//
//     tensor_range      blocks 0 .. parts-1, each strides over the tiles and writes its two extremes to part[]
//     quantize_tensor   every block loads a tile, reduces the extremes (parts <= 128 <= BLOCK: 1 KB, cached), quantizes the tile
//
// quantize_tensor alone serves a static scale.
//
// Ladder. 1. Range and quantization as two kernels per row: x is read twice. 2. One kernel, a thread an element: a row is read twice, by
// the second time out of the cache, if it is still there. 3. (this) The row waits in registers for its range, so x is read once, 16 bytes
// a thread, KEEP independent loads in flight; the integers leave 4 or 8 bytes a thread, adjacent lanes to adjacent bytes. 4. No division
// an element (rows.cuh, Grid): the arithmetic stays below what memory needs.
//
// x [rows, k], `stride` elements from row to row (k, or a multiple of 16 bytes like k); q [rows, k] bytes, any k. Arrays begin at
// multiples of 16 bytes. REAL, LANES, KEEP: see rows.cuh.
#include "rows.cuh"
#define TILE 4

using namespace qg;

// Outputs and given parameters as in Quantization.
QG_KERNEL __launch_bounds__(BLOCK)
quantize_rows(const REAL *x, uint8_t *q, REAL *scale, uint8_t *zero, int *sums, const float *given_scale, const int *given_zero, int every,
              int rows, int k, int stride, int low, int high, int symmetric) {
  int index = blockIdx.x * (BLOCK / LANES) + threadIdx.x / LANES;
  if (index >= rows) return;   // a whole warp: rows of several warps have a block of their own
  Row row(index, k);
  const REAL *from = x + row.first + size_t(index) * (stride - k);
  uint4 kept[KEEP];
  each_kept(row, [&](int i, int j) { kept[i] = load16(from + j * V); });
  auto element = [&](int e) { return to_float(from[e]); };
  quantize_row(index, row, kept, element, Quantization{q, scale, zero, sums, given_scale, given_zero, every, low, high, symmetric});
}

// part [gridDim.x][2]: how far a block's share of x [count] reaches below and above 0.
QG_KERNEL __launch_bounds__(BLOCK)
tensor_range(const REAL *x, float *part, int count) {
  int whole = count / V;
  Range range;
  for (int start = blockIdx.x * BLOCK * TILE; start < whole; start += gridDim.x * BLOCK * TILE) {
    uint4 tile[TILE];
    QG_UNROLL for (int i = 0, j = start + threadIdx.x; i < TILE; i++, j += BLOCK) tile[i] = j < whole ? load16(x + j * V) : uint4{};
    QG_UNROLL for (int i = 0; i < TILE; i++) range.add(tile[i]);
  }
  int left = whole * V + threadIdx.x;
  if (blockIdx.x == 0 && left < count) range.add(to_float(x[left]));
  range.over<BLOCK>();
  if (threadIdx.x == 0) store8(part + 2 * blockIdx.x, make_uint2(__float_as_uint(range.below), __float_as_uint(range.above)));
}

// part, parts: what tensor_range found; scale, zero: [1], written. Or part null, given_scale [1] and given_zero [1] or null.
QG_KERNEL __launch_bounds__(BLOCK)
quantize_tensor(const REAL *x, uint8_t *q, REAL *scale, uint8_t *zero, const float *part, int parts, const float *given_scale,
                const int *given_zero, int count, int low, int high, int symmetric) {
  int whole = count / V, start = blockIdx.x * BLOCK * TILE;
  uint4 tile[TILE];   // on its way while the range is found
  QG_UNROLL for (int i = 0, j = start + threadIdx.x; i < TILE; i++, j += BLOCK) tile[i] = j < whole ? load16(x + j * V) : uint4{};
  Quantization to{q, scale, zero, nullptr, given_scale, given_zero, 0, low, high, symmetric};
  Range range;
  if (part) {
    uint2 found = threadIdx.x < parts ? load8(part + 2 * threadIdx.x) : uint2{};
    range = Range{__uint_as_float(found.x), __uint_as_float(found.y)};
    range.over<BLOCK>();
  }
  Grid grid = part ? to.grid_of(range) : to.grid_given(0);
  if (part && blockIdx.x == 0 && threadIdx.x == 0) to.write_grid(0, grid);
  if (grid.ordinary) {
    QG_UNROLL for (int i = 0, j = start + threadIdx.x; i < TILE; i++, j += BLOCK) {
      if (j >= whole) break;
      uint32_t words[V / 4];
      grid.integers(tile[i], words);
      store_bytes(q + j * V, words);
    }
  }
  int rest = grid.ordinary ? max(start, whole) * V : start * V;   // the ragged end, or everything
  for (int e = rest + threadIdx.x; e < min(count, (start + BLOCK * TILE) * V); e += BLOCK) q[e] = uint8_t(grid.integer(to_float(x[e])));
}
