// The baseline half of the "tile16" kernels: what their tables point to beside prepare and gemm.
#pragma once

#include "kernel.h"

namespace tersor::tile16 {

size_t packed_bytes(const tersor_spec*);
void pack(const tersor_spec*, const tersor_view*, void* packed, int64_t begin, int64_t end);
void unpack(const tersor_spec*, const void* packed, const tersor_view*, int64_t begin, int64_t end);

// For int8, bfloat16 and float32 prepared activations.
size_t workspace_a8(const tersor_spec*, int64_t m, int32_t dtype);
size_t workspace_bf16(const tersor_spec*, int64_t m, int32_t dtype);
size_t workspace_f32(const tersor_spec*, int64_t m, int32_t dtype);

const char* refuses_w4a8(const tersor_spec*, int64_t m, int32_t dtype);
const char* refuses_w8a8(const tersor_spec*, int64_t m, int32_t dtype);
const char* refuses_w4a16(const tersor_spec*, int64_t m, int32_t dtype);
const char* refuses_w8a16(const tersor_spec*, int64_t m, int32_t dtype);
const char* refuses_w4bf16(const tersor_spec*, int64_t m, int32_t dtype);
const char* refuses_w8bf16(const tersor_spec*, int64_t m, int32_t dtype);

// A kernel of this layout; columns of y are divided at multiples of two tiles.
constexpr tersor_kernel kernel(const char* name, const char* isa, int32_t priority,
                               const char* (*unavailable)(void),
                               const char* (*refuses)(const tersor_spec*, int64_t, int32_t),
                               size_t (*workspace)(const tersor_spec*, int64_t, int32_t),
                               void (*prepare)(const tersor_args*, int64_t, int64_t),
                               void (*gemm)(const tersor_args*, int64_t, int64_t)) {
  return {name,         isa,  "tile16", priority,  32,      unavailable, refuses,
          packed_bytes, pack, unpack,   workspace, prepare, gemm};
}

}  // namespace tersor::tile16
