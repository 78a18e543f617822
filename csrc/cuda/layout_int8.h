// Where int8 activations lie: made once for all products that read the same x, and in groups of as
// many columns.
//
//   codes     [rows][steps * 64] int8, in the order of quantize.cuh; beyond k zero
//   scales    [rows] float32
//   sums      [groups][rows] int32, of the codes of a group
//   outliers  [steps] of 64 bits, one for each column that stays in 16 bits, where some may
//
// each from a multiple of 128 bytes on. rows: m, and as many more as make whole tiles, with the
// scale zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace tersor::cuda {

// The widest tile of a kernel for int8 activations; the others are 8, 16 and 32.
constexpr int64_t kMostInt8Tokens = 64;

// Tokens of whole tiles, of the narrowest that hold all, or of the widest.
constexpr int64_t whole_tiles(int64_t m) {
  for (int64_t tile = 8; tile < kMostInt8Tokens; tile *= 2)
    if (m <= tile) return tile;
  return round_up(m, kMostInt8Tokens);
}

struct Int8Layout {
  Shape w;  // of any weight with that k and g
  int64_t rows, columns;
  int64_t scales_at, sums_at, outliers_at;
  int64_t bytes;

  constexpr Int8Layout(int64_t m, int64_t k, int64_t g)
      : w(shape_of(16, k, g, 4, false, 0)),
        rows(whole_tiles(m)),
        columns(int64_t{w.steps} * kBlock),
        scales_at(round_up(rows * columns, kSection)),
        sums_at(scales_at + round_up(rows * 4, kSection)),
        outliers_at(sums_at + round_up(rows * w.groups * 4, kSection)),
        bytes(outliers_at + int64_t{w.steps} * 8) {}
};

}  // namespace tersor::cuda
