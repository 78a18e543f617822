// The CUDA kernels as the host sees them: what each serves, and a function for cudaLaunchKernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "kernel.h"

namespace tersor::cuda {

// A product with a tile of tokens.
struct Gemm {
  const char* name;
  int32_t arch;    // the first that runs it: 75, 80, ...
  int32_t dtype;   // of x and y, enum tersor_dtype
  int32_t bits;    // of the codes; 16: of values, which have the dtype of x
  int32_t tokens;  // of a tile
  int32_t blocks;  // of 64 rows in a tile
  int32_t threads;
  size_t shared;      // bytes
  size_t tile_bytes;  // of a partial sum
  Sort sort;
  bool boxed;  // takes BoxedArgs, else LinearArgs
  const void* function;
};

// Tables, one for each file of kernels; in a table those of the same bits by growing `tokens`.
std::vector<Gemm> mma_gemms_f16();
std::vector<Gemm> mma_gemms_bf16();
std::vector<Gemm> wgmma_gemms();
std::vector<Gemm> int8_gemms();
std::vector<Gemm> codebook_gemms();
std::vector<Gemm> row_gemms();
std::vector<Gemm> outlier_gemms();
std::vector<Gemm> sparse_gemms_f16();
std::vector<Gemm> sparse_gemms_bf16();

// Kernels that take PackArgs.
const void* pack_kernel();
const void* unpack_kernel();
const void* pack_sparse_kernel();
const void* unpack_sparse_kernel();
// Takes QuantizeArgs; a block of threads for each row. dtype: enum tersor_dtype of x.
const void* quantize_kernel(int32_t dtype);
// The same without outliers; of 16 bits alone.
const void* quantize_others_kernel(int32_t dtype);
// Takes OutlierArgs; a block of threads for each step of columns. dtype: of x, of 16 bits.
const void* outlier_kernel(int32_t dtype);
// Takes DequantizeArgs. dtype: enum tersor_dtype of what it writes.
const void* dequantize_kernel(int32_t dtype);
const void* dequantize_sparse_kernel(int32_t dtype);
// Takes SolveArgs; a worker for each kSolveRows rows.
const void* solve_kernel(bool grid, bool pattern);
// Takes GridArgs.
const void* search_grid_kernel();
// The same for CodebookPackArgs and CodebookDequantizeArgs.
const void* pack_codebook_kernel();
const void* unpack_codebook_kernel();
const void* dequantize_codebook_kernel(int32_t dtype);

}  // namespace tersor::cuda
