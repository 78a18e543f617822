// H = R Rᵀ with R upper triangular: a Cholesky factorization from the last column to the first.
//
// R is kept in double, as a list of block columns of kBlock columns, each a list of tiles:
//
//   block 0   block 1   block 2          tile [kBlock columns][kDoubleRows rows]
//   +-------+ +-------+ +-------+        block c has the rows up to its diagonal block, so that
//   | \  0  | |   1   | |   3   |        block column c begins at square number c (c + 1) / 2
//   +-------+ +-------+ +-------+
//             | \  2  | |   4   |        k is rounded up to whole blocks; the rows and columns
//             +-------+ +-------+        beyond it are those of a multiple of the identity
//                       | \  5  |
//                       +-------+
#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "solve/lanes.h"
#include "solve/memory.h"
#include "solve/solve.h"

namespace tersor::solve {
namespace {

constexpr int64_t kTile = kBlock * kDoubleRows;  // doubles in a tile
constexpr int64_t kTilesInBlock = kBlock / kDoubleRows;
constexpr int64_t kPanelsInBlock = kBlock / kPanel;
static_assert(kPanel == kDoubleRows, "the rows of a tile serve as the panel of a product");

struct Gram {
  const float* h;
  int64_t k;
  std::vector<float> diagonal;  // of h, then zeros up to a whole block
  double mean;                  // of the diagonal's live entries; stands in for the others
  int64_t dead;

  bool live(int64_t i) const { return diagonal[i] != 0; }
};

class Triangle {
 public:
  explicit Triangle(int64_t k)
      : blocks_((k + kBlock - 1) / kBlock),
        memory_(blocks_ * (blocks_ + 1) / 2 * kTilesInBlock * kTile) {}

  int64_t blocks() const { return blocks_; }
  double* tile(int64_t block, int64_t tile) const {
    return memory_.data() + (block * (block + 1) / 2 * kTilesInBlock + tile) * kTile;
  }

 private:
  int64_t blocks_;
  Memory<double> memory_;
};

Gram inspect(const float* h, int64_t k) {
  const Lanes& lane = lanes();
  std::atomic<int64_t> bad_row{k};
  parallel_for(k, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (lane.extent(h + i * k + i, k - i).finite && h[i * k + i] >= 0) continue;
      int64_t known = bad_row;
      while (i < known && !bad_row.compare_exchange_weak(known, i)) {
      }
      return;
    }
  });
  if (bad_row < k)
    throw Error("row " + std::to_string(bad_row) +
                " of the Gram matrix has a NaN, an infinity or a negative diagonal entry; check "
                "the activations that it was made of");
  Gram gram{h, k, std::vector<float>((k + kBlock - 1) / kBlock * kBlock), 0, 0};
  for (int64_t i = 0; i < k; ++i) {
    gram.diagonal[i] = h[i * k + i];
    gram.mean += gram.diagonal[i];
    gram.dead += !gram.live(i);
  }
  gram.mean = gram.dead < k ? gram.mean / (k - gram.dead) : 1;
  return gram;
}

void load_tile(const Gram& gram, int64_t block, int64_t tile, double added, double* out) {
  for (int64_t r = 0; r < kDoubleRows; ++r) {
    const int64_t row = tile * kDoubleRows + r;
    const bool live = gram.live(row);
    for (int64_t p = 0; p < kBlock; ++p) {
      const int64_t column = block * kBlock + p;
      double value = 0;
      if (row == column)
        value = live ? gram.diagonal[row] + added : gram.mean;
      else if (row < column && live && gram.live(column))
        value = gram.h[row * gram.k + column];
      out[p * kDoubleRows + r] = value;
    }
  }
}

// The Cholesky factor of one panel's diagonal square, in place; false at a pivot up to `floor`.
bool factor_panel(double* square, double floor) {
  for (int64_t p = kPanel - 1; p >= 0; --p) {
    double* column = square + p * kDoubleRows;
    if (!(column[p] > floor)) return false;
    column[p] = std::sqrt(column[p]);
    for (int64_t i = 0; i < p; ++i) column[i] /= column[p];
    for (int64_t j = 0; j < p; ++j)
      for (int64_t i = 0; i <= j; ++i) square[j * kDoubleRows + i] -= column[i] * column[j];
  }
  return true;
}

