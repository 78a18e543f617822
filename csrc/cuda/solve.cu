#include "solve.cuh"

#include "kernels.h"

namespace tersor::cuda {
namespace {

template <bool kGrid, bool kPattern>
TERSOR_KERNEL(kSolveThreads, 2)
solve_block(const __grid_constant__ SolveArgs args) {
  BlockSolver<kGrid, kPattern>(args).run();
}

TERSOR_KERNEL(kPackThreads, 1) search_grid(const __grid_constant__ GridArgs args) {
  search_grid_body(args);
}

}  // namespace

const void* solve_kernel(bool grid, bool pattern) {
  if (grid)
    return pattern ? reinterpret_cast<const void*>(&solve_block<true, true>)
                   : reinterpret_cast<const void*>(&solve_block<true, false>);
  return pattern ? reinterpret_cast<const void*>(&solve_block<false, true>)
                 : reinterpret_cast<const void*>(&solve_block<false, false>);
}

const void* search_grid_kernel() { return reinterpret_cast<const void*>(&search_grid); }

}  // namespace tersor::cuda
