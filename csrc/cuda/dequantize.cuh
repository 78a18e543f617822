// Codes as the tensor cores take them: (code - zero) in float16 or bfloat16, which is exact. The
// scale waits for the sum of its group, in float32.
//
// A code becomes a float without a conversion: put into the low bits of a power of two's mantissa
// it is that power plus the code, and a subtraction leaves the difference ("magic numbers").
#pragma once

#include "device.cuh"
#include "layout.h"

namespace tersor::cuda {

// What is subtracted, for one row of a tile.
template <class T, int kBits>
struct Zero;

// The pairs of one tile of 16 x 16 for a lane: pair 0 and 2 of one row, 1 and 3 of another.
template <class T, int kBits>
TERSOR_DEVICE void operands(uint32_t (&a)[4], const uint32_t* words, const Zero<T, kBits> (&z)[2]);

template <>
struct Zero<Half, 4> {
  uint32_t low, high;  // pairs of -(1024 + zero) and -(64 + zero)
  TERSOR_DEVICE void set(float zero) {
    low = pair_of<Half>(-1024.f - zero, -1024.f - zero);
    high = pair_of<Half>(-64.f - zero, -64.f - zero);
  }
};

// The mask 0x00f0 leaves 16 times the code, 1024 + 16 c: a sixteenth of it is 64 + c.
template <>
TERSOR_DEVICE void operands<Half, 4>(uint32_t (&a)[4], const uint32_t* words,
                                     const Zero<Half, 4> (&z)[2]) {
  constexpr uint32_t kLow = 0x000f000f, kHigh = 0x00f000f0, k1024 = 0x64006400;
  constexpr uint32_t kOne = 0x3c003c00, kSixteenth = 0x2c002c00;
  const uint32_t word = words[0], upper = word >> 8;
  a[0] = fma_pair<Half>((word & kLow) | k1024, kOne, z[0].low);
  a[1] = fma_pair<Half>((word & kHigh) | k1024, kSixteenth, z[1].high);
  a[2] = fma_pair<Half>((upper & kLow) | k1024, kOne, z[0].low);
  a[3] = fma_pair<Half>((upper & kHigh) | k1024, kSixteenth, z[1].high);
}

template <>
struct Zero<Bfloat, 4> {
  uint32_t low;  // a pair of -(128 + zero)
  TERSOR_DEVICE void set(float zero) { low = pair_of<Bfloat>(-128.f - zero, -128.f - zero); }
};

// bfloat16 has room for one nibble only, below 128.
template <>
TERSOR_DEVICE void operands<Bfloat, 4>(uint32_t (&a)[4], const uint32_t* words,
                                       const Zero<Bfloat, 4> (&z)[2]) {
  constexpr uint32_t kLow = 0x000f000f, k128 = 0x43004300, kOne = 0x3f803f80;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair)
    a[pair] = fma_pair<Bfloat>((words[0] >> 4 * pair & kLow) | k128, kOne, z[pair % 2].low);
}

template <>
struct Zero<Half, 8> {
  uint32_t low;  // a pair of -(1024 + zero)
  TERSOR_DEVICE void set(float zero) { low = pair_of<Half>(-1024.f - zero, -1024.f - zero); }
};

template <>
TERSOR_DEVICE void operands<Half, 8>(uint32_t (&a)[4], const uint32_t* words,
                                     const Zero<Half, 8> (&z)[2]) {
  constexpr uint32_t k1024 = 0x64646464, kOne = 0x3c003c00;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair)
    a[pair] = fma_pair<Half>(pick_bytes(words[pair / 2], k1024, pair % 2 ? 0x4342 : 0x4140), kOne,
                             z[pair % 2].low);
}

template <>
struct Zero<Bfloat, 8> {
  float low;  // 2^23 + zero
  TERSOR_DEVICE void set(float zero) { low = 8388608.f + zero; }
};

// A byte needs all of bfloat16's eight digits, so the sum is one of float32.
template <>
TERSOR_DEVICE void operands<Bfloat, 8>(uint32_t (&a)[4], const uint32_t* words,
                                       const Zero<Bfloat, 8> (&z)[2]) {
  constexpr uint32_t k2To23 = 0x4b000000;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const uint32_t word = words[pair / 2], from = pair % 2 ? 2 : 0;
    const float zero = z[pair % 2].low;
    a[pair] = pair_of<Bfloat>(float_of_bits(pick_bytes(word, k2To23, 0x7650 + from)) - zero,
                              float_of_bits(pick_bytes(word, k2To23, 0x7651 + from)) - zero);
  }
}

}  // namespace tersor::cuda
