#include "gemm_mma_table.cuh"

namespace tersor::cuda {

std::vector<Gemm> row_gemms() {
  return {row<RowProduct<Half, 4>, 8, 1>("w4a8_rows_8", 80, TERSOR_F16),
          row<RowProduct<Half, 4>, 16, 1>("w4a8_rows_16", 80, TERSOR_F16),
          row<RowProduct<Half, 4>, 32, 2>("w4a8_rows_32", 80, TERSOR_F16),
          row<RowProduct<Half, 4>, 64, 2>("w4a8_rows_64", 80, TERSOR_F16),
          row<RowProduct<Bfloat, 4>, 8, 1>("w4a8_rows_8", 80, TERSOR_BF16),
          row<RowProduct<Bfloat, 4>, 16, 1>("w4a8_rows_16", 80, TERSOR_BF16),
          row<RowProduct<Bfloat, 4>, 32, 2>("w4a8_rows_32", 80, TERSOR_BF16),
          row<RowProduct<Bfloat, 4>, 64, 2>("w4a8_rows_64", 80, TERSOR_BF16),
          row<RowProduct<Half, 8>, 8, 1>("w8a8_rows_8", 80, TERSOR_F16),
          row<RowProduct<Half, 8>, 16, 1>("w8a8_rows_16", 80, TERSOR_F16),
          row<RowProduct<Half, 8>, 32, 2>("w8a8_rows_32", 80, TERSOR_F16),
          row<RowProduct<Half, 8>, 64, 2>("w8a8_rows_64", 80, TERSOR_F16),
          row<RowProduct<Bfloat, 8>, 8, 1>("w8a8_rows_8", 80, TERSOR_BF16),
          row<RowProduct<Bfloat, 8>, 16, 1>("w8a8_rows_16", 80, TERSOR_BF16),
          row<RowProduct<Bfloat, 8>, 32, 2>("w8a8_rows_32", 80, TERSOR_BF16),
          row<RowProduct<Bfloat, 8>, 64, 2>("w8a8_rows_64", 80, TERSOR_BF16)};
}

}  // namespace tersor::cuda
