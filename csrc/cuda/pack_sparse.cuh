// As pack.cuh, for the order of weights without 2:4 zeros; a four at a time. Of 16-bit values the
// sign of a zero is not kept.
#pragma once

#include "layout_sparse.h"
#include "pack.cuh"

namespace tersor::cuda {

// Codes of 4 bits, or values of 16, in portable order.
TERSOR_DEVICE uint32_t element_at(const Shape& w, const uint8_t* codes, int64_t row,
                                  int64_t column) {
  const int64_t at = row * w.k + column;
  return w.bits == 16 ? reinterpret_cast<const uint16_t*>(codes)[at] : codes[at];
}

// Whether an element of this row and column, in portable order, is kept.
TERSOR_DEVICE bool is_kept(const PackArgs& a, int64_t row, int64_t column) {
  const Shape& w = a.w;
  const uint32_t element = element_at(w, a.codes, row, column);
  if (w.bits == 16) return (element & 0x7fff) != 0;
  const int64_t at = row * portable_groups(w) + column / w.g;
  return element != (w.asymmetric ? a.zeros[at] : midpoint(w));
}

// column: the first of a four.
TERSOR_DEVICE uint32_t pattern_at(const PackArgs& a, int64_t row, int64_t column) {
  if (row >= a.w.n || column >= a.w.k) return kNoPattern;
  int bits = 0;
  for (int j = 0; j < 4; ++j) bits |= is_kept(a, row, column + j) << j;
  return pattern_of(bits);
}

// What stands in the place of a code: zero for a value that is zero, so that its sign is lost.
TERSOR_DEVICE uint32_t kept_element(const PackArgs& a, int64_t row, int64_t column) {
  const Shape& w = a.w;
  if (row >= w.n || column >= w.k) return w.bits == 16 ? 0 : midpoint(w);
  const uint32_t element = element_at(w, a.codes, row, column);
  return w.bits == 16 && !(element & 0x7fff) ? 0 : element;
}

TERSOR_DEVICE void pack_sparse_body(const PackArgs& a) {
  const Shape& w = a.w;
  const int per_word = 32 / w.bits, codes = patterns_at(w.bits) / 4;
  const int per_slab = slab_bytes(w.bits) / 4;
  each_of(int64_t{w.row_blocks} / kSlabBlocks * w.steps * per_slab, [&](int64_t i) {
    const int64_t slab = i / per_slab;
    const int64_t row0 = slab / w.steps * kSlabRows, column0 = slab % w.steps * kBlock;
    const int at = static_cast<int>(i % per_slab);
    uint32_t word = 0;
    if (at < codes) {
      for (int j = 0; j < per_word; ++j) {
        const Kept kept = kept_of(w.bits, at * per_word + j);
        const int64_t row = row0 + kept.four.row, column = column0 + kept.four.index * 4;
        const int in_four = kept_column(pattern_at(a, row, column), kept.which);
        word |= kept_element(a, row, column + in_four) << (j * w.bits);
      }
    } else {
      for (int j = 0; j < 8; ++j) {
        const Four four = four_of((at - codes) * 8 + j);
        word |= pattern_at(a, row0 + four.row, column0 + four.index * 4) << (4 * j);
      }
    }
    reinterpret_cast<uint32_t*>(a.packed)[i] = word;
  });
  if (w.scale_bytes) pack_grid(a);
}

// Calls take(column, element) for the four columns from `column` on, what is left out included:
// that has the element `zero`.
template <class Take>
TERSOR_DEVICE void each_of_four(const Shape& w, const uint8_t* packed, int64_t row, int64_t column,
                                uint32_t zero, Take take) {
  const Four four{static_cast<int>(row % kSlabRows), static_cast<int>(column % kBlock / 4)};
  const uint8_t* slab =
      packed + slab_at(w, static_cast<int>(row / kSlabRows), static_cast<int>(column / kBlock));
  const int bit = pattern_bit_of(four);
  const uint32_t pattern = slab[patterns_at(w.bits) + bit / 8] >> bit % 8 & 0xf;
  for (int j = 0; j < 4; ++j) {
    uint32_t element = zero;
    for (int which = 0; which < 2; ++which)
      if (kept_column(pattern, which) == j) {
        const int at = kept_bit_of(w.bits, four, which);
        element = w.bits == 16 ? *reinterpret_cast<const uint16_t*>(slab + at / 8)
                               : slab[at / 8] >> at % 8 & 0xf;
      }
    take(column + j, element);
  }
}

// The index of a four's scale and zero in CUDA order.
TERSOR_DEVICE int64_t grid_of_four(const Shape& w, int64_t row, int64_t column) {
  return grid_of(w, row, column / w.g);
}

TERSOR_DEVICE void unpack_sparse_body(const PackArgs& a) {
  const Shape& w = a.w;
  each_of(int64_t{w.n} * w.k / 4, [&](int64_t i) {
    const int64_t row = i * 4 / w.k, column = i * 4 % w.k;
    const int zero = w.bits == 16 ? 0 : zero_at(w, a.packed, grid_of_four(w, row, column));
    each_of_four(
        w, a.packed, row, column, static_cast<uint32_t>(zero), [&](int64_t j, uint32_t element) {
          if (w.bits == 16)
            reinterpret_cast<uint16_t*>(a.codes)[row * w.k + j] = static_cast<uint16_t>(element);
          else
            a.codes[row * w.k + j] = static_cast<uint8_t>(element);
        });
  });
  if (w.scale_bytes) unpack_grid(a);
}

template <class To>
TERSOR_DEVICE void dequantize_sparse_body(const DequantizeArgs& a) {
  const Shape& w = a.w;
  each_of((a.end - a.begin) * w.k / 4, [&](int64_t i) {
    const int64_t row = a.begin + i * 4 / w.k, column = i * 4 % w.k;
    To* to = static_cast<To*>(a.to) + (row - a.begin) * w.k;
    if (w.bits == 16) {
      each_of_four(w, a.packed, row, column, 0, [&](int64_t j, uint32_t element) {
        const auto bits = static_cast<uint16_t>(element);
        put(to + j,
            a.scale_dtype == TERSOR_BF16 ? value_of(bits, Bfloat{}) : value_of(bits, Half{}));
      });
      return;
    }
    const int64_t at = grid_of_four(w, row, column);
    const int zero = zero_at(w, a.packed, at);
    const float scale = scale_of(a.packed + w.scales_at, a.scale_dtype, at);
    each_of_four(w, a.packed, row, column, static_cast<uint32_t>(zero),
                 [&](int64_t j, uint32_t element) {
                   put(to + j, static_cast<float>(static_cast<int>(element) - zero) * scale);
                 });
  });
}

}  // namespace tersor::cuda
