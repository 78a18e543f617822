#include "gemm_mma_table.cuh"

namespace tersor::cuda {

std::vector<Gemm> mma_gemms_f16() {
  return {row<FloatProduct<Half, 4>, 8, 1>("w4f16_mma_8", 75, TERSOR_F16),
          row<FloatProduct<Half, 4>, 16, 1>("w4f16_mma_16", 75, TERSOR_F16),
          row<FloatProduct<Half, 4>, 32, 2>("w4f16_mma_32", 75, TERSOR_F16),
          row<FloatProduct<Half, 4>, 64, 1>("w4f16_mma_64", 75, TERSOR_F16),
          row<FloatProduct<Half, 8>, 8, 1>("w8f16_mma_8", 75, TERSOR_F16),
          row<FloatProduct<Half, 8>, 16, 1>("w8f16_mma_16", 75, TERSOR_F16),
          row<FloatProduct<Half, 8>, 32, 2>("w8f16_mma_32", 75, TERSOR_F16),
          row<FloatProduct<Half, 8>, 64, 1>("w8f16_mma_64", 75, TERSOR_F16)};
}

}  // namespace tersor::cuda
