// What mma.sync multiplies: codes with 16-bit activations, or with int8 ones; and without 2:4
// zeros codes or 16-bit values with 16-bit activations.
//
// A Product says in how many columns (kColumns) one operation goes, what a token's element takes
// (kElement bytes), in what (Sum) a group is summed, and of what type y is (Result). operands()
// makes the first operand of an operation out of a lane's words and what was set for their two
// rows: zero points, or multipliers. Where it kCorrects, the zero point is not in the operands: a
// group's sum is less by zero * (the sum of x in that group). Where it is not kScaled, no scale
// meets the sum of a group: there is none, or (kWhole) one for each row, which meets its sum, and
// all else of the weight is in the operands.
//
// Its Unit is what lies together of a step: kBlocks blocks of 64 rows in kBytes, of which a lane
// has kWords words for every four bits of a code. patterns() gives what a lane knows of the columns
// that are left out, a word for each block. Args are what the kernel takes, and Lookup what a
// thread knows of a table of values, with the kBytes of that in shared memory.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "dequantize.cuh"
#include "device.cuh"
#include "layout_sparse.h"
#include "mma_sparse.cuh"

namespace tersor::cuda {

template <int kBits>
struct BlockUnit {
  static constexpr bool kSparse = false;
  static constexpr int kBlocks = 1, kBytes = block_bytes(kBits), kWords = 4;
  static TERSOR_DEVICE int64_t at(const Shape& w, int unit, int step) {
    return block_at(w, unit, step);
  }
  static TERSOR_DEVICE void patterns(uint32_t (&)[1], const uint8_t*, int) {}
};

template <int kBits>
struct SlabUnit {
  static constexpr bool kSparse = true;
  static constexpr int kBlocks = kSlabBlocks, kBytes = slab_bytes(kBits), kWords = 2;
  static TERSOR_DEVICE int64_t at(const Shape& w, int unit, int step) {
    return slab_at(w, unit, step);
  }
  static TERSOR_DEVICE void patterns(uint32_t (&to)[kSlabBlocks], const uint8_t* slab, int thread) {
    load8(to, slab + patterns_at(kBits) + thread * 8);
  }
};

struct NoLookup {
  static constexpr int kBytes = 0;
};

// (code - zero) * x in float16 or bfloat16, summed in float32.
template <class T, int kBits_>
struct FloatProduct {
  static constexpr int kBits = kBits_, kColumns = 16, kElement = 2;
  static constexpr bool kCorrects = false, kScaled = true, kWhole = false;
  static constexpr Sort kSort = Sort::plain;
  using Args = LinearArgs;
  using Lookup = NoLookup;
  using Unit = BlockUnit<kBits>;
  using Sum = float;
  using Result = T;
  using Zero = cuda::Zero<T, kBits>;

  static TERSOR_DEVICE void operands(uint32_t (&a)[4], const uint32_t* words,
                                     const Zero (&zeros)[2], const Lookup&) {
    cuda::operands<T, kBits>(a, words, zeros);
  }
  static TERSOR_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                     uint32_t, int) {
    multiply_add<T>(c, a, b);
  }
};

// The same without 2:4 zeros, of codes (4 bits) or of values of T (16 bits).
template <class T, int kBits_>
struct SparseProduct {
  static constexpr int kBits = kBits_, kColumns = 32, kElement = 2;
  static constexpr bool kCorrects = false, kScaled = kBits != 16, kWhole = false;
  static constexpr Sort kSort = Sort::sparse;
  using Args = LinearArgs;
  using Lookup = NoLookup;
  using Unit = SlabUnit<kBits>;
  using Sum = float;
  using Result = T;
  struct NoZero {
    TERSOR_DEVICE void set(int) {}
  };
  using Zero = std::conditional_t<kScaled, cuda::Zero<T, kBits>, NoZero>;

