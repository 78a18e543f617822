// The column solver. A strip of rows goes through all columns before the next strip begins:
//
//   for each block of columns:
//     for each earlier block:   values += errors[earlier block] · U[earlier block, block]
//     for each panel in it:     values += errors[earlier panels] · U[earlier panels, panel]
//                               round column by column; errors[panel] = weights - rounded
//
// so that only errors are read (left-looking) and nearly all of the work is a matrix product.
#include <algorithm>
#include <atomic>
#include <string>

#include "dispatch.h"
#include "parallel.h"
#include "solve/lanes.h"
#include "solve/memory.h"
#include "solve/solve.h"

namespace tersor::solve {
namespace {

constexpr int64_t kPanelsInBlock = kBlock / kPanel;
constexpr int64_t kTilesInStrip = 32;  // reading U once for 1024 rows costs next to nothing

// One tile's part of the scratch memory; all are [columns or groups][kFloatRows].
struct Tile {
  float *errors, *values, *scales, *zeros;

  static int64_t floats(const Columns& p) { return (p.k + kBlock + 2 * p.groups) * kFloatRows; }
  Tile(const Columns& p, float* memory)
      : errors(memory),
        values(errors + p.k * kFloatRows),
        scales(values + kBlock * kFloatRows),
        zeros(scales + p.groups * kFloatRows) {}
};

// Rows past the last one are zeros on a grid of ones.
void load_grid(const Columns& p, int64_t first_row, const Tile& tile) {
  const float middle = static_cast<float>(p.levels / 2);
  for (int64_t r = 0; r < kFloatRows; ++r) {
    const int64_t row = first_row + r;
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t from = row * p.groups + g, to = g * kFloatRows + r;
      tile.scales[to] = row < p.n ? p.scales[from] : 1;
      tile.zeros[to] = row < p.n && p.zeros ? p.zeros[from] : middle;
    }
  }
}

void load_weights(const Columns& p, int64_t first_row, int64_t first, int64_t width,
                  const Tile& tile) {
  float* errors = tile.errors + first * kFloatRows;
  for (int64_t r = 0; r < kFloatRows; ++r) {
    const int64_t row = first_row + r;
    for (int64_t j = 0; j < width; ++j)
      errors[j * kFloatRows + r] = row < p.n ? p.w[row * p.k + first + j] : 0;
  }
  std::copy(errors, errors + width * kFloatRows, tile.values);
}

void store_codes(const Columns& p, int64_t first_row, int64_t first, int64_t width,
                 const uint8_t* block, uint8_t* codes) {
  for (int64_t row = first_row; row < std::min(p.n, first_row + kFloatRows); ++row)
    for (int64_t j = 0; j < width; ++j)
      codes[row * p.k + first + j] = block[j * kFloatRows + row - first_row];
}

// U[rows, columns] of one block as panels [kPanelsInBlock][kBlock rows][kPanel], with zeros beyond
// the matrix and on and below its diagonal.
void pack_unit(const Columns& p, int64_t first_row, int64_t first, float* packed) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t row = first_row + i;
    const float* from = p.u + row * p.k;
    for (int64_t s = 0; s < kPanelsInBlock; ++s) {
      float* to = packed + (s * kBlock + i) * kPanel;
      const int64_t begin = first + s * kPanel, end = begin + kPanel;
      if (row < begin && end <= p.k) {
        std::copy(from + begin, from + end, to);
        continue;
      }
      for (int64_t j = begin; j < end; ++j) to[j - begin] = row < j && j < p.k ? from[j] : 0;
    }
  }
}

// Tiles [begin, end), whose scratch memory starts at `memory`.
void solve_strip(const Columns& p, int64_t begin, int64_t end, float* memory, uint8_t* codes) {
  const Lanes& lane = lanes();
  const int64_t stride = Tile::floats(p);
  const auto tile = [&](int64_t t) { return Tile(p, memory + (t - begin) * stride); };
  alignas(64) float unit[kBlock * kBlock];
  alignas(64) uint8_t block[kBlock * kFloatRows];

  for (int64_t t = begin; t < end; ++t) load_grid(p, t * kFloatRows, tile(t));
  for (int64_t first = 0; first < p.k; first += kBlock) {
    const int64_t width = std::min(kBlock, p.k - first);
    for (int64_t t = begin; t < end; ++t) load_weights(p, t * kFloatRows, first, width, tile(t));
    for (int64_t earlier = 0; earlier < first; earlier += kBlock) {
      pack_unit(p, earlier, first, unit);
      for (int64_t t = begin; t < end; ++t)
        for (int64_t s = 0; s * kPanel < width; ++s)
          lane.add_product(tile(t).errors + earlier * kFloatRows, unit + s * kBlock * kPanel,
                           kBlock, tile(t).values + s * kPanel * kFloatRows);
    }
    pack_unit(p, first, first, unit);
    for (int64_t t = begin; t < end; ++t) {
      const Tile here = tile(t);
      for (int64_t s = 0; s * kPanel < width; ++s) {
        const int64_t panel = s * kPanel;
        const float* panel_unit = unit + panel * kBlock;
        float* values = here.values + panel * kFloatRows;
        lane.add_product(here.errors + first * kFloatRows, panel_unit, panel, values);
        lane.round_panel({std::min(kPanel, width - panel), values,
                          here.errors + (first + panel) * kFloatRows, panel_unit + panel * kPanel,
                          here.scales, here.zeros, p.group_of_column + first + panel,
                          static_cast<float>(p.levels - 1), block + panel * kFloatRows});
      }
      store_codes(p, t * kFloatRows, first, width, block, codes);
    }
  }
}

void check(const Columns& p) {
  for (int64_t j = 0; j < p.k; ++j)
    if (p.group_of_column[j] < 0 || p.group_of_column[j] >= p.groups)
      throw Error("column " + std::to_string(j) + " is in group " +
                  std::to_string(p.group_of_column[j]) + " of " + std::to_string(p.groups));
  const Lanes& lane = lanes();
  std::atomic<bool> good_weights{true}, good_scales{true};
  parallel_for(p.n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!lane.extent(p.w + row * p.k, p.k).finite) good_weights = false;
      const Extent scales = lane.extent(p.scales + row * p.groups, p.groups);
      if (!scales.finite || !(scales.min > 0)) good_scales = false;
    }
  });
  if (!good_weights) throw Error("the weights hold NaN or infinity");
  if (!good_scales) throw Error("the scales must be positive and finite");
}

}  // namespace

void solve_columns(const Columns& p, uint8_t* codes) {
  check(p);
  const int64_t tiles = (p.n + kFloatRows - 1) / kFloatRows;
  const int64_t at_once = std::min(tiles, thread_count() * kTilesInStrip);
  const Memory<float> memory(at_once * Tile::floats(p));
  for (int64_t first = 0; first < tiles; first += at_once)
    parallel_for(std::min(at_once, tiles - first), 1, [&](int64_t begin, int64_t end) {
      solve_strip(p, first + begin, first + end, memory.data() + begin * Tile::floats(p), codes);
    });
}

}  // namespace tersor::solve
