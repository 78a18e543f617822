// The column solver's CUDA kernels as C functions that run on the CPU, for
// tests/test_cuda_solver.py.
#define TERSOR_EMULATED

#include "cuda/solve.cuh"

namespace {

using namespace tersor::cuda;

template <bool kGrid, bool kPattern>
void run(const SolveArgs& a, unsigned seed) {
  const int workers = static_cast<int>((a.n + kSolveRows - 1) / kSolveRows);
  emulator::launch(workers, kSolveThreads, kSolveShared, {}, seed, false,
                   [&] { BlockSolver<kGrid, kPattern>(a).run(); });
}

}  // namespace

extern "C" {

void solve_block(int64_t n, int64_t k, int64_t groups, int first, int width, const float* w,
                 const float* unit, float* values, const float* scales, const uint8_t* zeros,
                 const int32_t* group_of_column, int levels, const uint8_t* keep,
                 int64_t keep_stride, const float* pivots, int kept, int of, uint8_t* codes,
                 float* errors, float* losses, unsigned seed) {
  const SolveArgs a{n,      k,           groups, first,           width,  w,     unit,
                    values, scales,      zeros,  group_of_column, levels, kept,  of,
                    keep,   keep_stride, pivots, codes,           errors, losses};
  if (scales)
    of ? run<true, true>(a, seed) : run<true, false>(a, seed);
  else
    of ? run<false, true>(a, seed) : run<false, false>(a, seed);
}

void search_grid(int64_t count, int64_t group, const float* w, int bits, int symmetric, int clip,
                 int scale_dtype, float* scales, uint8_t* zeros) {
  const GridArgs a{count, group, w, bits, symmetric, clip, scale_dtype, scales, zeros};
  emulator::launch(3, kPackThreads, 0, {}, 0, false, [&] { search_grid_body(a); });
}

}  // extern "C"
