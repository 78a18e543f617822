// What the host hands to the kernels, by value. Pointers are to the memory of the device.
#pragma once

#include "codebook.h"
#include "kernel.h"
#include "layout.h"
#include "partition.h"

namespace tersor::cuda {

// What a kernel multiplies.
enum class Sort {
  plain,     // codes with 16-bit activations
  int8,      // with int8 ones, as a quantize_kernel leaves them
  rows,      // as int8, of weights with one scale a row, or on a two-level grid
  outliers,  // as int8, and columns in 16 bits beside them
  codebook,  // indices into sixteen values: takes CodebookArgs
  sparse,    // weights without 2:4 zeros, with 16-bit activations
};

constexpr bool takes_int8(Sort sort) {
  return sort == Sort::int8 || sort == Sort::rows || sort == Sort::outliers;
}

// y = x * dequantize(W)^T + bias.
struct LinearArgs {
  Shape w;
  int32_t scale_dtype;  // enum tersor_dtype
  const uint8_t* packed;
  const void* x;      // [m, k] of 16 bits, or int8 (see quantize.cuh); rows begin at 16 bytes
  uint16_t* y;        // [m, n]
  const float* bias;  // [n] or nullptr
  int64_t ldx, ldy;   // in elements
  int32_t m;
  int32_t token_tiles;
  Partition partition;  // of tiles [row tile][token tile]
  float* partials;      // two tiles for each worker, or int32_t where sums are that
  int* arrived;         // one for each tile, zero before and after
  // Where x is int8:
  const float* x_scales;  // [m]
  const int32_t* x_sums;  // [groups][x_rows]: of x, in every group; whole tiles of tokens
  int64_t x_rows;
  // Where some columns of x stay in 16 bits (outliers.cuh):
  const uint64_t* outliers;  // [steps], a bit for each column
  const void* exact;         // x as the caller has it; rows begin at 16 bytes
  int64_t ld_exact;          // in elements
};

// The same for a weight of indices into sixteen values (codebook.h).
struct CodebookArgs : LinearArgs {
  RoundedValues codebook;  // of the dtype of x
  int32_t doubled, row_groups;
  const float* scale_steps;  // of the weight, where doubled
  const float* mean;
};

constexpr int kQuantizeThreads = 256;  // of the kernel that takes QuantizeArgs
constexpr int kQuantizeShared = kQuantizeThreads / 32 * 4;

// Activations as int8 (layout_int8.h): x / scale rounded to nearest even, from -128 to 127. Written
// are the columns of whole steps, and `rows` tokens, so that kernels need not look where x ends.
struct QuantizeArgs {
  Shape w;        // whose groups are summed
  const void* x;  // [m, k]
  int64_t ldx;    // in elements
  int32_t m, rows;
  const float* scale;  // [1], of all tokens, or nullptr for absmax / 127.5 of each
  int8_t* codes;
  float* scales;
  int32_t* sums;
  const uint64_t* outliers;  // for the kernel that leaves columns out
};

constexpr int kOutlierThreads = 256;  // of the kernel that takes OutlierArgs
constexpr int kOutlierShared = kOutlierThreads * 4;

// Which columns of x hold a finite value beyond the threshold, whose absolute value is meant.
struct OutlierArgs {
  const void* x;  // [m, k] of 16 bits; rows begin at 16 bytes
  int64_t ldx;    // in elements
  int32_t m, k;   // k: a multiple of 8
  float threshold;
  uint64_t* outliers;  // [steps], a bit for each column
};

// A matrix as the memory engine sees it (CUtensorMap of the driver). Here: [rows][columns] of 16
// bits, copied in boxes of 64 columns, 128 bytes a row; the 16 bytes c of a row stand at c ^ row %
// 8, so that eight rows of a column lie in different banks.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// The same as LinearArgs for kernels whose x comes by the memory engine.
struct BoxedArgs {
  LinearArgs linear;
  TensorMap x;  // boxes as high as a tile of tokens
};

constexpr int kPackThreads = 256;  // of the kernels that take the two below

// A weight in both orders; portable: codes [n, k], scales [n, k / g], zeros [n, k / g] or nullptr;
// on a two-level grid scales [n], and multipliers [n, k / g] for zeros; or 16-bit values [n, k],
// and nothing else.
struct PackArgs {
  Shape w;
  uint8_t* packed;
  uint8_t* codes;
  uint8_t* scales;  // elements of w.scale_bytes
  uint8_t* zeros;
};

// (code - zero) * scale of rows [begin, end), rounded once to the dtype of `to` [end - begin, k].
struct DequantizeArgs {
  Shape w;
  int32_t scale_dtype;  // enum tersor_dtype; of 16-bit values, theirs
  const uint8_t* packed;
  int64_t begin, end;
  void* to;
};

// One block of columns of the solver, as solve/solve.h defines it. Rows [n], all matrices
// row-major.
constexpr int kSolveColumns = 128;  // of a block
constexpr int kSolveRows = 32;      // of a worker
constexpr int kSolveThreads = 256;
constexpr int kSolveShared = kSolveColumns * kSolveColumns * 4;

struct SolveArgs {
  int64_t n, k, groups;
  int32_t first, width;            // the columns
  const float* w;                  // [n, k]
  const float* unit;               // [k, k], read strictly above the diagonal
  float* values;                   // [n, k]: w plus the errors of the blocks before this one;
                                   // without a grid also what comes of it, in place
  const float* scales;             // [n, groups]; nullptr: no grid
  const uint8_t* zeros;            // [n, groups] or nullptr
  const int32_t* group_of_column;  // [k]
  int32_t levels;
  int32_t kept, of;     // where the kernel chooses what becomes zero; of: 2, 4, 8 or 16, else 0
  const uint8_t* keep;  // [n, width], rows keep_stride apart: 0 becomes zero; or nullptr
  int64_t keep_stride;  // in elements
  const float* pivots;  // [k], for a pattern and for losses
  uint8_t* codes;       // [n, k], on a grid
  float* errors;        // [n, kSolveColumns]: w less what it becomes
  float* losses;        // [n, width]: what it would cost to make each weight zero; then the rest
                        // is not written. nullptr otherwise
};

// The grids of all groups of a weight, whose elements are finite.
struct GridArgs {
  int64_t count, group;  // groups, and their elements
  const float* w;        // [count, group]
  int32_t bits, symmetric, clip, scale_dtype;
  float* scales;   // [count]; infinite where the dtype has none
  uint8_t* zeros;  // [count], or nullptr where symmetric
};

// A weight of indices in both orders; portable, as tersor.adapters.codebook has it: codes
// [n * k / 2], two to a byte, scales [n * k / g], and steps [scale_steps] and mean [1] or nullptr.
struct CodebookPackArgs {
  CodebookShape s;
  uint8_t* packed;
  uint8_t* codes;
  uint8_t* scales;  // elements of s.w.scale_bytes
  float* steps;
  float* mean;
};

// value * scale of rows [begin, end), in float32, then rounded to the dtype of `to` [end - begin,
// k].
struct CodebookDequantizeArgs {
  CodebookShape s;
  const uint8_t* packed;
  float values[kValues];
  int64_t begin, end;
  void* to;
};

}  // namespace tersor::cuda
