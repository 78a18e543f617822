// The kernels of gemm_mma.cuh for one type of activations, and their table.
#pragma once

#include "gemm_mma.cuh"
#include "kernels.h"

namespace tersor::cuda {
namespace {

template <class T, int kBits, int kTokens, int kBlocks,
          class Kernel = MmaGemm<T, kBits, kTokens, kBlocks>>
TERSOR_KERNEL(Kernel::kThreads, Kernel::kPerBlock)
mma_gemm(const __grid_constant__ LinearArgs args) {
  Kernel::run(args);
}

template <class T, int kBits, int kTokens, int kBlocks>
Gemm row(const char* name, int32_t arch, int32_t dtype) {
  using Kernel = MmaGemm<T, kBits, kTokens, kBlocks>;
  return {name,
          arch,
          dtype,
          kBits,
          kTokens,
          kBlocks,
          Kernel::kThreads,
          Kernel::kSharedBytes,
          Kernel::kTile * sizeof(float),
          false,
          reinterpret_cast<const void*>(&mma_gemm<T, kBits, kTokens, kBlocks>)};
}

}  // namespace
}  // namespace tersor::cuda
