// The column solver. Some rows go through all columns before the next ones begin:
//
//   for each block of columns:
//     for each earlier block:   values += errors[earlier block] · U[earlier block, block]
//     where a share goes:       find the loss below which a weight becomes zero
//     for each panel in it:     values += errors[earlier panels] · U[earlier panels, panel]
//                               solve column by column; errors[panel] = weights - new weights
//
// so that only errors are read (left-looking) and nearly all of the work is a matrix product.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "solve/lanes.h"
#include "solve/memory.h"
#include "solve/solve.h"

namespace tersor::solve {
namespace {

constexpr int64_t kPanelsInBlock = kBlock / kPanel;
static_assert(kMaxPattern == kBlock, "a pattern is chosen within a block");
constexpr int64_t kTilesAtOnce = 32;  // for each thread; reading U once for 1024 rows is cheap

// One tile's part of the scratch memory; all are [columns or groups][kFloatRows].
struct Tile {
  float* errors;
  float* values;
  float* free;  // the best values of a block's weights if none of them became zero or were rounded
  float *scales, *zeros;

  static int64_t floats(const Columns& p) { return (p.k + 2 * kBlock + 2 * p.groups) * kFloatRows; }
  Tile(const Columns& p, float* memory)
      : errors(memory),
        values(errors + p.k * kFloatRows),
        free(values + kBlock * kFloatRows),
        scales(free + kBlock * kFloatRows),
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

// One block of a tile to its place in a matrix [n, k].
template <class T>
void store(const Columns& p, int64_t first_row, int64_t first, int64_t width, const T* block,
           T* matrix) {
  for (int64_t row = first_row; row < std::min(p.n, first_row + kFloatRows); ++row)
    for (int64_t j = 0; j < width; ++j)
      matrix[row * p.k + first + j] = block[j * kFloatRows + row - first_row];
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

// The rows of `count` tiles on their way through the columns.
class Rows {
 public:
  Rows(const Columns& p, int64_t first_tile, int64_t count, float* memory)
      : p_(p), first_row_(first_tile * kFloatRows), count_(count), memory_(memory) {}

  void solve(uint8_t* codes, float* values) const {
    if (p_.scales) each([&](int64_t t) { load_grid(p_, row(t), tile(t)); });
    for (int64_t first = 0; first < p_.k; first += kBlock) {
      const int64_t width = std::min(kBlock, p_.k - first);
      parallel_for(count_, 1, [&](int64_t begin, int64_t end) {
        add_earlier_blocks(first, width, begin, end);
      });
      const float threshold = p_.sparsity.share > 0 ? find_threshold(first, width) : 0;
      parallel_for(count_, 1, [&](int64_t begin, int64_t end) {
        solve_block(first, width, threshold, begin, end, codes, values);
      });
    }
  }

 private:
  int64_t row(int64_t t) const { return first_row_ + t * kFloatRows; }
  Tile tile(int64_t t) const { return Tile(p_, memory_ + t * Tile::floats(p_)); }

  template <class Function>
  void each(const Function& function) const {
    parallel_for(count_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) function(t);
    });
  }

  void add_earlier_blocks(int64_t first, int64_t width, int64_t begin, int64_t end) const {
    const Lanes& lane = lanes();
    alignas(64) float unit[kBlock * kBlock];
    for (int64_t t = begin; t < end; ++t) load_weights(p_, row(t), first, width, tile(t));
    for (int64_t earlier = 0; earlier < first; earlier += kBlock) {
      pack_unit(p_, earlier, first, unit);
      for (int64_t t = begin; t < end; ++t)
        for (int64_t s = 0; s * kPanel < width; ++s)
          lane.add_product(tile(t).errors + earlier * kFloatRows, unit + s * kBlock * kPanel,
                           kBlock, tile(t).values + s * kPanel * kFloatRows);
    }
    if (!chosen_by_block()) return;
    pack_unit(p_, first, first, unit);
    for (int64_t t = begin; t < end; ++t) solve_freely(first, width, unit, tile(t));
  }

  // Whether a block's zeros are chosen when it is reached, from its free values. (Those of a
  // pattern that fits a panel are chosen when its first column is.)
  bool chosen_by_block() const { return p_.sparsity.share > 0 || p_.sparsity.of > kPanel; }

  void solve_freely(int64_t first, int64_t width, const float* unit, const Tile& tile) const {
    const Lanes& lane = lanes();
    alignas(64) float errors[kBlock * kFloatRows];
    const float* weights = tile.errors + first * kFloatRows;
    std::copy(weights, weights + width * kFloatRows, errors);
    std::copy(tile.values, tile.values + width * kFloatRows, tile.free);
    for (int64_t panel = 0; panel < width; panel += kPanel) {
      SolvePanel work{};
      work.columns = std::min(kPanel, width - panel);
      work.value = tile.free + panel * kFloatRows;
      work.weight = errors + panel * kFloatRows;
      work.unit = unit + panel * kBlock + panel * kPanel;
      lane.add_product(errors, unit + panel * kBlock, panel, work.value);
      lane.solve_panel(work);
    }
  }

  // What it costs to make the weight in column j of the block zero.
  float loss(const Tile& tile, int64_t first, int64_t j, int64_t r) const {
    return std::abs(tile.free[j * kFloatRows + r]) * p_.sparsity.pivots[first + j];
  }

