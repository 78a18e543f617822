// The baseline half of the "tile16" kernels: what their tables point to beside prepare and gemm.
#pragma once

#include "kernel.h"

namespace tersor::tile16 {

size_t packed_bytes(const tersor_spec*);
void pack(const tersor_spec*, const tersor_view*, void* packed, int64_t begin, int64_t end);
void unpack(const tersor_spec*, const void* packed, const tersor_view*, int64_t begin, int64_t end);

// Of "tile16s24".
size_t sparse_packed_bytes(const tersor_spec*);
void sparse_pack(const tersor_spec*, const tersor_view*, void* packed, int64_t begin, int64_t end);
void sparse_unpack(const tersor_spec*, const void* packed, const tersor_view*, int64_t begin,
                   int64_t end);

// Single columns of a tile's 16 rows, dequantized in float32: values [count][16].
using ReadColumns = void(const tersor_spec*, const void* packed, int64_t tile,
                         const int32_t* columns, int64_t count, float* values);
ReadColumns read_columns, sparse_read_columns;

// For int8, bfloat16 and float32 prepared activations.
size_t workspace_a8(const tersor_spec*, int64_t m, int32_t dtype);
size_t workspace_bf16(const tersor_spec*, int64_t m, int32_t dtype);
size_t workspace_f32(const tersor_spec*, int64_t m, int32_t dtype);
// For bfloat16 ones, four times over for up to kPickedTokens tokens.
constexpr int64_t kPickedTokens = 8;
size_t workspace_picked(const tersor_spec*, int64_t m, int32_t dtype);

using Refuses = const char*(const tersor_spec*, int64_t m, int32_t dtype);
Refuses refuses_w4a8, refuses_w8a8, refuses_w4a16, refuses_w8a16, refuses_w4bf16, refuses_w8bf16;
Refuses sparse_refuses_w4a8, sparse_refuses_w8a8, sparse_refuses_w4a16, sparse_refuses_w8a16,
    sparse_refuses_w4bf16, sparse_refuses_w8bf16, sparse_refuses_bf16, sparse_refuses_bf16bf16,
    sparse_refuses_f16;

using Workspace = size_t(const tersor_spec*, int64_t m, int32_t dtype);
using Stage = void(const tersor_args*, int64_t begin, int64_t end);

// A kernel of these layouts; columns of y are divided at multiples of two tiles.
constexpr tersor_kernel kernel(const char* name, const char* isa, int32_t priority,
                               const char* (*unavailable)(void), Refuses* refuses,
                               Workspace* workspace, Stage* prepare, Stage* gemm) {
  return {name,         isa,  "tile16", priority,  32,      unavailable, refuses,
          packed_bytes, pack, unpack,   workspace, prepare, gemm};
}

constexpr tersor_kernel sparse_kernel(const char* name, const char* isa, int32_t priority,
                                      const char* (*unavailable)(void), Refuses* refuses,
                                      Workspace* workspace, Stage* prepare, Stage* gemm) {
  tersor_kernel made = kernel(name, isa, priority, unavailable, refuses, workspace, prepare, gemm);
  made.layout = "tile16s24";
  made.packed_bytes = sparse_packed_bytes;
  made.pack = sparse_pack;
  made.unpack = sparse_unpack;
  return made;
}

}  // namespace tersor::tile16
