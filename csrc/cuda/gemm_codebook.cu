#include "gemm_mma.cuh"
#include "kernels.h"

namespace tersor::cuda {
namespace {

// Few tokens leave most of shared memory to the table: a copy for each lane. With more, the table
// and the stages are to fit into the 64 KiB of sm_75.
constexpr int copies(int tokens) { return tokens <= 16 ? 32 : 16; }

template <
    class T, int kTokens, int kBlocks,
    class Kernel = MmaGemm<CodebookProduct<T, copies(kTokens)>, kTokens, kBlocks, CodebookArgs>>
TERSOR_KERNEL(Kernel::kThreads, Kernel::kPerBlock)
codebook_gemm(const __grid_constant__ CodebookArgs args) {
  Kernel::run(args);
}

template <class T, int kTokens, int kBlocks>
Gemm row(const char* name, int32_t arch, int32_t dtype) {
  using Kernel = MmaGemm<CodebookProduct<T, copies(kTokens)>, kTokens, kBlocks, CodebookArgs>;
  static_assert(Kernel::kSharedBytes <= 64 << 10, "what sm_75 has");
  Gemm made{name,
            arch,
            dtype,
            4,
            kTokens,
            kBlocks,
            Kernel::kThreads,
            Kernel::kSharedBytes,
            Kernel::kTile * sizeof(float),
            false,
            false,
            reinterpret_cast<const void*>(&codebook_gemm<T, kTokens, kBlocks>)};
  made.codebook = true;
  return made;
}

}  // namespace

std::vector<Gemm> codebook_gemms() {
  return {row<Half, 8, 1>("codebook_f16_mma_8", 75, TERSOR_F16),
          row<Half, 16, 1>("codebook_f16_mma_16", 75, TERSOR_F16),
          row<Half, 32, 2>("codebook_f16_mma_32", 75, TERSOR_F16),
          row<Half, 64, 1>("codebook_f16_mma_64", 75, TERSOR_F16),
          row<Bfloat, 8, 1>("codebook_bf16_mma_8", 80, TERSOR_BF16),
          row<Bfloat, 16, 1>("codebook_bf16_mma_16", 80, TERSOR_BF16),
          row<Bfloat, 32, 2>("codebook_bf16_mma_32", 80, TERSOR_BF16),
          row<Bfloat, 64, 1>("codebook_bf16_mma_64", 80, TERSOR_BF16)};
}

}  // namespace tersor::cuda
