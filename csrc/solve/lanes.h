// The arithmetic of the solver that is worth vector instructions. lanes.cpp is compiled once for
// each ISA; everything else in this folder is baseline code that calls one of these tables.
//
// A tile holds a few rows of a matrix in vector lanes, one column after the other, 128 bytes each:
//
//            lane 0   lane 1   ...   lane 31
//   column 0  row 0    row 1   ...   row 31      32 rows of floats, or 16 rows of doubles
//   column 1  row 0    row 1   ...   row 31
//   ...
//
// A row never meets another one, so that its result depends neither on its neighbours nor on the
// threads. Columns are handled in blocks, whose updates are put off until the block is reached, and
// a block in panels, the width of one matrix product.
#pragma once

#include <cstdint>

namespace tersor::solve {

constexpr int64_t kBlock = 128;      // columns in a block
constexpr int64_t kPanel = 16;       // columns in a panel
constexpr int64_t kFloatRows = 32;   // rows in a tile of floats
constexpr int64_t kDoubleRows = 16;  // rows in a tile of doubles

// What solving one panel of a tile reads and writes; r is the row, j the column in the panel.
struct SolvePanel {
  int64_t columns;       // 1 to kPanel
  float* value;          // [columns][rows] in: the values to be rounded; out: see `codes`
  float* weight;         // [columns][rows] in: original weights; out: weight - what it becomes
  const float* unit;     // [columns][kPanel] U within the panel, read for j > i in row i
  int32_t* keep;         // [columns][rows] 0: becomes zero, -1: does not; NULL: none becomes zero
  const float* pivots;   // [columns] R's diagonal, read where of > 0
  int64_t kept, of;      // of > 0: `keep` is chosen here, `kept` in each `of` columns
  const float* scales;   // [groups][rows]
  const float* zeros;    // [groups][rows]
  const int32_t* group;  // [columns]
  float top;             // the highest code
  uint8_t* codes;        // [columns][rows] out; NULL: no grid, `value` is what each weight becomes
};

// The extent of a list of floats; min and max mean something only if all are finite.
struct Extent {
  float min, max;
  bool finite;
};

// All pointers to tiles and panels are aligned to 64 bytes.
struct Lanes {
  const char* isa;
  const char* (*missing)();  // NULL if this machine can run it, else what it lacks

  // c[j][r] += Σ_p a[p][r] b[p][j], p < depth; a: tile columns, b: [depth][kPanel], c: one panel.
  void (*add_product)(const float* a, const float* b, int64_t depth, float* c);
  // The same for a panel, column by column: the errors of the columns before it are added to each
  // value, which then becomes zero or stays, and is rounded: code = round(value / scale) + zero,
  // within [0, top].
  void (*solve_panel)(const SolvePanel&);

  // c[j][r] -= Σ_p a[p][r] b[p][j], as add_product; b may be the columns of another tile.
  void (*subtract_product)(const double* a, const double* b, int64_t depth, double* c);
  // Solves X Rᵀ = C for one panel, R upper triangular with r[p][j] = R[j, p]; X replaces C.
  void (*back_substitute)(const double* r, double* c);

  Extent (*extent)(const float* w, int64_t count);
  // Σ (x - clamp(round(x / scale), low, high) * scale)² over x = unit * w[i].
  float (*grid_error)(const float* w, int64_t count, float unit, float scale, float low,
                      float high);
};

// The best that this machine and TERSOR_ISA allow. Throws Error where TERSOR_ISA names no ISA, so
// it must not be called first inside parallel_for.
const Lanes& lanes();

extern const Lanes kBaselineLanes;
extern const Lanes kAvx2Lanes;
extern const Lanes kAvx512Lanes;

}  // namespace tersor::solve
