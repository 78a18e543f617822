// Second stage of the "tile16s24" kernels. A few tokens meet the packed codes as they are, where
// the ISA has an inner product for that; for more, a chunk of columns is expanded into lines of
// "tile16" once, which then serve all tokens and the inner product of dense weights.
//
// An ISA file defines, for each width of codes,
//
//   expand<BITS>(steps, count, lines)   16 rows: `count` steps of 128 columns into dense lines
//
// and where it has one an Op (see tile16_gemm.h) whose dot reads steps.
#pragma once

#include "cpu/tile16_gemm.h"

namespace {

constexpr int64_t kExpandedTokens = 256;  // that one expansion serves, at most

// The byte of a dense word, for column j of a four with this pattern: which of its two codes, or
// 0x80 where it is zero (what pshufb takes for a zero).
constexpr uint32_t expand_entry(int pattern) {
  uint32_t word = 0;
  for (int j = 0; j < 4; ++j) {
    const uint32_t byte = j == kKeptColumns[pattern][0]   ? 0u
                          : j == kKeptColumns[pattern][1] ? 1u
                                                          : 0x80u;
    word |= byte << (8 * j);
  }
  return word;
}
static_assert(expand_entry(0) == 0x80800100u && expand_entry(5) == 0x01008080u, "");

// The same for the 16-bit values of columns 2h and 2h + 1, which are two bytes each.
constexpr uint32_t expand_values(int pattern, int h) {
  uint32_t word = 0;
  for (int j = 0; j < 2; ++j) {
    const uint32_t which = expand_entry(pattern) >> (16 * h + 8 * j) & 0xff;
    word |= (which == 0x80 ? 0x8080u : 2 * which | (2 * which + 1) << 8) << (16 * j);
  }
  return word;
}
static_assert(expand_values(0, 0) == 0x03020100u && expand_values(0, 1) == 0x80808080u &&
                  expand_values(2, 1) == 0x03028080u,
              "");

// Which of a four's activations its two codes meet, for vpermilps, which reads the two lowest bits:
// the second one is two bits further up.
constexpr uint32_t kept_lanes(int pattern) {
  return static_cast<uint32_t>(kKeptColumns[pattern][0] | kKeptColumns[pattern][1] << 2);
}
// And for pshufb, as two bytes.
constexpr uint16_t kept_bytes(int pattern) {
  return static_cast<uint16_t>(kKeptColumns[pattern][0] | kKeptColumns[pattern][1] << 8);
}

using ChunkBlock = void (*)(const Call&, int64_t, const Unit*, int64_t, const uint8_t* const*,
                            float*);

template <class Op, int MR, int NU>
void add_expanded(const Call& c, int64_t token, const Unit* units, int64_t chunk,
                  const uint8_t* const* lines, float* totals) {
  const uint8_t* w[NU];
  for (int u = 0; u < NU; ++u) w[u] = lines[u];
  auto& total = *reinterpret_cast<float (*)[MR][NU][Op::kLanes]>(totals);
  add_chunk<Op, MR, NU>(c, token, units, chunk, w, line_columns(Op::kBits), total);
}

template <class Op, int MR, int NU>
void finish_expanded(const Call& c, int64_t token, const Unit* units, int live, float* totals) {
  finish<Op, MR, NU>(c, token, units, live,
                     *reinterpret_cast<float (*)[MR][NU][Op::kLanes]>(totals));
}

using FinishBlock = void (*)(const Call&, int64_t, const Unit*, int, float*);

template <class Op, int NU, int MR>
void fill_expanded(ChunkBlock* chunks, FinishBlock* finishes) {
  chunks[MR - 1] = add_expanded<Op, MR, NU>;
  finishes[MR - 1] = finish_expanded<Op, MR, NU>;
  if constexpr (MR > 1) fill_expanded<Op, NU, MR - 1>(chunks, finishes);
}

// Op: of dense weights.
template <class Op, void (*kExpand)(const uint8_t*, int64_t, uint8_t*)>
void multiply_expanded(const tersor_args* args, int64_t begin, int64_t end) {
  constexpr int MR = Op::kMaxTokens, NU = Op::kUnits;
  constexpr int kPerTile = kTileRows / Op::kLanes;
  static_assert(NU % kPerTile == 0, "whole tiles are expanded");
  constexpr int64_t kTileBytes = max_chunk(Op::kBits) / line_columns(Op::kBits) * kLineBytes;
  const Call c(*args, sizeof(typename Op::Element), true);
  ChunkBlock chunks[MR];
  FinishBlock finishes[MR];
  fill_expanded<Op, NU, MR>(chunks, finishes);
  const int64_t first = begin / Op::kLanes, last = ceil_div(end, Op::kLanes);
  alignas(64) uint8_t lines[NU / kPerTile][kTileBytes];
  alignas(64) float totals[kExpandedTokens * NU * Op::kLanes];

  const int64_t fitting = kTokenBlockBytes / c.prepared.stride;
  const int64_t token_block = smaller(kExpandedTokens, fitting > MR ? fitting : MR);

  for (int64_t from = 0; from < c.a.m; from += token_block) {
    const int64_t tokens = smaller(token_block, c.a.m - from);
    const int64_t parts = ceil_div(tokens, MR);
    const auto size_of = [&](int64_t part) { return tokens / parts + (part < tokens % parts); };
    for (int64_t unit = first; unit < last; unit += NU) {
      Unit units[NU];
      find_units<Op>(c, unit, last, units);
      __builtin_memset(totals, 0, sizeof totals);
      for (int64_t chunk = 0; chunk < c.prepared.chunks; ++chunk) {
        const int64_t column = c.prepared.chunk_begin(c.a.spec, chunk);
        const int64_t steps = (c.prepared.chunk_end(c.a.spec, chunk) - column) / kSparseColumns;
        const uint8_t* w[NU];
        for (int u = 0; u < NU; u += kPerTile) {
          uint8_t* to = lines[u / kPerTile];
          // Units come in whole tiles but for a last one that is repeated.
          const uint8_t* tile = c.packed + units[u].row / kTileRows * c.tile.tile_bytes;
          kExpand(tile + column / kSparseColumns * c.tile.step_bytes, steps, to);
          for (int v = 0; v < kPerTile; ++v) w[u + v] = to + units[u + v].row % kTileRows * 4;
        }
        for (int64_t part = 0, token = 0; part < parts; token += size_of(part++))
          chunks[size_of(part) - 1](c, from + token, units, chunk, w,
                                    totals + token * NU * Op::kLanes);
      }
      const int live = static_cast<int>(smaller(NU, last - unit));
      for (int64_t part = 0, token = 0; part < parts; token += size_of(part++))
        finishes[size_of(part) - 1](c, from + token, units, live, totals + token * NU * Op::kLanes);
    }
  }
}

// Few: an Op that reads steps, for up to kFewest tokens; Many: one of dense weights, for more.
template <class Few, class Many, void (*kExpand)(const uint8_t*, int64_t, uint8_t*)>
void sparse_gemm(const tersor_args* args, int64_t begin, int64_t end) {
  if (args->m > Few::kFewest) return multiply_expanded<Many, kExpand>(args, begin, end);
  const Call c(*args, sizeof(typename Few::Element), true);
  multiply<Few, Few::kFewTokens, Few::kFewUnits>(c, begin, end);
}

}  // namespace
