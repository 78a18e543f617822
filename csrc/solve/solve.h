// Error-compensated rounding of a weight matrix to a grid, column by column (GPTQ, Frantar et al.,
// arXiv:2210.17323), and pruning in the same pass (SparseGPT), in the form that needs no inverse.
//
// With the Gram matrix of a layer's input factored as H + damping = R Rᵀ, R upper triangular,
//
//     q_i = round(w_i + Σ_{j<i} (w_j - q_j) U_ji),     U_ji = R_ji / R_ii,
//
// are the codes of the published form, whose Cholesky factor of H⁻¹ is the transpose of R⁻¹. This
// takes k³/3 operations instead of 4k³/3 and does not square the condition number.
//
// The grid of each group is fixed beforehand, from the original weights (static groups), so that
// any order of columns is a permutation by the caller. All matrices are row-major. The functions
// throw tersor::Error on bad values, and results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace tersor::solve {

struct Factored {
  double damp;   // fraction of the mean diagonal that was added: at least what was asked
  int64_t dead;  // columns of H with zero diagonal: inputs that were zero for every token
};

// Replaces the part of h [k, k] strictly above the diagonal by U, and gives R's diagonal in pivots
// [k]. Only the upper triangle of h is read; its diagonal and what is below it stay, and with them
// H. Computes in double, in memory of its own as large as h.
//
// damp * mean(diag H) is added to the diagonal. Where H is not positive definite even so, beyond
// the rounding errors it may carry, damp is doubled as often as needed; at damp > 1 h is no Gram
// matrix, an Error. A dead column has U = 0 in its row and column and is rounded to nearest; dead
// columns do not count in the mean, and their pivot is next to nothing: of their weights the small
// ones still go first.
Factored factor(float* h, int64_t k, double damp, float* pivots);

constexpr int64_t kMaxPattern = 128;  // columns

// Which weights become zero. Of those given, the ones that cost least go, by the loss (v R_ii)² of
// SparseGPT (Frantar and Alistarh, arXiv:2301.00774), v being the weight plus the errors of the
// columns before it.
struct Sparsity {
  const uint8_t* mask = nullptr;  // [n, k]: those with 0. Alone, or:
  double share = 0;               // this share of each 128 columns, all rows together, or:
  int64_t kept = 0, of = 0;       // all but `kept` of each `of` columns of each row; `of` divides k
                                  // and is a power of two up to kMaxPattern
  const float* pivots = nullptr;  // [k], from factor; not needed for a mask

  bool any() const { return mask || share > 0 || of > 0; }
};

struct Columns {
  int64_t n, k, groups;
  const float* w;                  // [n, k]
  const float* u;                  // [k, k], read strictly above the diagonal
  const float* scales;             // [n, groups], positive; NULL: no grid, weights are not rounded
  const uint8_t* zeros;            // [n, groups], or NULL: all are levels / 2
  const int32_t* group_of_column;  // [k], each in [0, groups)
  int32_t levels;                  // number of codes, 2 to 256
  Sparsity sparsity;
};

// What each weight becomes: zero or v, which is w plus the errors of the columns before it, and on
// a grid the nearest point of it, round(v / scale) + zero within [0, levels - 1]. Ties go to the
// even quotient. With U = 0 this is rounding to nearest. Writes codes [n, k] on a grid, values
// [n, k] without one. Takes about 4 k bytes of memory for each row in work: at most 1024 per
// thread, or all n for a share, whose threshold is one for all rows.
void solve_columns(const Columns& problem, uint8_t* codes, float* values);

struct Grids {
  int64_t n, k, group;  // group divides k
  const float* w;       // [n, k]
  int32_t bits;         // 2 to 8
  bool symmetric, clip;
  int32_t scale_dtype;  // enum tersor_dtype
};

// scales [n, k / group] and zeros [n, k / group] (NULL when symmetric) such that
// (code - zero) * scale covers each group:
//   symmetric   max|w| = (2^(bits-1) - 1) * scale; the zero point is 2^(bits-1)
//   asymmetric  min(w, 0) and max(w, 0) are 2^bits - 1 steps apart; the zero point is an integer
// With `clip`, the range is shrunk in steps of 2 % and the one with the least squared error taken.
// Scales are rounded to scale_dtype before anything is computed from them, and are positive: a
// group of zeros gets scale 1, and any grid holds 0 exactly. A scale beyond the dtype's range is an
// Error.
void search_grid(const Grids& problem, float* scales, uint8_t* zeros);

// Puts the scales that search_grid found for 4 symmetric bits on a two-level grid: those of a row
// become products, which the dtype holds exactly, of one number of at most 7 binary digits and
// whole numbers from 1 to 15. A kernel can sum such a row in integers and scale it once.
//
// Of the numbers that come nearest to the scales, the one with the least squared error of the row's
// weights is taken, and of the products on both sides of a scale that with the less error. A row of
// zeros keeps its scales.
void put_on_two_levels(const Grids& problem, float* scales);

}  // namespace tersor::solve
