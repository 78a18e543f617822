#include "pack_sparse.cuh"

#include "kernels.h"

namespace tersor::cuda {
namespace {

TERSOR_KERNEL(kPackThreads, 1) pack_sparse_weight(const __grid_constant__ PackArgs args) {
  pack_sparse_body(args);
}

TERSOR_KERNEL(kPackThreads, 1) unpack_sparse_weight(const __grid_constant__ PackArgs args) {
  unpack_sparse_body(args);
}

template <class To>
TERSOR_KERNEL(kPackThreads, 1)
dequantize_sparse_weight(const __grid_constant__ DequantizeArgs args) {
  dequantize_sparse_body<To>(args);
}

}  // namespace

const void* pack_sparse_kernel() { return reinterpret_cast<const void*>(&pack_sparse_weight); }

const void* unpack_sparse_kernel() { return reinterpret_cast<const void*>(&unpack_sparse_weight); }

const void* dequantize_sparse_kernel(int32_t dtype) {
  if (dtype == TERSOR_F32) return reinterpret_cast<const void*>(&dequantize_sparse_weight<float>);
  if (dtype == TERSOR_BF16)
    return reinterpret_cast<const void*>(&dequantize_sparse_weight<Bits<Bfloat>>);
  return reinterpret_cast<const void*>(&dequantize_sparse_weight<Bits<Half>>);
}

}  // namespace tersor::cuda