  // The loss that `share` of the block's weights are below. Floats that are not negative are in
  // the order of their bits, so two counts of 16 bits each find it.
  float find_threshold(int64_t first, int64_t width) const {
    const int64_t all = p_.n * width;
    auto rank = std::min(all - 1, static_cast<int64_t>(p_.sparsity.share * all));
    uint32_t found = 0;
    for (int shift : {16, 0}) {
      std::vector<int64_t> counts(1 << 16);
      std::mutex mutex;
      parallel_for(count_, 1, [&](int64_t begin, int64_t end) {
        std::vector<int64_t> mine(1 << 16);
        for (int64_t t = begin; t < end; ++t) {
          const int64_t rows = std::min(kFloatRows, p_.n - row(t));
          for (int64_t j = 0; j < width; ++j)
            for (int64_t r = 0; r < rows; ++r) {
              const float x = loss(tile(t), first, j, r);
              uint32_t bits;
              std::memcpy(&bits, &x, 4);
              if (shift == 16 || bits >> 16 == found >> 16) ++mine[bits >> shift & 0xffff];
            }
        }
        const std::lock_guard<std::mutex> lock(mutex);
        for (size_t i = 0; i < counts.size(); ++i) counts[i] += mine[i];
      });
      uint32_t digit = 0;
      for (; rank >= counts[digit]; ++digit) rank -= counts[digit];
      found |= digit << shift;
    }
    float threshold;
    std::memcpy(&threshold, &found, 4);
    return threshold;
  }

  // keep [columns][kFloatRows]: 0 for the weights of the block that become zero, else -1.
  void choose(int64_t t, int64_t first, int64_t width, float threshold, int32_t* keep) const {
    const Sparsity& s = p_.sparsity;
    const Tile here = tile(t);
    for (int64_t r = 0; r < kFloatRows; ++r) {
      const bool real = row(t) + r < p_.n;
      for (int64_t j = 0; j < width; ++j) {
        bool kept = real;
        if (real && s.mask) kept = s.mask[(row(t) + r) * p_.k + first + j];
        if (real && s.share > 0) kept = loss(here, first, j, r) >= threshold;
        keep[j * kFloatRows + r] = kept ? -1 : 0;
      }
      for (int64_t run = 0; s.of > kPanel && run < width; run += s.of) {
        int64_t order[kBlock];
        for (int64_t j = 0; j < s.of; ++j) order[j] = run + j;
        std::stable_sort(order, order + s.of, [&](int64_t a, int64_t b) {
          return loss(here, first, a, r) > loss(here, first, b, r);
        });
        for (int64_t j = s.kept; j < s.of; ++j) keep[order[j] * kFloatRows + r] = 0;
      }
    }
  }

  void solve_block(int64_t first, int64_t width, float threshold, int64_t begin, int64_t end,
                   uint8_t* codes, float* values) const {
    const Lanes& lane = lanes();
    const Sparsity& sparsity = p_.sparsity;
    const bool grid = p_.scales != nullptr;
    const bool by_panel = sparsity.of > 0 && !chosen_by_block();
    alignas(64) float unit[kBlock * kBlock];
    alignas(64) uint8_t block[kBlock * kFloatRows];
    alignas(64) int32_t keep[kBlock * kFloatRows];
    pack_unit(p_, first, first, unit);
    for (int64_t t = begin; t < end; ++t) {
      const Tile here = tile(t);
      if (sparsity.any() && !by_panel) choose(t, first, width, threshold, keep);
      for (int64_t s = 0; s * kPanel < width; ++s) {
        const int64_t panel = s * kPanel;
        const float* panel_unit = unit + panel * kBlock;
        SolvePanel work{};
        work.columns = std::min(kPanel, width - panel);
        work.value = here.values + panel * kFloatRows;
        work.weight = here.errors + (first + panel) * kFloatRows;
        work.unit = panel_unit + panel * kPanel;
        if (sparsity.any()) work.keep = keep + panel * kFloatRows;
        if (by_panel) {
          work.pivots = sparsity.pivots + first + panel;
          work.kept = sparsity.kept;
          work.of = sparsity.of;
        }
        if (grid) {
          work.scales = here.scales;
          work.zeros = here.zeros;
          work.group = p_.group_of_column + first + panel;
          work.top = static_cast<float>(p_.levels - 1);
          work.codes = block + panel * kFloatRows;
        }
        lane.add_product(here.errors + first * kFloatRows, panel_unit, panel, work.value);
        lane.solve_panel(work);
      }
      if (grid)
        store(p_, row(t), first, width, block, codes);
      else
        store(p_, row(t), first, width, here.values, values);
    }
  }

  const Columns& p_;
  int64_t first_row_, count_;
  float* memory_;
};

void check(const Columns& p) {
  for (int64_t j = 0; p.scales && j < p.k; ++j)
    if (p.group_of_column[j] < 0 || p.group_of_column[j] >= p.groups)
      throw Error("column " + std::to_string(j) + " is in group " +
                  std::to_string(p.group_of_column[j]) + " of " + std::to_string(p.groups));
  const Lanes& lane = lanes();
  std::atomic<bool> good_weights{true}, good_scales{true};
  parallel_for(p.n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!lane.extent(p.w + row * p.k, p.k).finite) good_weights = false;
      if (!p.scales) continue;
      const Extent scales = lane.extent(p.scales + row * p.groups, p.groups);
      if (!scales.finite || !(scales.min > 0)) good_scales = false;
    }
  });
  if (!good_weights) throw Error("the weights hold NaN or infinity");
  if (!good_scales) throw Error("the scales must be positive and finite");
}

}  // namespace

void solve_columns(const Columns& p, uint8_t* codes, float* values) {
  check(p);
  const int64_t tiles = (p.n + kFloatRows - 1) / kFloatRows;
  const int64_t at_once =
      p.sparsity.share > 0 ? tiles : std::min(tiles, thread_count() * kTilesAtOnce);
  const Memory<float> memory(at_once * Tile::floats(p));
  for (int64_t first = 0; first < tiles; first += at_once)
    Rows(p, first, std::min(at_once, tiles - first), memory.data()).solve(codes, values);
}

}  // namespace tersor::solve
