#include "gemm_mma_table.cuh"

namespace tersor::cuda {

std::vector<Gemm> sparse_gemms_f16() {
  return {row<SparseProduct<Half, 4>, 8, 2>("w4f16_sparse_8", 80, TERSOR_F16),
          row<SparseProduct<Half, 4>, 16, 2>("w4f16_sparse_16", 80, TERSOR_F16),
          row<SparseProduct<Half, 4>, 32, 2>("w4f16_sparse_32", 80, TERSOR_F16),
          row<SparseProduct<Half, 4>, 64, 2>("w4f16_sparse_64", 80, TERSOR_F16),
          row<SparseProduct<Half, 16>, 8, 2>("w16f16_sparse_8", 80, TERSOR_F16),
          row<SparseProduct<Half, 16>, 16, 2>("w16f16_sparse_16", 80, TERSOR_F16),
          row<SparseProduct<Half, 16>, 32, 2>("w16f16_sparse_32", 80, TERSOR_F16),
          row<SparseProduct<Half, 16>, 64, 2>("w16f16_sparse_64", 80, TERSOR_F16)};
}

}  // namespace tersor::cuda
