#include "gemm_mma_table.cuh"
#include "outliers.cuh"

namespace tersor::cuda {
namespace {

template <class T>
TERSOR_KERNEL(kOutlierThreads, 1)
find_outliers(const __grid_constant__ OutlierArgs args) {
  find_outliers_body<T>(args);
}

template <class T>
TERSOR_KERNEL(kQuantizeThreads, 1)
quantize_others(const __grid_constant__ QuantizeArgs args) {
  quantize_body<Bits<T>, true>(args);
}

template <class T, int kBits, int kTokens, int kBlocks>
Gemm outlier_row(const char* name) {
  return row<Int8Product<T, kBits>, kTokens, kBlocks, true>(
      name, 80, T::kIsBfloat ? TERSOR_BF16 : TERSOR_F16);
}

}  // namespace

const void* outlier_kernel(int32_t dtype) {
  if (dtype == TERSOR_BF16) return reinterpret_cast<const void*>(&find_outliers<Bfloat>);
  return reinterpret_cast<const void*>(&find_outliers<Half>);
}

const void* quantize_others_kernel(int32_t dtype) {
  if (dtype == TERSOR_BF16) return reinterpret_cast<const void*>(&quantize_others<Bfloat>);
  return reinterpret_cast<const void*>(&quantize_others<Half>);
}

std::vector<Gemm> outlier_gemms() {
  return {
      outlier_row<Half, 4, 8, 1>("w4a8o_mma_8"),     outlier_row<Half, 4, 16, 1>("w4a8o_mma_16"),
      outlier_row<Half, 4, 32, 2>("w4a8o_mma_32"),   outlier_row<Half, 4, 64, 1>("w4a8o_mma_64"),
      outlier_row<Bfloat, 4, 8, 1>("w4a8o_mma_8"),   outlier_row<Bfloat, 4, 16, 1>("w4a8o_mma_16"),
      outlier_row<Bfloat, 4, 32, 2>("w4a8o_mma_32"), outlier_row<Bfloat, 4, 64, 1>("w4a8o_mma_64"),
      outlier_row<Half, 8, 8, 1>("w8a8o_mma_8"),     outlier_row<Half, 8, 16, 1>("w8a8o_mma_16"),
      outlier_row<Half, 8, 32, 2>("w8a8o_mma_32"),   outlier_row<Half, 8, 64, 1>("w8a8o_mma_64"),
      outlier_row<Bfloat, 8, 8, 1>("w8a8o_mma_8"),   outlier_row<Bfloat, 8, 16, 1>("w8a8o_mma_16"),
      outlier_row<Bfloat, 8, 32, 2>("w8a8o_mma_32"), outlier_row<Bfloat, 8, 64, 1>("w8a8o_mma_64")};
}

}  // namespace tersor::cuda
