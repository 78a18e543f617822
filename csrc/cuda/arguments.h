// What the host hands to the kernels, by value. Pointers are to the memory of the device.
#pragma once

#include "kernel.h"
#include "layout.h"
#include "partition.h"

namespace tersor::cuda {

// y = x * dequantize(W)^T + bias.
struct LinearArgs {
  Shape w;
  int32_t scale_dtype;  // enum tersor_dtype
  const uint8_t* packed;
  const uint16_t* x;  // [m, k]; every row begins at 16 bytes
  uint16_t* y;        // [m, n]
  const float* bias;  // [n] or nullptr
  int64_t ldx, ldy;   // in elements
  int32_t m;
  int32_t token_tiles;
  Partition partition;  // of tiles [row tile][token tile]
  float* partials;      // two tiles for each worker
  int* arrived;         // one for each tile, zero before and after
};

// A matrix as the memory engine sees it (CUtensorMap of the driver). Here: [rows][columns] of 16
// bits, copied in boxes of 64 columns, 128 bytes a row; the 16 bytes c of a row stand at c ^ row %
// 8, so that eight rows of a column lie in different banks.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// The same as LinearArgs for kernels whose x comes by the memory engine.
struct BoxedArgs {
  LinearArgs linear;
  TensorMap x;  // boxes as high as a tile of tokens
};

constexpr int kPackThreads = 256;  // of the kernels that take the two below

// A weight in both orders; portable: codes [n, k], scales [n, k / g], zeros [n, k / g] or nullptr.
struct PackArgs {
  Shape w;
  uint8_t* packed;
  uint8_t* codes;
  uint8_t* scales;  // elements of w.scale_bytes
  uint8_t* zeros;
};

// (code - zero) * scale of rows [begin, end), rounded once to the dtype of `to` [end - begin, k].
struct DequantizeArgs {
  Shape w;
  int32_t scale_dtype;
  const uint8_t* packed;
  int64_t begin, end;
  void* to;
};

}  // namespace tersor::cuda
