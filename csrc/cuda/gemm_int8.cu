#include "gemm_mma_table.cuh"
#include "quantize.cuh"

namespace tersor::cuda {
namespace {

template <class Element>
TERSOR_KERNEL(kQuantizeThreads, 1)
quantize_tokens(const __grid_constant__ QuantizeArgs args) {
  quantize_body<Element>(args);
}

}  // namespace

const void* quantize_kernel(int32_t dtype) {
  if (dtype == TERSOR_F32) return reinterpret_cast<const void*>(&quantize_tokens<float>);
  if (dtype == TERSOR_BF16) return reinterpret_cast<const void*>(&quantize_tokens<Bits<Bfloat>>);
  return reinterpret_cast<const void*>(&quantize_tokens<Bits<Half>>);
}

std::vector<Gemm> int8_gemms() {
  return {row<Int8Product<Half, 4>, 8, 1>("w4a8_mma_8", 80, TERSOR_F16),
          row<Int8Product<Half, 4>, 16, 1>("w4a8_mma_16", 80, TERSOR_F16),
          row<Int8Product<Half, 4>, 32, 2>("w4a8_mma_32", 80, TERSOR_F16),
          row<Int8Product<Half, 4>, 64, 2>("w4a8_mma_64", 80, TERSOR_F16),
          row<Int8Product<Bfloat, 4>, 8, 1>("w4a8_mma_8", 80, TERSOR_BF16),
          row<Int8Product<Bfloat, 4>, 16, 1>("w4a8_mma_16", 80, TERSOR_BF16),
          row<Int8Product<Bfloat, 4>, 32, 2>("w4a8_mma_32", 80, TERSOR_BF16),
          row<Int8Product<Bfloat, 4>, 64, 2>("w4a8_mma_64", 80, TERSOR_BF16),
          row<Int8Product<Half, 8>, 8, 1>("w8a8_mma_8", 80, TERSOR_F16),
          row<Int8Product<Half, 8>, 16, 1>("w8a8_mma_16", 80, TERSOR_F16),
          row<Int8Product<Half, 8>, 32, 2>("w8a8_mma_32", 80, TERSOR_F16),
          row<Int8Product<Half, 8>, 64, 2>("w8a8_mma_64", 80, TERSOR_F16),
          row<Int8Product<Bfloat, 8>, 8, 1>("w8a8_mma_8", 80, TERSOR_BF16),
          row<Int8Product<Bfloat, 8>, 16, 1>("w8a8_mma_16", 80, TERSOR_BF16),
          row<Int8Product<Bfloat, 8>, 32, 2>("w8a8_mma_32", 80, TERSOR_BF16),
          row<Int8Product<Bfloat, 8>, 64, 2>("w8a8_mma_64", 80, TERSOR_BF16)};
}

}  // namespace tersor::cuda
