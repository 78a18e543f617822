// A weight in portable order to CUDA order and back, and as plain floats. Every thread makes what
// it writes whole, so that nothing is written twice; the bytes that it needs lie a few cache lines
// apart.
#pragma once

#include "arguments.h"
#include "device.cuh"

namespace tersor::cuda {

// The groups of a row in portable order.
TERSOR_DEVICE int64_t portable_groups(const Shape& w) { return w.k / w.g; }

template <class Body>
TERSOR_DEVICE void each_of(int64_t count, Body body) {
  for (int64_t i = int64_t{worker()} * kPackThreads + thread(); i < count;
       i += int64_t{workers()} * kPackThreads)
    body(i);
}

// Of an element of a grid [n / 64][stored][64] in CUDA order its index in [n, groups], or -1 where
// there is only padding.
TERSOR_DEVICE int64_t portable_grid(const Shape& w, int64_t index, int64_t stored, int64_t groups) {
  const int64_t row = index / (stored * kBlock) * kBlock + index % kBlock;
  const int64_t group = index / kBlock % stored;
  return row < w.n && group < groups ? row * groups + group : -1;
}

// What stands for a zero in a symmetric grid, and where there is only padding.
TERSOR_DEVICE uint32_t midpoint(const Shape& w) { return 1u << (w.bits - 1); }

// code_of: a row and a column.
template <class Code>
TERSOR_DEVICE void pack_codes(const Shape& w, uint8_t* packed, Code code_of) {
  const int per_word = 32 / w.bits, per_block = kBlock * kBlock / per_word;
  each_of(int64_t{w.row_blocks} * w.steps * per_block, [&](int64_t i) {
    const int64_t block = i / per_block;
    const int64_t row0 = block / w.steps * kBlock, column0 = block % w.steps * kBlock;
    uint32_t word = 0;
    for (int j = 0; j < per_word; ++j) {
      const Place at = place_of(w.bits, static_cast<int>(i % per_block) * per_word + j);
      const int64_t row = row0 + at.row, column = column0 + at.column;
      const uint32_t code = row < w.n && column < w.k ? code_of(row, column) : midpoint(w);
      word |= code << (j * w.bits);
    }
    reinterpret_cast<uint32_t*>(packed)[i] = word;
  });
}

TERSOR_DEVICE void pack_grid(const PackArgs& a) {
  const Shape& w = a.w;
  const auto empty = static_cast<uint8_t>(midpoint(w));
  const int64_t stored = w.two_level ? 1 : w.groups;  // scales of a row
  each_of(w.row_blocks * stored * kBlock, [&](int64_t i) {
    const int64_t from = portable_grid(w, i, stored, w.two_level ? 1 : portable_groups(w));
    for (int byte = 0; byte < w.scale_bytes; ++byte)
      a.packed[w.scales_at + i * w.scale_bytes + byte] =
          from < 0 ? 0 : a.scales[from * w.scale_bytes + byte];
  });
  if (!has_zeros(w)) return;
  each_of(int64_t{w.row_blocks} * w.groups * kBlock, [&](int64_t i) {
    const int64_t from = portable_grid(w, i, w.groups, portable_groups(w));
    a.packed[w.zeros_at + i] = from < 0 ? empty : a.zeros[from];
  });
}

TERSOR_DEVICE void pack_body(const PackArgs& a) {
  pack_codes(a.w, a.packed,
             [&](int64_t row, int64_t column) { return a.codes[row * a.w.k + column]; });
  pack_grid(a);
}

TERSOR_DEVICE uint8_t code_at(const Shape& w, const uint8_t* packed, int64_t row, int64_t column) {
  const int64_t block =
      block_at(w, static_cast<int>(row / kBlock), static_cast<int>(column / kBlock));
  const int bit = bit_of(w.bits, static_cast<int>(row % kBlock), static_cast<int>(column % kBlock));
  return packed[block + bit / 8] >> bit % 8 & ((1 << w.bits) - 1);
}

TERSOR_DEVICE int64_t grid_of(const Shape& w, int64_t row, int64_t group) {
  return grid_at(w, static_cast<int>(row / kBlock), static_cast<int>(group),
                 static_cast<int>(row % kBlock));
}

// The index of a scale; on a two-level grid there is one for each row, and rows follow each other.
TERSOR_DEVICE int64_t scale_at(const Shape& w, int64_t row, int64_t group) {
  return w.two_level ? row : grid_of(w, row, group);
}

TERSOR_DEVICE void unpack_grid(const PackArgs& a) {
  const Shape& w = a.w;
  const int64_t groups = portable_groups(w), scales = w.two_level ? 1 : groups;  // of a row
  each_of(w.n * scales, [&](int64_t i) {
    const int64_t at = scale_at(w, i / scales, i % scales);
    for (int byte = 0; byte < w.scale_bytes; ++byte)
      a.scales[i * w.scale_bytes + byte] = a.packed[w.scales_at + at * w.scale_bytes + byte];
  });
  if (!has_zeros(w)) return;
  each_of(w.n * groups, [&](int64_t i) {
    a.zeros[i] = a.packed[w.zeros_at + grid_of(w, i / groups, i % groups)];
  });
}

TERSOR_DEVICE void unpack_body(const PackArgs& a) {
  const Shape& w = a.w;
  each_of(int64_t{w.n} * w.k,
          [&](int64_t i) { a.codes[i] = code_at(w, a.packed, i / w.k, i % w.k); });
  unpack_grid(a);
}

// The zero point at an index of the grid in CUDA order.
TERSOR_DEVICE int zero_at(const Shape& w, const uint8_t* packed, int64_t at) {
  return w.asymmetric ? packed[w.zeros_at + at] : static_cast<int>(midpoint(w));
}

template <class To>
TERSOR_DEVICE void dequantize_body(const DequantizeArgs& a) {
  const Shape& w = a.w;
  each_of((a.end - a.begin) * w.k, [&](int64_t i) {
    const int64_t row = a.begin + i / w.k, column = i % w.k;
    const int64_t group = column / w.g, at = grid_of(w, row, group);
    int code = code_at(w, a.packed, row, column) - zero_at(w, a.packed, at);
    if (w.two_level) code *= a.packed[w.zeros_at + at];
    const float scale = scale_of(a.packed + w.scales_at, a.scale_dtype, scale_at(w, row, group));
    put(static_cast<To*>(a.to) + i, static_cast<float>(code) * scale);
  });
}

}  // namespace tersor::cuda
