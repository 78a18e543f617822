#include "gemm_mma_table.cuh"

namespace tersor::cuda {

std::vector<Gemm> mma_gemms_bf16() {
  return {row<FloatProduct<Bfloat, 4>, 8, 1>("w4bf16_mma_8", 80, TERSOR_BF16),
          row<FloatProduct<Bfloat, 4>, 16, 1>("w4bf16_mma_16", 80, TERSOR_BF16),
          row<FloatProduct<Bfloat, 4>, 32, 2>("w4bf16_mma_32", 80, TERSOR_BF16),
          row<FloatProduct<Bfloat, 4>, 64, 1>("w4bf16_mma_64", 80, TERSOR_BF16),
          row<FloatProduct<Bfloat, 8>, 8, 1>("w8bf16_mma_8", 80, TERSOR_BF16),
          row<FloatProduct<Bfloat, 8>, 16, 1>("w8bf16_mma_16", 80, TERSOR_BF16),
          row<FloatProduct<Bfloat, 8>, 32, 2>("w8bf16_mma_32", 80, TERSOR_BF16),
          row<FloatProduct<Bfloat, 8>, 64, 1>("w8bf16_mma_64", 80, TERSOR_BF16)};
}

}  // namespace tersor::cuda
