#include "pack.cuh"

#include "kernels.h"

namespace tersor::cuda {
namespace {

TERSOR_KERNEL(kPackThreads, 1) pack_weight(const __grid_constant__ PackArgs args) {
  pack_body(args);
}

TERSOR_KERNEL(kPackThreads, 1) unpack_weight(const __grid_constant__ PackArgs args) {
  unpack_body(args);
}

template <class To>
TERSOR_KERNEL(kPackThreads, 1)
dequantize_weight(const __grid_constant__ DequantizeArgs args) {
  dequantize_body<To>(args);
}

}  // namespace

const void* pack_kernel() { return reinterpret_cast<const void*>(&pack_weight); }

const void* unpack_kernel() { return reinterpret_cast<const void*>(&unpack_weight); }

const void* dequantize_kernel(int32_t dtype) {
  if (dtype == TERSOR_F32) return reinterpret_cast<const void*>(&dequantize_weight<float>);
  if (dtype == TERSOR_BF16) return reinterpret_cast<const void*>(&dequantize_weight<Bits<Bfloat>>);
  return reinterpret_cast<const void*>(&dequantize_weight<Bits<Half>>);
}

}  // namespace tersor::cuda
