// Where everything of a weight with 2:4 zeros lies in its CUDA order: as layout.h has it, but for
// the blocks of codes. Of every four columns that begin at a multiple of 4 (a "four"), two codes
// are kept, and a pattern of four bits says which: the column of the first in its two low bits,
// that of the second, which is greater, in the two high ones. The other two codes are the zero
// point, or in a weight of 16-bit values zero.
//
// Two blocks of rows make a slab of 128 x 64. A warp has 16 rows of the one and the same 16 rows of
// the other, and in either goes through the 64 columns in two operations, mma.sp.m16n8k32: so a
// lane has four operands of four registers, and finds them in whole 16 bytes:
//
//   slab = | kept codes: [warp][chunk][lane] 16 bytes | patterns: [warp][lane] 2 words |
//          | 4 KiB * bits / 8                         | 1 KiB: one word for each block |
//
//   4 bits: one chunk:   | op 0, block 0 | op 0, block 1 | op 1, block 0 | op 1, block 1 |
//           of a word each, whose nibbles are as in layout.h: i is the first code of pair i, and
//           i + 4 the second.
//   16 bits: four chunks in the same order, of four words each: word i is pair i.
//
// The pairs of a lane are those of the figure "Sparse MMA .m16n8k32 fragment layout for matrix A
// with .f16/.bf16 type" of the PTX manual (9.7.14.6.2.2), a pair for each four:
//
//            columns  4t to 4t+3   4t+16 to 4t+19       t = lane % 4
//   row lane / 4      pair 0       pair 2
//   row lane / 4 + 8  pair 1       pair 3
//
// and the patterns those of its figure "Sparse MMA .m16n8k32 metadata layout": of four lanes, two
// have those of an operation; the sparsity selector says which. Here operation 0 has the selector
// 0, which is t = 0 and 1, and operation 1 the selector 1, which is t = 2 and 3: no word is idle.
//
//   bits       0 .. 15             16 .. 31
//   t even     row lane / 4        row lane / 4 + 8        columns 0 to 15 of the operation
//   t odd      row lane / 4        row lane / 4 + 8        columns 16 to 31
//              a nibble for each four, in their order
#pragma once

#include "layout.h"

namespace tersor::cuda {

constexpr int kSlabBlocks = 2;  // of rows
constexpr int kSlabRows = kSlabBlocks * kBlock;
constexpr int kFours = kBlock / 4;                 // of a row in a slab
constexpr int kSlabPatterns = kSlabRows * kFours;  // of four bits
constexpr uint32_t kNoPattern = 0x4;               // that of a four where nothing is kept

TERSOR_BOTH constexpr int slab_bytes(int bits) { return kSlabBlocks * block_bytes(bits, true); }

// Where the patterns of a slab begin.
TERSOR_BOTH constexpr int patterns_at(int bits) { return 2 * kSlabPatterns * bits / 8; }

// The first byte of a slab.
TERSOR_BOTH constexpr int64_t slab_at(const Shape& s, int slab, int step) {
  return (int64_t{slab} * s.steps + step) * slab_bytes(s.bits);
}

// The column of a four that its kept code `which` (0 or 1) is in.
TERSOR_BOTH constexpr int kept_column(uint32_t pattern, int which) {
  return static_cast<int>(pattern >> 2 * which & 3);
}

// The pattern of a four of which the columns of these bits are not zero: of several that keep them
// all, the first. bits: at most two.
TERSOR_BOTH constexpr uint32_t pattern_of(int bits) {
  for (int first = 0; first < 3; ++first)
    for (int second = first + 1; second < 4; ++second)
      if (!(bits & ~(1 << first | 1 << second))) return static_cast<uint32_t>(first | second << 2);
  return kNoPattern;
}
static_assert(pattern_of(0) == kNoPattern && pattern_of(0x8) == 0xc && pattern_of(0x6) == 0x9, "");

// A four of a slab.
struct Four {
  int row, index;
};

// The bit that a kept code begins at, and the four that has the code at an index, which counts
// codes in the order of their bits.
struct Kept {
  Four four;
  int which;
};

TERSOR_BOTH constexpr int kept_bit_of(int bits, Four four, int which) {
  const int block = four.row / kBlock, warp = four.row % kBlock / kStrip, r = four.row % kStrip;
  const int operation = four.index / 8, f = four.index % 8;
  const int lane = r % 8 * 4 + f % 4, pair = r / 8 + f / 4 * 2;
  const int operand = operation * kSlabBlocks + block;
  if (bits == 4) return ((warp * kLanes + lane) * 4 + operand) * 32 + (pair + 4 * which) * 4;
  return (((warp * 4 + operand) * kLanes + lane) * 4 + pair) * 32 + which * 16;
}

TERSOR_BOTH constexpr Kept kept_of(int bits, int index) {
  int pair = 0, which = 0, operand = 0, lane = 0, warp = 0;
  if (bits == 4) {
    pair = index % 4, which = index / 4 % 2, operand = index / 8 % 4;
    lane = index / 32 % kLanes, warp = index / 32 / kLanes;
  } else {
    which = index % 2, pair = index / 2 % 4, lane = index / 8 % kLanes;
    operand = index / 8 / kLanes % 4, warp = index / 8 / kLanes / 4;
  }
  const int row = operand % 2 * kBlock + warp * kStrip + lane / 4 + pair % 2 * 8;
  return {{row, operand / 2 * 8 + lane % 4 + pair / 2 * 4}, which};
}

// The same for patterns: the bit, after patterns_at, and the four of a nibble.
TERSOR_BOTH constexpr int pattern_bit_of(Four four) {
  const int block = four.row / kBlock, warp = four.row % kBlock / kStrip, r = four.row % kStrip;
  const int lane = r % 8 * 4 + four.index / 4;
  return ((warp * kLanes + lane) * kSlabBlocks + block) * 32 + r / 8 * 16 + four.index % 4 * 4;
}

TERSOR_BOTH constexpr Four four_of(int nibble) {
  const int lane = nibble / 16 % kLanes, warp = nibble / 16 / kLanes, block = nibble / 8 % 2;
  return {block * kBlock + warp * kStrip + lane / 4 + nibble / 4 % 2 * 8,
          lane % 4 * 4 + nibble % 4};
}

}  // namespace tersor::cuda
