#include "pack_codebook.cuh"

#include "kernels.h"

namespace tersor::cuda {
namespace {

TERSOR_KERNEL(kPackThreads, 1) pack_codebook(const __grid_constant__ CodebookPackArgs args) {
  pack_codebook_body(args);
}

TERSOR_KERNEL(kPackThreads, 1) unpack_codebook(const __grid_constant__ CodebookPackArgs args) {
  unpack_codebook_body(args);
}

template <class To>
TERSOR_KERNEL(kPackThreads, 1)
dequantize_codebook(const __grid_constant__ CodebookDequantizeArgs args) {
  dequantize_codebook_body<To>(args);
}

}  // namespace

const void* pack_codebook_kernel() { return reinterpret_cast<const void*>(&pack_codebook); }

const void* unpack_codebook_kernel() { return reinterpret_cast<const void*>(&unpack_codebook); }

const void* dequantize_codebook_kernel(int32_t dtype) {
  if (dtype == TERSOR_F32) return reinterpret_cast<const void*>(&dequantize_codebook<float>);
  if (dtype == TERSOR_BF16)
    return reinterpret_cast<const void*>(&dequantize_codebook<Bits<Bfloat>>);
  return reinterpret_cast<const void*>(&dequantize_codebook<Bits<Half>>);
}

}  // namespace tersor::cuda
