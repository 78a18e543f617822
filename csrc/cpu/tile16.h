// "tile16": the packed layout that all CPU kernels of this tree share.
//
// A tile is 16 output rows and all k columns. It is a run of 64-byte lines, then the scales, then
// the zero points, each part padded to 64 bytes. A line holds 16 rows times 8 columns (4 bits), 4
// columns (8 bits) or 2 columns (16 bits); one 32-bit word per row, so a vector lane is an output
// row and a dot product needs no horizontal sum:
//
//   4 bits, line l, row r, byte j:   [ code(r, 8l + 4 + j) : code(r, 8l + j) ]   high : low nibble
//   8 bits, line l, row r, byte j:   code(r, 4l + j)
//  16 bits, line l, row r, half j:   value(r, 2l + j)           no scales; lines of an expansion
//  only
//
//   tile = | line 0 | line 1 | ... | scales [groups][16] | zeros [groups][16] (asymmetric only) |
//
// Codes beyond k or n are zero and meet activations that are zero, or results that are not stored.
//
// "tile16s24" is the same for symmetric weights of which at most two in every four columns are not
// zero. In place of lines it has steps of 128 columns, which hold the two, in their order, and
// which of the six patterns they follow: 2.75 bits a weight for 4-bit codes, 4.75 for 8-bit ones,
// 8.75 for 16-bit values. A code is stored less its midpoint (two's complement), so that zero is 0.
//
//   step = | pattern line 0 | 1 | 2 | code lines ... |      unit i: 8 columns, fours 2i and 2i + 1
//
//   4 bits, code line h, row r, byte j:  [ unit 2h + 1 : unit 2h ]    high : low nibble
//   8 bits, code line i, row r, byte j:  unit i                       j: first and second code of
//                                                                     four 2i, then of four 2i + 1
//  16 bits, code line 2i + f, row r, half j:  unit i                  j: first and second value of
//                                                                     four 2i + f
//   pattern line q, row r, half f (16 bits):  | rest | unit 4q + 3 | 4q + 2 | 4q + 1 | 4q |
//       bits                                  15..12   11..9         8..6     5..3     2..0
//
//   each the pattern of four 2i + f; the rests of lines 0, 1, 2 are the low, middle and high bits
//   of what would be line 3. Patterns 0 to 5 keep columns 01, 02, 03, 12, 13, 23 of their four.
//
// Included by translation units compiled for different instruction sets: everything here has
// internal linkage, so that the linker cannot merge an AVX-512 copy into a baseline path.
#pragma once

#include <stdint.h>

#include "kernel.h"

namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kLineBytes = 64;
// A group is summed in int32 or float over at most this many columns before it is scaled: 4096
// columns of 255 * 128 stay below 2^28.
constexpr int64_t kMaxChunk = 4096;
// What a chunk is expanded into has to fit into a cache, and 16-bit values take four times as much.
constexpr int64_t kMaxValueChunk = 1024;
constexpr int64_t max_chunk(int64_t bits) { return bits == 16 ? kMaxValueChunk : kMaxChunk; }
constexpr int64_t line_columns(int64_t bits) { return 32 / bits; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kSparseColumns = 128;  // in a step
constexpr int64_t kPatternLines = 3;     // at the head of a step
// The columns of a four that each pattern keeps. There are six: what is none of them comes only
// from memory that something else has written to, and must be read within bounds.
constexpr int kKeptColumns[8][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}, {0, 1}, {0, 1}};
// From there to the line with the codes of a unit.
constexpr int64_t sparse_codes_at(int64_t bits, int64_t unit) {
  return (kPatternLines + unit * bits / 8) * kLineBytes;
}
constexpr int64_t sparse_step_bytes(int64_t bits) {
  return (kPatternLines + 2 * bits) * kLineBytes;
}

// Where things are in a packed weight of either layout. A step is a line, or 128 columns with zeros
// left out.
struct Tile16 {
  int64_t columns_per_step, step_bytes, steps, groups, scale_bytes;
  int64_t scales_at, zeros_at, tile_bytes, tiles;

  explicit Tile16(const tersor_spec& s, bool sparse = false)
      : columns_per_step(sparse ? kSparseColumns : line_columns(s.bits)),
        step_bytes(sparse ? sparse_step_bytes(s.bits) : kLineBytes),
        steps(ceil_div(s.k, columns_per_step)),
        groups(s.bits == 16 ? 0 : s.k / s.g),
        scale_bytes(s.scale_dtype == TERSOR_F32 ? 4 : 2),
        scales_at(steps * step_bytes),
        zeros_at(scales_at + round_up(groups * kTileRows * scale_bytes, kLineBytes)),
        tile_bytes(zeros_at + (s.asymmetric ? round_up(groups * kTileRows, kLineBytes) : 0)),
        tiles(ceil_div(s.n, kTileRows)) {}
};

// Where things are in the workspace: the prepared activations of m tokens, one row per token, then
// per token (int8 activations only) its scale, then its sum over each chunk of columns, which
// multiplies the zero points.
//
// A row is an odd number of cache lines long: rows at a power-of-two distance would all fall into
// the same few cache sets.
struct Prepared {
  int64_t chunk, chunks_per_group, chunks;
  int64_t stride;  // bytes from one token to the next
  int64_t scales_at, sums_at, bytes;

  // element: bytes of a prepared activation (1: int8, 2: bfloat16, 4: float32).
  Prepared(const tersor_spec& s, int64_t m, int64_t element)
      : chunk(smaller(s.g, max_chunk(s.bits))),
        chunks_per_group(ceil_div(s.g, chunk)),
        chunks(s.k / s.g * chunks_per_group),
        stride((ceil_div(s.k * element, kLineBytes) | 1) * kLineBytes),
        scales_at(m * stride),
        sums_at(scales_at + (element == 1 ? round_up(m * 4, kLineBytes) : 0)),
        bytes(sums_at + round_up(m * chunks * 4, kLineBytes)) {}

  int64_t chunk_begin(const tersor_spec& s, int64_t c) const {
    return c / chunks_per_group * s.g + c % chunks_per_group * chunk;
  }
  int64_t chunk_end(const tersor_spec& s, int64_t c) const {
    return smaller(chunk_begin(s, c) + chunk, (c / chunks_per_group + 1) * s.g);
  }
};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bf16(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }

// Round to nearest even; a NaN stays a (quiet) NaN.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t body = x & 0x7fffu;
  if (body >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (body & 0x3ffu) << 13);
  // Exponent bias 15 becomes 127 by one exact multiplication, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(body << 13) * 0x1p112f));
}

// Round to nearest even; beyond 65504 + half a step it is infinity.
inline uint16_t to_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t body = bits & 0x7fffffffu;
  if (body > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (body >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (body < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the last kept bit with float's last bit, and rounds there.
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(body) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((body - 0x38000000u + 0xfffu + (body >> 13 & 1u)) >> 13));
}

inline float load_element(const void* x, int64_t i, int32_t dtype) {
  if (dtype == TERSOR_F32) return static_cast<const float*>(x)[i];
  const uint16_t half = static_cast<const uint16_t*>(x)[i];
  return dtype == TERSOR_BF16 ? from_bf16(half) : from_f16(half);
}

inline void store_element(void* y, int64_t i, int32_t dtype, float value) {
  if (dtype == TERSOR_F32)
    static_cast<float*>(y)[i] = value;
  else
    static_cast<uint16_t*>(y)[i] = dtype == TERSOR_BF16 ? to_bf16(value) : to_f16(value);
}

}  // namespace
