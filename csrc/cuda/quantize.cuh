// Activations as int8, one block of threads for each token, and the sums of their groups.
//
// Of every 16 columns the codes stand in the order in which a lane has those of W (Int8Product):
// four bytes for each t = 0 ... 3, columns 2t, 2t + 8, 2t + 1 and 2t + 9.
#pragma once

#include "arguments.h"
#include "device.cuh"
#include "layout_int8.h"

namespace tersor::cuda {

TERSOR_DEVICE int int8_place(int column) {
  const int c = column % 16;
  return column - c + c % 8 / 2 * 4 + c % 2 * 2 + c / 8;
}

// The largest value of a block of threads; infinite where one is not finite.
TERSOR_DEVICE float most_of_block(float most) {
  constexpr int kWarps = kQuantizeThreads / kLanes;
  float* shared = reinterpret_cast<float*>(shared_memory());  // [kWarps]
  most = most_of_lanes(most);
  if (thread() % kLanes == 0) shared[thread() / kLanes] = most;
  sync_block();
  for (int i = 0; i < kWarps; ++i) most = fmaxf(most, shared[i]);
  return most;
}

// |value|, or infinity for a NaN, which would be lost in a maximum.
TERSOR_DEVICE float size_of(float value) {
  return fabsf(value) <= kMostFloat ? fabsf(value) : kInfinity;
}

// A token with a value that is not finite has the scale NaN. kOutliers: columns with a bit in
// a.outliers have the code 0, and no part in scales and sums.
template <class Element, bool kOutliers = false>
TERSOR_DEVICE void quantize_body(const QuantizeArgs& a) {
  const int token = worker(), warp = thread() / kLanes, lane = thread() % kLanes;
  constexpr int kWarps = kQuantizeThreads / kLanes;
  const auto* x = static_cast<const Element*>(a.x) + token * a.ldx;
  const bool there = token < a.m;  // else a row that is only padding
  const auto left_out = [&](int column) {
    return kOutliers && a.outliers[column / kBlock] >> column % kBlock & 1;
  };
  float most = 0, scale;
  if (a.scale) {
    scale = *a.scale;
  } else {
    for (int column = thread(); there && column < a.w.k; column += kQuantizeThreads)
      if (!left_out(column)) most = fmaxf(most, size_of(value_at(x, column)));
    most = most_of_block(most);
    scale = most <= kMostFloat ? quotient(most, 127.5f) : kNaN;
  }
  const int columns = a.w.steps * kBlock;
  int8_t* codes = a.codes + int64_t{token} * columns;
  // A warp has the groups warp, warp + kWarps, ...
  const int width = a.w.groups_per_step == 2 ? kBlock / 2 : a.w.steps_per_group * kBlock;
  for (int group = warp; group < a.w.groups; group += kWarps) {
    int sum = 0;
    for (int i = lane; i < width; i += kLanes) {
      const int column = group * width + i;
      if (column >= columns) break;
      int code = 0;
      if (there && column < a.w.k && scale > 0 && !left_out(column)) {
        const float value = value_at(x, column);
        code = nearest(fminf(fmaxf(quotient(value, scale), -128.f), 127.f));
        if (a.scale) most = fmaxf(most, size_of(value));
      }
      codes[int8_place(column)] = static_cast<int8_t>(code);
      sum += code;
    }
    sum = sum_of_lanes(sum);
    if (lane == 0) a.sums[int64_t{group} * a.rows + token] = sum;
  }
  if (a.scale && most_of_block(most) > kMostFloat) scale = kNaN;
  if (thread() == 0) a.scales[token] = there ? scale : 0.f;
}

}  // namespace tersor::cuda
