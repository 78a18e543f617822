// LLM.int8() (Dettmers et al., arXiv:2208.07339): the columns of x that hold a value beyond a
// threshold in this call stay in 16 bits, and only the others become int8.
//
// Three kernels run one after the other: find_outliers marks the columns, a bit for each;
// quantize_body makes int8 codes without them; and MmaGemm with kOutliers multiplies both with the
// codes of W while they are in shared memory, so that W is read once. A value that is not finite
// makes no column an outlier: a token that holds one has no finite result either way, and how other
// tokens are rounded does not depend on it.
#pragma once

#include "arguments.h"
#include "device.cuh"
#include "quantize.cuh"

namespace tersor::cuda {

// A block of threads for each step of 64 columns; a thread has eight of them, of every 32nd token.
template <class T>
TERSOR_DEVICE void find_outliers_body(const OutlierArgs& a) {
  constexpr int kChunks = kBlock / 8, kRows = kOutlierThreads / kChunks;
  const int chunk = thread() % kChunks, column = worker() * kBlock + chunk * 8;
  auto* found = reinterpret_cast<uint32_t*>(shared_memory());  // [kRows][kChunks]
  uint32_t mine = 0;
#pragma unroll 4
  for (int64_t token = thread() / kChunks; token < a.m; token += kRows) {
    if (column >= a.k) break;
    uint32_t pairs[4];
    load16(pairs, static_cast<const uint16_t*>(a.x) + token * a.ldx + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = fabsf(value_of(static_cast<uint16_t>(pairs[i / 2] >> 16 * (i % 2)), T{}));
      mine |= static_cast<uint32_t>(value > a.threshold && value <= kMostFloat) << i;
    }
  }
  found[thread()] = mine;
  sync_block();
  if (thread() >= kChunks) return;
  for (int row = 1; row < kRows; ++row) mine |= found[row * kChunks + thread()];
  reinterpret_cast<uint8_t*>(a.outliers + worker())[thread()] = static_cast<uint8_t>(mine);
}

}  // namespace tersor::cuda
