#include "gemm_mma_table.cuh"

namespace tersor::cuda {
namespace {

// Few tokens leave most of shared memory to the table: a copy for each lane. With more, the table
// and the stages are to fit into the 64 KiB of sm_75.
constexpr int copies(int tokens) { return tokens <= 16 ? 32 : 16; }

template <class T, int kTokens, int kBlocks>
Gemm codebook_row(const char* name) {
  using Product = CodebookProduct<T, copies(kTokens)>;
  static_assert(MmaGemm<Product, kTokens, kBlocks>::kSharedBytes <= 64 << 10, "what sm_75 has");
  return row<Product, kTokens, kBlocks>(name, T::kIsBfloat ? 80 : 75,
                                        T::kIsBfloat ? TERSOR_BF16 : TERSOR_F16);
}

}  // namespace

std::vector<Gemm> codebook_gemms() {
  return {codebook_row<Half, 8, 1>("codebook_f16_mma_8"),
          codebook_row<Half, 16, 1>("codebook_f16_mma_16"),
          codebook_row<Half, 32, 2>("codebook_f16_mma_32"),
          codebook_row<Half, 64, 1>("codebook_f16_mma_64"),
          codebook_row<Bfloat, 8, 1>("codebook_bf16_mma_8"),
          codebook_row<Bfloat, 16, 1>("codebook_bf16_mma_16"),
          codebook_row<Bfloat, 32, 2>("codebook_bf16_mma_32"),
          codebook_row<Bfloat, 64, 1>("codebook_bf16_mma_64")};
}

}  // namespace tersor::cuda
