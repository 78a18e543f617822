// What mma.sync multiplies: codes with 16-bit activations, or with int8 ones.
//
// A Product says in how many columns (kColumns) one operation goes, what a token's element takes
// (kElement bytes), in what (Sum) a group is summed, and of what type y is (Result). operands()
// makes the first operand of an operation out of a lane's words and what was set for their two
// rows: zero points, or multipliers. Where it kCorrects, the zero point is not in the operands: a
// group's sum is less by zero * (the sum of x in that group). Where it is kWhole, all of a weight
// but the one scale of its row is in them, and a sum is that of the row.
#pragma once

#include "dequantize.cuh"
#include "device.cuh"

namespace tersor::cuda {

// (code - zero) * x in float16 or bfloat16, summed in float32.
template <class T, int kBits_>
struct FloatProduct {
  static constexpr int kBits = kBits_, kColumns = 16, kElement = 2;
  static constexpr bool kCorrects = false, kWhole = false;
  using Sum = float;
  using Result = T;
  using Zero = cuda::Zero<T, kBits>;

  static TERSOR_DEVICE void operands(uint32_t (&a)[4], const uint32_t* words,
                                     const Zero (&zeros)[2]) {
    cuda::operands<T, kBits>(a, words, zeros);
  }
  static TERSOR_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
    multiply_add<T>(c, a, b);
  }
};

// code * x in int8, summed in int32. An operation takes two tiles of codes. Within a tile a lane
// has the columns 2t, 2t + 8, 2t + 1, 2t + 9 one after the other, where the fragment of
// mma.m16n8k32 has four that follow each other: any order will do, as long as x has the same
// (quantize.cuh).
template <class T, int kBits_>
struct Int8Product {
  static constexpr int kBits = kBits_, kColumns = 32, kElement = 1;
  static constexpr bool kCorrects = true, kWhole = false;
  using Sum = int32_t;
  using Result = T;
  struct Zero {
    TERSOR_DEVICE void set(int) {}
  };

  static TERSOR_DEVICE void operands(uint32_t (&a)[4], const uint32_t* words, const Zero (&)[2]) {
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
                                     const uint32_t (&b)[2]) {
    multiply_add_int8<uint8_t>(c, a, b);
  }
};

// (code - zero) * multiplier * x in int8, summed over the row in int32: for a two-level grid, and
// for one scale a row. The first three make a byte, from -8 * 15 to 7 * 15; of 8-bit codes the
// multiplier is 1.
template <class T, int kBits_>
struct RowProduct {
  static constexpr int kBits = kBits_, kColumns = 32, kElement = 1;
  static constexpr bool kCorrects = false, kWhole = true;
  using Sum = int32_t;
  using Result = T;
  struct Zero {
    uint32_t multiplier, shift;  // shift: a pair of 256 - 8 * multiplier
    TERSOR_DEVICE void set(int given) {
      multiplier = given;
      shift = (256 - 8 * given) * 0x00010001u;
    }
  };

  static TERSOR_DEVICE void operands(uint32_t (&a)[4], const uint32_t* words,
                                     const Zero (&rows)[2]) {
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
      Int8Product<T, 8>::operands(a, words, {});
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] ^= 0x80808080;  // less 128
    }
  }
  static TERSOR_DEVICE void multiply(int32_t (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
    multiply_add_int8<int8_t>(c, a, b);
  }
};

}  // namespace tersor::cuda
