// The kernels of gemm_mma.cuh, and the rows of their tables.
#pragma once

#include "gemm_mma.cuh"
#include "kernels.h"

namespace tersor::cuda {
namespace {

template <class Product, int kTokens, int kBlocks, bool kOutliers = false,
          class Kernel = MmaGemm<Product, kTokens, kBlocks, kOutliers>>
TERSOR_KERNEL(Kernel::kThreads, Kernel::kPerBlock)
mma_gemm(const __grid_constant__ typename Kernel::Args args) {
  Kernel::run(args);
}

template <class Product, int kTokens, int kBlocks, bool kOutliers = false>
Gemm row(const char* name, int32_t arch, int32_t dtype) {
  using Kernel = MmaGemm<Product, kTokens, kBlocks, kOutliers>;
  return {name,
          arch,
          dtype,
          Product::kBits,
          kTokens,
          kBlocks,
          Kernel::kThreads,
          Kernel::kSharedBytes,
          Kernel::kTile * sizeof(float),
          kOutliers ? Sort::outliers : Product::kSort,
          false,
          reinterpret_cast<const void*>(&mma_gemm<Product, kTokens, kBlocks, kOutliers>)};
}

}  // namespace
}  // namespace tersor::cuda
