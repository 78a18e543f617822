// The column solver's work on one block of columns (solve/solve.h has the mathematics), and the
// search of its grids. The errors of earlier blocks are added before, by a matrix product of the
// caller's.
//
// Eight lanes share a row, so that a warp has four; of every 32 columns (a chunk) a lane has four
// that follow each other. Columns are gone through in order: the lane whose column it is rounds it,
// hands its error to the seven others, and each adds error * U to its later columns, which stay in
// registers for all of the block. (A thread for each row would leave most of a GPU idle, and a warp
// for each would round 32 times what one lane can.) U stands in shared memory, zero where a column
// is not to be changed any more.
#pragma once

#include "arguments.h"
#include "device.cuh"
#include "solve/range.h"

namespace tersor::cuda {

constexpr int kRowLanes = 8;
constexpr int kChunk = 4 * kRowLanes;
constexpr int kChunks = kSolveColumns / kChunk;
static_assert(kSolveRows * kRowLanes == kSolveThreads, "a row for each of the lanes together");

// kGrid: values become points of a grid. kPattern: the kernel chooses which become zero, of every
// a.of columns, when it comes to the first of them.
template <bool kGrid, bool kPattern>
struct BlockSolver {
  using Four = float[4];

  const SolveArgs& a;
  const float* unit;  // [kSolveColumns][kSolveColumns], shared
  int64_t row;        // of the matrix; one that exists
  int sub, base;      // this lane among those of the row, and the first of them in the warp

  TERSOR_DEVICE explicit BlockSolver(const SolveArgs& args)
      : a(args), unit(reinterpret_cast<const float*>(shared_memory())) {
    const int lane = thread() % kLanes;
    sub = lane % kRowLanes, base = lane - sub;
    row = int64_t{worker()} * kSolveRows + thread() / kRowLanes;
  }

  TERSOR_DEVICE void load_unit() const {
    float* to = reinterpret_cast<float*>(shared_memory());
    for (int i = thread(); i < kSolveColumns * kSolveColumns; i += kSolveThreads) {
      const int from = i / kSolveColumns, column = i % kSolveColumns;
      const bool read = from < column && column < a.width;
      to[i] = read ? a.unit[(a.first + from) * a.k + a.first + column] : 0.f;
    }
  }

  // values += error * U, of a column and four others.
  TERSOR_DEVICE void add_error(Four& values, float error, int column, int chunk) const {
    Four u;
    load16(u, unit + column * kSolveColumns + chunk * kChunk + sub * 4);
#pragma unroll
    for (int r = 0; r < 4; ++r) values[r] = fmaf(error, u[r], values[r]);
  }

  // Keeps those of the columns from `first` on (counted in the chunk) whose loss, were they zero,
  // is largest; of equals, the first. Their values are the best ones if none of them became zero.
  TERSOR_DEVICE void choose(const Four& values, const Four& weights, const Four& pivots, int chunk,
                            int first, bool (&keep)[4]) const {
    const int last = first + a.of;
    Four free, loss;
#pragma unroll
    for (int r = 0; r < 4; ++r) free[r] = values[r];
    for (int s = first / 4; s * 4 < last; ++s)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (s * 4 + r >= first && s * 4 + r < last)
          add_error(free, of_lane(weights[r] - free[r], base + s), chunk * kChunk + s * 4 + r,
                    chunk);
    int better[4] = {0, 0, 0, 0};  // how many go before
#pragma unroll
    for (int r = 0; r < 4; ++r) loss[r] = fabsf(free[r]) * pivots[r];
    for (int s = first / 4; s * 4 < last; ++s)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int other = s * 4 + r;
        const float theirs = of_lane(loss[r], base + s);
        if (other < first || other >= last) continue;
#pragma unroll
        for (int mine = 0; mine < 4; ++mine)
          if (other != sub * 4 + mine)
            better[mine] += other < sub * 4 + mine ? theirs >= loss[mine] : theirs > loss[mine];
      }
#pragma unroll
    for (int r = 0; r < 4; ++r)
      if (sub * 4 + r >= first && sub * 4 + r < last) keep[r] = better[r] < a.kept;
  }

