#include "gemm_wgmma.cuh"

#include "kernels.h"

namespace tersor::cuda {
namespace {

template <class T, int kBits, int kTokens, class Kernel = WgmmaGemm<T, kBits, kTokens>>
TERSOR_KERNEL(Kernel::kThreads, Kernel::kPerBlock)
wgmma_gemm(const __grid_constant__ BoxedArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Kernel::run(args);
#endif
}

template <class T, int kBits, int kTokens>
Gemm row(const char* name, int32_t dtype) {
  using Kernel = WgmmaGemm<T, kBits, kTokens>;
  return {name,
          90,
          dtype,
          kBits,
          kTokens,
          Kernel::kBlocks,
          Kernel::kThreads,
          Kernel::kSharedBytes,
          Kernel::kTile * sizeof(float),
          true,
          false,
          reinterpret_cast<const void*>(&wgmma_gemm<T, kBits, kTokens>)};
}

}  // namespace

std::vector<Gemm> wgmma_gemms() {
  return {row<Half, 4, 64>("w4f16_wgmma_64", TERSOR_F16),
          row<Half, 4, 128>("w4f16_wgmma_128", TERSOR_F16),
          row<Half, 8, 64>("w8f16_wgmma_64", TERSOR_F16),
          row<Half, 8, 128>("w8f16_wgmma_128", TERSOR_F16),
          row<Bfloat, 4, 64>("w4bf16_wgmma_64", TERSOR_BF16),
          row<Bfloat, 4, 128>("w4bf16_wgmma_128", TERSOR_BF16),
          row<Bfloat, 8, 64>("w8bf16_wgmma_64", TERSOR_BF16),
          row<Bfloat, 8, 128>("w8bf16_wgmma_128", TERSOR_BF16)};
}

}  // namespace tersor::cuda
