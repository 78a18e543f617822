// The product with a weight of indices into sixteen values: a byte of codes is looked up in a table
// of pairs of values in shared memory, and the pairs go into the tensor cores as they are.
//
// A word of codes (layout.h) has in each of its bytes two codes of one column, of rows 8 apart, and
// two bytes further those of the next column: two lookups give two pairs, once their halves have
// changed places. The table is there kCopies times, interleaved, and lane i reads copy i % kCopies:
// with 32 every lane has a bank of its own, whatever the codes are.
#pragma once

#include "arguments.h"
#include "device.cuh"
#include "products.cuh"

namespace tersor::cuda {

TERSOR_DEVICE float doubled_scale(int8_t code, float step, float mean) {
  return times(static_cast<float>(code), step) + mean;
}

// As in products.cuh; values * x in float16 or bfloat16, summed in float32.
template <class T, int kCopies_>
struct CodebookProduct {
  static constexpr int kBits = 4, kColumns = 16, kElement = 2;
  static constexpr bool kCorrects = false, kScaled = true, kWhole = false;
  static constexpr Sort kSort = Sort::codebook;
  using Args = CodebookArgs;
  using Unit = BlockUnit<kBits>;
  using Sum = float;
  using Result = T;
  struct Zero {
    TERSOR_DEVICE void set(int) {}
  };

  static constexpr int kCopies = kCopies_;
  static constexpr int kEntry = kCopies * 4;  // bytes of a pair of values in all copies

  // What a thread knows of the weight throughout.
  struct Lookup {
    const uint8_t* table;  // in shared memory
    uint32_t copy;         // the first byte of this lane's in an entry
    float mean;            // of the scales, where they are quantized themselves

    static constexpr int kBytes = kValues * kValues * kEntry;

    TERSOR_DEVICE uint32_t operator()(uint32_t entry) const {
      return *reinterpret_cast<const uint32_t*>(table + (entry | copy));
    }
  };

  // Writes the table, for all threads after the next barrier.
  static TERSOR_DEVICE Lookup begin(const CodebookArgs& a, uint8_t* table, int threads) {
    for (int i = thread() * 16; i < Lookup::kBytes; i += threads * 16) {
      const int codes = i / kEntry;
      const uint32_t first = a.codebook.values[codes % kValues];
      const uint32_t pair = first | static_cast<uint32_t>(a.codebook.values[codes / kValues]) << 16;
      const uint32_t four[4] = {pair, pair, pair, pair};
      store16(table + i, four);
    }
    const auto copy = static_cast<uint32_t>(thread() % kCopies * 4);
    return {table, copy, a.doubled ? *a.mean : 0.f};
  }

  // The pairs of one tile of 16 x 16 for a lane, as in dequantize.cuh.
  static TERSOR_DEVICE void operands(uint32_t (&a)[4], const uint32_t* words, const Zero (&)[2],
                                     const Lookup& lookup) {
    const uint32_t word = words[0];
    constexpr uint32_t kMask = 255 * kEntry;
    constexpr int kShift = kEntry == 128 ? 7 : 6;
    static_assert(kEntry == 1 << kShift, "16 or 32 copies");
    const uint32_t left = lookup(word << kShift & kMask);
    const uint32_t left_next = lookup(word >> (16 - kShift) & kMask);
    const uint32_t right = lookup(word >> (8 - kShift) & kMask);
    const uint32_t right_next = lookup(word >> (24 - kShift) & kMask);
    a[0] = pick_bytes(left, left_next, 0x5410);
    a[1] = pick_bytes(left, left_next, 0x7632);
    a[2] = pick_bytes(right, right_next, 0x5410);
    a[3] = pick_bytes(right, right_next, 0x7632);
  }

  static TERSOR_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                     uint32_t, int) {
    multiply_add<T>(c, a, b);
  }

  // The scale of a row of a stage, of the values as they are in the table. doubled: scales has the
  // steps, and codes the scales.
  static TERSOR_DEVICE float scale(const CodebookArgs& a, const Lookup& lookup,
                                   const uint8_t* scales, const uint8_t* codes, int row) {
    const float given = reinterpret_cast<const float*>(scales)[row];
    const float whole =
        a.doubled ? doubled_scale(static_cast<int8_t>(codes[row]), given, lookup.mean) : given;
    return whole * a.codebook.unit;
  }
};

}  // namespace tersor::cuda