  TERSOR_DEVICE void run() {
    const bool real = row < a.n;
    if (!real) row = 0;  // to go along with the warp
    load_unit();
    sync_block();
    const float top = static_cast<float>(a.levels - 1), middle = static_cast<float>(a.levels / 2);
    Four values[kChunks];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int column = chunk * kChunk + sub * 4 + r;
        values[chunk][r] = column < a.width ? a.values[row * a.k + a.first + column] : 0.f;
      }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Four weights, scales, zeros, pivots, ends, errors;
      bool keep[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int column = chunk * kChunk + sub * 4 + r;
        const bool inside = column < a.width;
        const int64_t at = row * a.k + a.first + column;
        weights[r] = inside ? a.w[at] : 0.f;
        scales[r] = 1.f, zeros[r] = middle, pivots[r] = 0.f, ends[r] = 0.f, errors[r] = 0.f;
        keep[r] = !(inside && a.keep) || a.keep[row * a.keep_stride + column];
        if (inside && a.pivots) pivots[r] = a.pivots[a.first + column];
        if (kGrid && inside) {
          const int64_t group = row * a.groups + a.group_of_column[a.first + column];
          scales[r] = a.scales[group];
          if (a.zeros) zeros[r] = a.zeros[group];
        }
      }
      for (int s = 0; s < kRowLanes; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (kPattern && (s * 4 + r) % a.of == 0)
            choose(values[chunk], weights, pivots, chunk, s * 4 + r, keep);
          float value = keep[r] ? values[chunk][r] : 0.f, code = 0.f;
          if (kGrid) {
            float step = quotient(value, scales[r]);
            step = step > -zeros[r] ? step : -zeros[r];  // as is NaN
            step = step < top - zeros[r] ? step : top - zeros[r];
            step = static_cast<float>(nearest(step));
            code = step + zeros[r];
            value = step * scales[r];
          }
          float error = weights[r] - value;
          if (sub == s) ends[r] = kGrid ? code : value, errors[r] = error;
          error = of_lane(error, base + s);
#pragma unroll
          for (int later = chunk; later < kChunks; ++later)
            add_error(values[later], error, chunk * kChunk + s * 4 + r, later);
        }
      if (real) store(chunk, ends, errors, pivots);
    }
  }

  TERSOR_DEVICE void store(int chunk, const Four& ends, const Four& errors,
                           const Four& pivots) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int column = chunk * kChunk + sub * 4 + r;
      if (column >= a.width) continue;
      const int64_t at = row * a.k + a.first + column;
      if (a.losses) {  // which is all that is asked
        a.losses[row * a.width + column] = fabsf(ends[r]) * pivots[r];
        continue;
      }
      a.errors[row * kSolveColumns + column] = errors[r];
      if (kGrid)
        a.codes[at] = static_cast<uint8_t>(ends[r]);
      else
        a.values[at] = ends[r];
    }
  }
};

// A warp has the groups warp, warp + the number of all warps, ...
TERSOR_DEVICE void search_grid_body(const GridArgs& a) {
  constexpr int kWarps = kPackThreads / kLanes;
  const int lane = thread() % kLanes;
  for (int64_t group = int64_t{worker()} * kWarps + thread() / kLanes; group < a.count;
       group += int64_t{workers()} * kWarps) {
    const float* w = a.w + group * a.group;
    float low = 0, high = 0;
    for (int64_t i = lane; i < a.group; i += kLanes) {
      low = fminf(low, w[i]);
      high = fmaxf(high, w[i]);
    }
    low = -most_of_lanes(-low), high = most_of_lanes(high);
    const solve::Range range{low, high, a.bits, a.symmetric != 0, a.scale_dtype};
    solve::Grid best{1.f, a.symmetric ? range.middle() : 0.f};
    if (low != high) {
      best = {kInfinity, 0.f};
      const float unit = range.unit();
      float least = kInfinity;
      for (int i = 0; i < range.candidates(a.clip != 0); ++i) {
        const solve::Grid grid = range.candidate(i);
        if (!(grid.scale < kInfinity)) continue;
        const float scale = grid.scale * unit, inverse = quotient(1.f, scale);
        float error = 0;
        for (int64_t at = lane; at < a.group; at += kLanes) {
          const float x = w[at] * unit;
          const float step = fminf(fmaxf(x * inverse, -grid.zero), range.top() - grid.zero);
          const float away = x - static_cast<float>(nearest(step)) * scale;
          error = fmaf(away, away, error);
        }
        error = sum_of_lanes(error);
        if (error < least) least = error, best = grid;
      }
    }
    if (lane != 0) continue;
    a.scales[group] = best.scale;
    if (a.zeros) a.zeros[group] = static_cast<uint8_t>(best.zero);
  }
}

}  // namespace tersor::cuda
