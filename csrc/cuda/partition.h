// How the work of one product is divided among blocks of threads: "stream-k" (Osama et al.,
// arXiv:2301.03598). The steps of all tiles stand in one line, tile after tile, and each worker
// takes an equal stretch of it, so that no multiprocessor waits for a last wave of tiles. A tile
// that was divided is summed by the worker that finishes it last, in the order of its steps: the
// same bits every time.
//
//   steps    0 1 2 3 4 5 | 0 1 2 3 4 5 | 0 1 2 3 4 5      3 tiles of 6 steps
//   workers  0 0 0 0 0 1   1 1 1 1 2 2   2 2 2 3 3 3 ...
#pragma once

#include <cstdint>

#include "layout.h"

namespace tersor::cuda {

struct Partition {
  int32_t tiles, steps;  // steps of one tile
  int32_t workers;       // at most tiles * steps

  // The stretch of a worker begins here and ends where that of the next begins.
  TERSOR_BOTH constexpr int32_t begin(int32_t worker) const {
    return static_cast<int32_t>(int64_t{worker} * tiles * steps / workers);
  }
  // The worker whose stretch a step lies in.
  TERSOR_BOTH constexpr int32_t worker_of(int32_t step) const {
    return static_cast<int32_t>(((int64_t{step} + 1) * workers - 1) / (int64_t{tiles} * steps));
  }
  // Where a worker leaves its part of a tile that it shares: two slots each are enough, one for a
  // tile that was begun by others, and one for a tile that others go on with.
  TERSOR_BOTH constexpr int32_t slot(int32_t worker, int32_t tile) const {
    return 2 * worker + (begin(worker) <= tile * steps ? 1 : 0);
  }
};

// As many workers as the machine runs at once, but no stretch under `least` steps while there is
// another way: what a worker adds to others' sums costs about as much as some steps.
constexpr Partition partition_of(int32_t tiles, int32_t steps, int32_t resident, int32_t least) {
  const int64_t all = int64_t{tiles} * steps;
  int64_t workers = all / least;
  if (workers < tiles && tiles < resident) workers = tiles;
  if (workers > resident) workers = resident;
  if (workers < 1) workers = 1;
  return {tiles, steps, static_cast<int32_t>(workers > all ? all : workers)};
}

}  // namespace tersor::cuda
