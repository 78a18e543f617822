// The uniform grid of each group of weights.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>

#include "dispatch.h"
#include "parallel.h"
#include "solve/lanes.h"
#include "solve/range.h"
#include "solve/solve.h"

namespace tersor::solve {
namespace {

// The grid for a group that reaches from low to high; an infinite scale where none fits.
Grid search(const Grids& p, const Lanes& lane, const float* w, Extent extent) {
  const Range range{std::min<double>(extent.min, 0), std::max<double>(extent.max, 0), p.bits,
                    p.symmetric, p.scale_dtype};
  if (range.low == range.high) return {1, p.symmetric ? range.middle() : 0};
  const float unit = range.unit();
  Grid best{INFINITY, 0};
  float least = INFINITY;
  for (int i = 0; i < range.candidates(p.clip); ++i) {
    const Grid grid = range.candidate(i);
    if (!std::isfinite(grid.scale)) continue;
    const float error =
        lane.grid_error(w, p.group, unit, grid.scale * unit, -grid.zero, range.top() - grid.zero);
    if (error < least) {
      least = error;
      best = grid;
    }
  }
  return best;
}

}  // namespace

void search_grid(const Grids& p, float* scales, uint8_t* zeros) {
  const Lanes& lane = lanes();
  const int64_t groups = p.k / p.group;
  std::atomic<bool> good_weights{true}, good_scales{true};
  parallel_for(p.n * groups, 16, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const float* w = p.w + g * p.group;
      const Extent extent = lane.extent(w, p.group);
      if (!extent.finite) {
        good_weights = false;
        continue;
      }
      const Grid grid = search(p, lane, w, extent);
      if (!std::isfinite(grid.scale)) good_scales = false;
      scales[g] = grid.scale;
      if (zeros) zeros[g] = static_cast<uint8_t>(grid.zero);
    }
  });
  if (!good_weights) throw Error("the weights hold NaN or infinity");
  if (!good_scales)
    throw Error(
        "the weights are too large for scales in this dtype; store the scales in bfloat16 "
        "or float32");
}

}  // namespace tersor::solve
