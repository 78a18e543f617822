// A weight of indices into sixteen values: portable order to CUDA order and back, and as plain
// floats, to the same bits as tersor.adapters.codebook.
#pragma once

#include "codebook.cuh"
#include "pack.cuh"

namespace tersor::cuda {

TERSOR_DEVICE PackArgs grid_args(const CodebookPackArgs& a) {
  return {a.s.w, a.packed, nullptr, a.scales, nullptr};
}

TERSOR_DEVICE void pack_codebook_body(const CodebookPackArgs& a) {
  const CodebookShape& s = a.s;
  pack_codes(s.w, a.packed, [&](int64_t row, int64_t column) {
    const int64_t i = row * s.w.k + column;
    return a.codes[i / 2] >> i % 2 * 4 & 15;
  });
  pack_grid(grid_args(a));
  each_of(s.scale_steps,
          [&](int64_t i) { reinterpret_cast<float*>(a.packed + s.steps_at)[i] = a.steps[i]; });
  if (s.doubled && worker() == 0 && thread() == 0)
    *reinterpret_cast<float*>(a.packed + s.mean_at) = *a.mean;
}

TERSOR_DEVICE void unpack_codebook_body(const CodebookPackArgs& a) {
  const CodebookShape& s = a.s;
  const auto code = [&](int64_t i) { return code_at(s.w, a.packed, i / s.w.k, i % s.w.k); };
  each_of(int64_t{s.w.n} * s.w.k / 2, [&](int64_t i) {  // k is even
    a.codes[i] = static_cast<uint8_t>(code(2 * i) | code(2 * i + 1) << 4);
  });
  unpack_grid(grid_args(a));
  each_of(s.scale_steps, [&](int64_t i) {
    a.steps[i] = reinterpret_cast<const float*>(a.packed + s.steps_at)[i];
  });
  if (s.doubled && worker() == 0 && thread() == 0)
    *a.mean = *reinterpret_cast<const float*>(a.packed + s.mean_at);
}

template <class To>
TERSOR_DEVICE void dequantize_codebook_body(const CodebookDequantizeArgs& a) {
  const Shape& w = a.s.w;
  each_of((a.end - a.begin) * w.k, [&](int64_t i) {
    const int64_t row = a.begin + i / w.k, column = i % w.k, group = column / w.g;
    const int64_t at = grid_of(w, row, group);
    float scale;
    if (a.s.doubled) {
      const int32_t step =
          scale_step_of(static_cast<int32_t>(row), a.s.row_groups, static_cast<int32_t>(group));
      scale = doubled_scale(reinterpret_cast<const int8_t*>(a.packed + w.scales_at)[at],
                            reinterpret_cast<const float*>(a.packed + a.s.steps_at)[step],
                            *reinterpret_cast<const float*>(a.packed + a.s.mean_at));
    } else {
      scale = reinterpret_cast<const float*>(a.packed + w.scales_at)[at];
    }
    put(static_cast<To*>(a.to) + i, times(a.values[code_at(w, a.packed, row, column)], scale));
  });
}

}  // namespace tersor::cuda
