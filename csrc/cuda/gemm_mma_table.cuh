// The kernels of gemm_mma.cuh, and the rows of their tables.
#pragma once

#include "gemm_mma.cuh"
#include "kernels.h"

namespace tersor::cuda {
namespace {

template <class Product, int kTokens, int kBlocks,
          class Kernel = MmaGemm<Product, kTokens, kBlocks>>
TERSOR_KERNEL(Kernel::kThreads, Kernel::kPerBlock)
mma_gemm(const __grid_constant__ LinearArgs args) {
  Kernel::run(args);
}

template <class Product, int kTokens, int kBlocks>
Gemm row(const char* name, int32_t arch, int32_t dtype) {
  using Kernel = MmaGemm<Product, kTokens, kBlocks>;
  return {name,
          arch,
          dtype,
          Product::kBits,
          kTokens,
          kBlocks,
          Kernel::kThreads,
          Kernel::kSharedBytes,
          Kernel::kTile * sizeof(float),
          false,
          Product::kElement == 1,
          reinterpret_cast<const void*>(&mma_gemm<Product, kTokens, kBlocks>),
          false,
          Product::kWhole};
}

}  // namespace
}  // namespace tersor::cuda
