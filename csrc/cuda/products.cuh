// What mma.sync multiplies: codes with 16-bit activations, or with int8 ones.
//
// A Product says in how many columns (kColumns) one operation goes, what a token's element takes
// (kElement bytes), in what (Sum) a group is summed, and of what type y is (Result). operands()
// makes the first operand of an operation out of a lane's words. Where it kCorrects, the zero point
// is not in the operands: a group's sum is less by zero * (the sum of x in that group).
#pragma once

#include "dequantize.cuh"
#include "device.cuh"

namespace tersor::cuda {

// (code - zero) * x in float16 or bfloat16, summed in float32.
template <class T, int kBits_>
struct FloatProduct {
  static constexpr int kBits = kBits_, kColumns = 16, kElement = 2;
  static constexpr bool kCorrects = false;
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
  static constexpr bool kCorrects = true;
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
    multiply_add_int8(c, a, b);
  }
};

}  // namespace tersor::cuda