// Left-looking: a block column is brought up to date by all blocks to its right, then finished.
bool try_factor(const Gram& gram, double added, const Triangle& r) {
  // H comes with rounding errors of its own: a pivot of their size is noise.
  const double floor = gram.mean * gram.k * 0x1p-24;
  const Lanes& lane = lanes();
  for (int64_t block = r.blocks() - 1; block >= 0; --block) {
    const int64_t diagonal = block * kTilesInBlock;  // first tile of the diagonal square
    parallel_for(diagonal + kTilesInBlock, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) load_tile(gram, block, t, added, r.tile(block, t));
      for (int64_t c = block + 1; c < r.blocks(); ++c)
        for (int64_t t = begin; t < end; ++t)
          for (int64_t s = 0; s < kPanelsInBlock; ++s)
            lane.subtract_product(r.tile(c, t), r.tile(c, diagonal + s), kBlock,
                                  r.tile(block, t) + s * kPanel * kDoubleRows);
    });
    const auto square = [&](int64_t t, int64_t s) {
      return r.tile(block, t) + s * kPanel * kDoubleRows;
    };
    // Takes from panel s what the panels to its right within the block account for.
    const auto update = [&](int64_t t, int64_t s) {
      lane.subtract_product(square(t, s + 1), square(diagonal + s, s + 1),
                            kBlock - (s + 1) * kPanel, square(t, s));
    };
    for (int64_t s = kPanelsInBlock - 1; s >= 0; --s) {
      for (int64_t t = diagonal; t <= diagonal + s; ++t) update(t, s);
      if (!factor_panel(square(diagonal + s, s), floor)) return false;
      for (int64_t t = diagonal; t < diagonal + s; ++t)
        lane.back_substitute(square(diagonal + s, s), square(t, s));
    }
    parallel_for(diagonal, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t s = kPanelsInBlock - 1; s >= 0; --s) {
          update(t, s);
          lane.back_substitute(square(diagonal + s, s), square(t, s));
        }
    });
  }
  return true;
}

void store_unit(const Triangle& r, const Gram& gram, float* h, float* pivots) {
  const int64_t k = gram.k;
  std::vector<double> inverse(k);
  for (int64_t i = 0; i < k; ++i) {
    const double pivot =
        r.tile(i / kBlock, i / kDoubleRows)[i % kBlock * kDoubleRows + i % kDoubleRows];
    inverse[i] = 1 / pivot;
    pivots[i] = static_cast<float>(gram.live(i) ? pivot : 1e-12 * std::sqrt(gram.mean));
  }
  parallel_for(r.blocks() * kTilesInBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t block = t / kTilesInBlock; block < r.blocks(); ++block)
        for (int64_t i = t * kDoubleRows; i < std::min(k, (t + 1) * kDoubleRows); ++i) {
          const double* row = r.tile(block, t) + i % kDoubleRows;
          const int64_t last = std::min(k, (block + 1) * kBlock);
          for (int64_t j = std::max(i + 1, block * kBlock); j < last; ++j)
            h[i * k + j] = static_cast<float>(row[j % kBlock * kDoubleRows] * inverse[j]);
        }
  });
}

}  // namespace

Factored factor(float* h, int64_t k, double damp, float* pivots) {
  if (!(damp >= 0 && damp <= 1))
    throw Error("damp must be between 0 and 1, not " + std::to_string(damp));
  const Gram gram = inspect(h, k);
  const Triangle r(k);
  while (!try_factor(gram, damp * gram.mean, r)) {
    damp = std::max(2 * damp, k * 0x1p-24);
    if (damp > 1)
      throw Error(
          "the Gram matrix is not positive semidefinite, even with its mean diagonal added "
          "to it; it must be the sum of x xᵀ");
  }
  store_unit(r, gram, h, pivots);
  return {damp, gram.dead};
}

}  // namespace tersor::solve
