// Where everything of a weight lies in its CUDA order, and nothing else: the kernels, their host
// side and the tests of both compute with these functions.
//
// The product is computed as Y^T = W * X^T, so that a weight is the first operand of the tensor
// cores and tokens are the second: rows of W come in tiles of 64, columns in steps of 64, and a
// token tile can be as narrow as 8. A packed weight is three arrays, each beginning at 128 bytes:
//
//   codes   [n / 64][k / 64] blocks of 64 x 64 codes, 2 KiB (4 bits) or 4 KiB (8 bits), drawn below
//           (where 2:4 zeros are left out: in layout_sparse.h)
//   scales  [n / 64][groups][64] of the scale's dtype
//   zeros   [n / 64][groups][64] of uint8, only where asymmetric
//
// On a two-level grid, where the scale of a group is that of its row times a whole number from 1 to
// 15, the second and third are
//
//   scales       [n / 64][64] of the scale's dtype, as with one group
//   multipliers  [n / 64][groups][64] of uint8
//
// Rows past n and columns past k hold the zero point of a symmetric grid; rows past n have the
// scale 0, and columns past k meet activations that are zero.
//
// A block is four strips of 16 rows, one for each warp; a strip is four tiles of 16 x 16. In a tile
// every lane of a warp holds the eight codes of its operand of mma.m16n8k16 (the figure "fragment
// A" of the PTX manual; wgmma.m64nNk16 takes the same from registers), named by pairs of columns:
//
//            columns  2t, 2t+1   2t+8, 2t+9            t = lane % 4
//   row lane / 4      pair 0     pair 2
//   row lane / 4 + 8  pair 1     pair 3
//
//   4 bits: block = [strip][lane] 16 bytes: a word for each tile; in a word, nibble i is the first
//           code of pair i and nibble i + 4 the second, so that one mask of 0x000f000f gives a
//           pair.
//   8 bits: block = [strip][half][lane] 16 bytes: a half is two tiles, a tile two words with the
//           pairs in their order.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define TERSOR_BOTH __host__ __device__ __forceinline__
#else
#define TERSOR_BOTH inline
#endif

namespace tersor::cuda {

constexpr int kBlock = 64;  // rows and columns of a block
constexpr int kStrip = 16;  // rows of a warp, and columns of one tensor core operation
constexpr int kLanes = 32;
constexpr int kSection = 128;  // bytes that each array begins at

// The figures of a weight that a kernel needs, made once on the host by shape_of.
struct Shape {
  int32_t n, k, g;
  int32_t bits;        // 4 or 8; 16 for values
  int32_t sparse;      // 1 where 2:4 zeros are left out
  int32_t asymmetric;  // 0 or 1
  int32_t two_level;   // 0 or 1: of 4 bits and symmetric
  int32_t scale_bytes;
  int32_t row_blocks, steps;  // blocks of rows, and of columns
  int32_t groups;           // of a row, those that are stored: a whole number a step or the reverse
  int32_t steps_per_group;  // 1 where a step holds one group or more
  int32_t groups_per_step;  // 1 where a group holds one step or more
  int64_t scales_at, zeros_at, bytes;  // zeros: or multipliers
};

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Groups that the kernels can follow: 32, a multiple of 64, or a whole row.
constexpr bool is_group(int64_t k, int64_t g) { return g == k || g == 32 || g % kBlock == 0; }

// Bytes of a block; without 2:4 zeros a weight takes half of a code, and half of two bits that say
// where it is.
TERSOR_BOTH constexpr int block_bytes(int bits, bool sparse = false) {
  return kBlock * kBlock / 16 * (sparse ? bits + 2 : 2 * bits);
}

// scale_bytes: 0 where there are no scales. sparse: without 2:4 zeros; blocks then come in pairs.
constexpr Shape shape_of(int64_t n, int64_t k, int64_t g, int bits, bool asymmetric,
                         int scale_bytes, bool sparse = false, bool two_level = false) {
  Shape s{};
  s.n = static_cast<int32_t>(n), s.k = static_cast<int32_t>(k), s.g = static_cast<int32_t>(g);
  s.bits = bits, s.asymmetric = asymmetric, s.scale_bytes = scale_bytes, s.sparse = sparse;
  s.two_level = two_level;
  s.row_blocks = static_cast<int32_t>(round_up(n, sparse ? 2 * kBlock : kBlock) / kBlock);
  s.steps = static_cast<int32_t>(round_up(k, kBlock) / kBlock);
  const bool fine = g == 32 && k > 32;
  s.groups_per_step = fine ? 2 : 1;
  s.steps_per_group = fine ? 1 : static_cast<int32_t>(round_up(g, kBlock) / kBlock);
  s.groups = fine ? 2 * s.steps : (s.steps + s.steps_per_group - 1) / s.steps_per_group;
  const int64_t codes = int64_t{s.row_blocks} * s.steps * block_bytes(bits, sparse);
  const int64_t grid = int64_t{s.row_blocks} * s.groups * kBlock;
  s.scales_at = codes;  // a multiple of 512
  const int64_t scales = two_level ? int64_t{s.row_blocks} * kBlock : grid;
  s.zeros_at = s.scales_at + round_up(scales * scale_bytes, kSection);
  s.bytes = s.zeros_at + (asymmetric || two_level ? round_up(grid, kSection) : 0);
  return s;
}

// The first byte of a block of codes.
TERSOR_BOTH constexpr int64_t block_at(const Shape& s, int row_block, int step) {
  return (int64_t{row_block} * s.steps + step) * block_bytes(s.bits);
}

// Whether there is a byte for every row and group: its zero point, or its multiplier.
TERSOR_BOTH constexpr bool has_zeros(const Shape& s) { return s.asymmetric || s.two_level; }

// The index of a row's zero in its array, and of its scale unless there is one for each row.
TERSOR_BOTH constexpr int64_t grid_at(const Shape& s, int row_block, int group, int row_of_block) {
  return (int64_t{row_block} * s.groups + group) * kBlock + row_of_block;
}

// A code of a block: the bit that it begins at, and back.
struct Place {
  int row, column;
};

TERSOR_BOTH constexpr int bit_of(int bits, int row, int column) {
  const int strip = row / kStrip, tile = column / kStrip;
  const int r = row % kStrip, c = column % kStrip;
  const int lane = r % 8 * 4 + c % 8 / 2, pair = r / 8 + c / 8 * 2, second = c % 2;
  if (bits == 4) return ((strip * kLanes + lane) * 4 + tile) * 32 + (pair + 4 * second) * 4;
  return (((strip * 2 + tile / 2) * kLanes + lane) * 4 + tile % 2 * 2) * 32 +
         (pair * 2 + second) * 8;
}

// The place of the code `index` of a block, in the order of its bits.
TERSOR_BOTH constexpr Place place_of(int bits, int index) {
  int strip = 0, lane = 0, tile = 0, pair = 0, second = 0;
  if (bits == 4) {
    const int nibble = index % 8;
    pair = nibble % 4, second = nibble / 4;
    tile = index / 8 % 4, lane = index / 32 % kLanes, strip = index / 32 / kLanes;
  } else {
    second = index % 2, pair = index / 2 % 4;
    tile = index / 8 % 2, lane = index / 16 % kLanes;
    tile += index / 16 / kLanes % 2 * 2, strip = index / 16 / kLanes / 2;
  }
  const int r = lane / 4 + pair % 2 * 8, c = lane % 4 * 2 + pair / 2 * 8 + second;
  return {strip * kStrip + r, tile * kStrip + c};
}

}  // namespace tersor::cuda
