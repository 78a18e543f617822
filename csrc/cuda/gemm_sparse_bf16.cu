#include "gemm_mma_table.cuh"

namespace tersor::cuda {

std::vector<Gemm> sparse_gemms_bf16() {
  return {row<SparseProduct<Bfloat, 4>, 8, 2>("w4bf16_sparse_8", 80, TERSOR_BF16),
          row<SparseProduct<Bfloat, 4>, 16, 2>("w4bf16_sparse_16", 80, TERSOR_BF16),
          row<SparseProduct<Bfloat, 4>, 32, 2>("w4bf16_sparse_32", 80, TERSOR_BF16),
          row<SparseProduct<Bfloat, 4>, 64, 2>("w4bf16_sparse_64", 80, TERSOR_BF16),
          row<SparseProduct<Bfloat, 16>, 8, 2>("w16bf16_sparse_8", 80, TERSOR_BF16),
          row<SparseProduct<Bfloat, 16>, 16, 2>("w16bf16_sparse_16", 80, TERSOR_BF16),
          row<SparseProduct<Bfloat, 16>, 32, 2>("w16bf16_sparse_32", 80, TERSOR_BF16),
          row<SparseProduct<Bfloat, 16>, 64, 2>("w16bf16_sparse_64", 80, TERSOR_BF16)};
}

}  // namespace tersor::cuda
