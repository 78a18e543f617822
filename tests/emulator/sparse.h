// csrc/cuda/mma_sparse.cuh on the CPU, after section 9.7.14.6 of the PTX manual ("Matrix
// multiply-accumulate operation using mma.sp instruction with sparse matrix A") and its figures for
// .m16n8k32 with .f16/.bf16 types.
#pragma once

#include "device.h"

namespace tersor::cuda {

template <class T, int kSelector>
void multiply_add_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                         uint32_t patterns) {
  struct Operands {
    float* c;
    const uint32_t *a, *b;
    uint32_t patterns;
  } mine{c, a, b, patterns};
  emulator::together(mine, [](void** lanes) {
    const auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane]); };
    const auto half = [](uint32_t pair, int second) {
      return static_cast<double>(value_of(static_cast<uint16_t>(pair >> 16 * second), T{}));
    };
    double second[32][8];
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int i = 0; i < 8; ++i)  // b0 to b7: rows in pairs, 8 apart
        second[lane % 4 * 2 + i % 2 + i / 2 * 8][lane / 4] = half(of(lane)->b[i / 2], i % 2);

    double first[16][32] = {};
    bool kept[16][32] = {};
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int i = 0; i < 8; ++i) {  // a0 to a7
        const int group = lane >> 2, inside = lane % 4;
        const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
        const int first_column = inside * 4 + (i < 4 ? 0 : 16);
        // The metadata: of the threads of a group, which has this row's chunks, in which bits.
        const int holder = group * 4 + 2 * kSelector + first_column / 16;
        const int bit = (row / 8) * 16 + first_column % 16 / 4 * 4;
        const uint32_t indices = of(holder)->patterns >> bit & 0xf;
        const bool defined = (indices & 3) < indices >> 2;  // else anything may come out
        const int column = first_column + static_cast<int>(i % 2 ? indices >> 2 : indices & 3);
        first[row][column] = defined ? half(of(lane)->a[i / 2], i % 2) : NAN;
        kept[row][column] = true;
      }

    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = of(lane)->c[i];
        for (int t = 0; t < 32; ++t)
          if (kept[row][t]) sum += first[row][t] * second[t][column];
        of(lane)->c[i] = static_cast<float>(sum);
      }
  });
}

}  // namespace tersor::cuda
