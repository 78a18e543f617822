// A weight of indices into sixteen values (NF4, FP4), in CUDA order: where everything lies, and the
// values as tensor cores take them. Both sides, and the tests of both, compute with these.
//
// Codes are those of layout.h with 4 bits; columns past k, and rows past n, have any of them. A
// group is a block of g weights that share a scale, and the last of
//
//   scales       [n / 64][groups][64] float32, or int8 where scales are quantized themselves
//   scale steps  [blocks / 256] float32, rounded up: of 256 blocks that follow each other in the
//                matrix, row after row, as they are stored; only with int8 scales
//   mean         [1] float32; only with int8 scales
//
// says what it is: scale, or scale * step + mean. Nothing is stored twice, and nothing but padding
// is added: a kernel reads the bits that the weight has.
#pragma once

#include "cpu/tile16.h"
#include "kernel.h"
#include "layout.h"

namespace tersor::cuda {

constexpr int kValues = 16;
constexpr int kStepBlocks = 256;  // that share a step

struct CodebookShape {
  Shape w;              // scale_bytes: 4, or 1 where doubled
  int32_t doubled;      // 0 or 1: scales are quantized themselves
  int32_t row_groups;   // of a row, without padding
  int32_t scale_steps;  // all of them
  int64_t steps_at, mean_at, bytes;
};

constexpr CodebookShape codebook_shape_of(int64_t n, int64_t k, int64_t g, bool doubled) {
  CodebookShape s{};
  s.w = shape_of(n, k, g, 4, false, false, doubled ? 1 : 4);
  s.doubled = doubled;
  s.row_groups = static_cast<int32_t>(k / g);
  s.scale_steps = doubled ? static_cast<int32_t>((n * (k / g) + kStepBlocks - 1) / kStepBlocks) : 0;
  s.steps_at = s.w.bytes;
  s.mean_at = s.steps_at + round_up(int64_t{s.scale_steps} * 4, kSection);
  s.bytes = s.mean_at + (doubled ? kSection : 0);
  return s;
}

// The step of a block's scale.
TERSOR_BOTH constexpr int32_t scale_step_of(int32_t row, int32_t row_groups, int32_t group) {
  return (row * row_groups + group) / kStepBlocks;
}

// Sixteen values in 16 bits: values[i] * unit is the nearest to the i-th that these bits can say.
struct RoundedValues {
  uint16_t values[kValues];
  float unit;
};

// A multiple of all values may need fewer digits than they do: FP4's sixths do, which are then
// exact in both dtypes. Among 1024 multiples from 1 to 2 this takes the one whose rounding changes
// the values least in the sum of squares, and 1 where none is better; the inverse goes into the
// scales, which are float32. (NF4: an error of 3.1e-4 of the scale in bfloat16, where rounding the
// values themselves has 5.3e-4, and 3.2e-5 for 7.2e-5 in float16, root mean square on Gaussian
// weights.) What remains is the only rounding of a weight on its way into the product: at most half
// a unit in the last place, as that of a weight which is dequantized to 16 bits.
inline RoundedValues rounded_values(const float* values, int32_t dtype) {
  constexpr int kMultiples = 1024;
  const auto round = [&](double value) {
    const auto narrow = static_cast<float>(value);
    return dtype == TERSOR_F16 ? to_f16(narrow) : to_bf16(narrow);
  };
  RoundedValues best{};
  double least = -1;
  for (int i = 0; i < kMultiples; ++i) {
    const double multiple = 1 + static_cast<double>(i) / kMultiples;
    RoundedValues tried{};
    tried.unit = static_cast<float>(1 / multiple);
    double error = 0;
    for (int j = 0; j < kValues; ++j) {
      tried.values[j] = round(values[j] * multiple);
      const float kept =
          dtype == TERSOR_F16 ? from_f16(tried.values[j]) : from_bf16(tried.values[j]);
      const double off = static_cast<double>(kept) * tried.unit - values[j];
      error += off * off;
    }
    if (least >= 0 && error >= least) continue;
    least = error;
    best = tried;
  }
  return best;
}

}  // namespace tersor::cuda
