// The end of a tile, for every kernel whose threads hold sums in the fragments of mma.m16n8: a lane
// has rows lane / 4 and lane / 4 + 8 of 16, and tokens lane % 4 * 2 and the next of every 8.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "device.cuh"

namespace tersor::cuda {

// kBlocks: of 64 rows, that a thread has sums of; kThreads: that hold a tile together; Sum: float,
// or int32_t, which meets the scale of its row here and nowhere else. kSets: 2 where a second set
// of sums follows the first, which no token's scale belongs to.
template <class T, int kBlocks, int kTokenTiles, int kThreads, class Sum = float, int kSets = 1>
struct Epilogue {
  static constexpr int kSums = kSets * kBlocks * kTokenTiles;
  static constexpr int kTile = kSums * 4 * kThreads;  // elements of a partial sum
  static constexpr bool kWhole = !std::is_same_v<Sum, float>;
  static_assert(sizeof(Sum) == sizeof(float), "partial sums are stored as four words");
  static_assert(!kWhole || kSets == 1, "a second set is of float32");

  using Sums = Sum[kSets * kBlocks][kTokenTiles][4];

  static TERSOR_DEVICE void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < kSums; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i / kTokenTiles][i % kTokenTiles][j] = 0;
  }

  // row, token: the first of this thread's, in y. kScaled: every token has a scale of its own.
  template <bool kScaled = false>
  static TERSOR_DEVICE void store(const LinearArgs& a, int row, int token, const Sums& sums) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + b * kBlock + i / 2 * 8;
        if (r >= a.w.n) continue;
        const float bias = a.bias ? a.bias[r] : 0.f;
        const float scale = kWhole ? scale_of(a.packed + a.w.scales_at, a.scale_dtype, r) : 1.f;
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const int t = token + j * 8 + i % 2;
          if (t >= a.m) continue;
          float sum = static_cast<float>(sums[b][j][i]);
          if (kWhole) sum *= scale;
          if (kScaled) sum *= a.x_scales[t];
          float more = bias;  // in this order: a second set of zeros changes no bit
          if constexpr (kSets == 2) more = sums[kBlocks + b][j][i] + bias;
          a.y[t * a.ldy + r] = bits_of(sum + more, T{});
        }
      }
  }

  // Of a tile that several workers share, each leaves its part, and the one that comes last adds
  // them all up, its own too, in the order of the steps: true for that one, with the sums.
  // at: this thread among the kThreads; sync: a barrier of those; turn: 4 bytes in shared memory.
  template <class Sync>
  static TERSOR_DEVICE bool share(const LinearArgs& a, int tile, int at, int* turn, Sync sync,
                                  Sums& sums) {
    const Partition& p = a.partition;
    auto* partials = reinterpret_cast<Sum*>(a.partials);
    Sum* mine = partials + int64_t{p.slot(worker(), tile)} * kTile;
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      store16(mine + (i * kThreads + at) * 4, sums[i / kTokenTiles][i % kTokenTiles]);
    const int first = p.worker_of(tile * p.steps);
    const int last = p.worker_of(tile * p.steps + p.steps - 1);
    // Between the barriers one thread speaks for all: what they have stored is seen before the
    // count, and what others stored after it.
    sync();
    if (at == 0) {
      fence();
      *turn = add_atomically(a.arrived + tile, 1);
      fence();
    }
    sync();
    if (*turn != last - first) return false;
    clear(sums);
    for (int each = first; each <= last; ++each) {
      const Sum* part = partials + int64_t{p.slot(each, tile)} * kTile;
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        Sum four[4];
        load16(four, part + (i * kThreads + at) * 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i / kTokenTiles][i % kTokenTiles][j] += four[j];
      }
    }
    if (at == 0) a.arrived[tile] = 0;
    return true;
  }
};

}  // namespace tersor::cuda