  static TERSOR_DEVICE void operands(uint32_t (&a)[4], const uint32_t* words,
                                     const Zero (&zeros)[2], const Lookup&) {
    if constexpr (kScaled)
      cuda::operands<T, kBits>(a, words, zeros);
    else
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = words[i];
  }
  // operation: of the two of a step.
  static TERSOR_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                     uint32_t patterns, int operation) {
    if (operation == 0)
      multiply_add_sparse<T, 0>(c, a, b, patterns);
    else
      multiply_add_sparse<T, 1>(c, a, b, patterns);
  }
};

// code * x in int8, summed in int32. An operation takes two tiles of codes. Within a tile a lane
// has the columns 2t, 2t + 8, 2t + 1, 2t + 9 one after the other, where the fragment of
// mma.m16n8k32 has four that follow each other: any order will do, as long as x has the same
// (quantize.cuh).
template <class T, int kBits_>
struct Int8Product {
  static constexpr int kBits = kBits_, kColumns = 32, kElement = 1;
  static constexpr bool kCorrects = true, kScaled = true, kWhole = false;
  static constexpr Sort kSort = Sort::int8;
  using Args = LinearArgs;
  using Lookup = NoLookup;
  using Unit = BlockUnit<kBits>;
  using Sum = int32_t;
  using Result = T;
  struct Zero {
    TERSOR_DEVICE void set(int) {}
  };

  static TERSOR_DEVICE void operands(uint32_t (&a)[4], const uint32_t* words, const Zero (&)[2],
                                     const Lookup&) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if constexpr (kBits == 4) {
        a[2 * tile] = words[tile] & 0x0f0f0f0f;  // nibbles 0, 2, 4, 6: pairs 0 and 2
        a[2 * tile + 1] = words[tile] >> 4 & 0x0f0f0f0f;
      } else {
        a[2 * tile] = pick_bytes(words[2 * tile], words[2 * tile + 1], 0x5140);
        a[2 * tile + 1] = pick_bytes(words[2 * tile], words[2 * tile + 1], 0x7362);
      }
    }
  }
  static TERSOR_DEVICE void multiply(int32_t (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2], uint32_t, int) {
    multiply_add_int8<uint8_t>(c, a, b);
  }
};

// (code - zero) * multiplier * x in int8, summed over the row in int32: for a two-level grid, and
// for one scale a row. The first three make a byte, from -8 * 15 to 7 * 15; of 8-bit codes the
// multiplier is 1.
template <class T, int kBits_>
struct RowProduct {
  static constexpr int kBits = kBits_, kColumns = 32, kElement = 1;
  static constexpr bool kCorrects = false, kScaled = false, kWhole = true;
  static constexpr Sort kSort = Sort::rows;
  using Args = LinearArgs;
  using Lookup = NoLookup;
  using Unit = BlockUnit<kBits>;
  using Sum = int32_t;
  using Result = T;
  struct Zero {
    uint32_t multiplier, shift;  // shift: a pair of 256 - 8 * multiplier
    TERSOR_DEVICE void set(int given) {
      multiplier = given;
      shift = (256 - 8 * given) * 0x00010001u;
    }
  };

  static TERSOR_DEVICE void operands(uint32_t (&a)[4], const uint32_t* words, const Zero (&rows)[2],
                                     const Lookup&) {
    if constexpr (kBits == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = words[i / 2] >> 4 * (i % 2);
        const Zero& row = rows[i % 2];
        // Two codes to a word, so that products have 16 bits; 256 more, and none is below zero.
        const uint32_t even = (word & 0x000f000f) * row.multiplier + row.shift;
        const uint32_t odd = (word >> 8 & 0x000f000f) * row.multiplier + row.shift;
        a[i] = pick_bytes(even, odd, 0x6240);
      }
    } else {
      Int8Product<T, 8>::operands(a, words, {}, {});
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] ^= 0x80808080;  // less 128
    }
  }
  static TERSOR_DEVICE void multiply(int32_t (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2], uint32_t, int) {
    multiply_add_int8<int8_t>(c, a, b);
  }
};

}  // namespace tersor::cuda
