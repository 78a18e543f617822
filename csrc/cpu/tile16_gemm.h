// Second stage of the "tile16" kernels: the loops around an ISA's inner product.
//
// An ISA file defines, for each kind of kernel, a struct Op:
//
//   Element, Sum, Acc, Float   prepared activation; its chunk sum; accumulator and float vectors
//   kLanes                     output rows in a vector: 16, or a part of it
//   kBits, kMaxTokens, kUnits  code width; register block: tokens times vectors of rows
//   kFewTokens, kFewUnits      another register block, for decode: fewer tokens, more rows
//   start(zeros, sum)          an accumulator that holds -zero * sum (zeros NULL: the midpoint)
//   dot<MR, NU>(acc, w, steps, a, stride)   acc[t][u] += steps of w[u] . tokens of a
//   to_float, load_scale, load, store, fma, store_y, prepare
//
// Each output is computed in the same order whatever the blocks and the threads are: chunk by chunk
// of columns, then scaled and added up in float; and whatever m is, but for sparse weights and
// bfloat16 activations, whose products a few tokens pair in another order than many.
#pragma once

#include "cpu/tile16.h"

namespace {

// Prepared activations of one block of tokens stay in a core's second-level cache while the
// weights pass by.
constexpr int64_t kTokenBlockBytes = 512 * 1024;

struct Call {
  const tersor_args& a;
  Tile16 tile;
  Prepared prepared;
  const uint8_t* packed;
  const uint8_t* work;

  Call(const tersor_args& args, int64_t element, bool sparse = false)
      : a(args),
        tile(args.spec, sparse),
        prepared(args.spec, args.m, element),
        packed(static_cast<const uint8_t*>(args.packed)),
        work(static_cast<const uint8_t*>(args.workspace)) {}
};

// A vector's worth of rows: `row` is the first.
struct Unit {
  const uint8_t *lines, *scales, *zeros;
  int64_t row;
};

// One chunk of columns: w are the steps of each unit at its first column; adds to total.
template <class Op, int MR, int NU>
inline void add_chunk(const Call& c, int64_t token, const Unit* units, int64_t chunk,
                      const uint8_t* const (&w)[NU], int64_t columns_per_step,
                      float (&total)[MR][NU][Op::kLanes]) {
  using Element = typename Op::Element;
  const tersor_spec& s = c.a.spec;
  const Prepared& p = c.prepared;
  const int64_t stride = p.stride / static_cast<int64_t>(sizeof(Element));
  const auto* a = reinterpret_cast<const Element*>(c.work) + token * stride;
  const auto* sums =
      reinterpret_cast<const typename Op::Sum*>(c.work + p.sums_at) + token * p.chunks;
  const bool with_sums = Op::kSumsAlways || s.asymmetric;
  const int64_t begin = p.chunk_begin(s, chunk), end = p.chunk_end(s, chunk);
  const int64_t group = chunk / p.chunks_per_group;
  typename Op::Acc acc[MR][NU];
#pragma GCC unroll 8
  for (int u = 0; u < NU; ++u) {
    const uint8_t* zeros = s.asymmetric ? units[u].zeros + group * kTileRows : nullptr;
#pragma GCC unroll 16
    for (int t = 0; t < MR; ++t)
      acc[t][u] = Op::start(zeros, with_sums ? sums[t * p.chunks + chunk] : 0);
  }
  Op::template dot<MR, NU>(acc, w, ceil_div(end - begin, columns_per_step), a + begin, stride);
#pragma GCC unroll 8
  for (int u = 0; u < NU; ++u) {
    const auto scale =
        Op::load_scale(units[u].scales + group * kTileRows * c.tile.scale_bytes, s.scale_dtype);
#pragma GCC unroll 16
    for (int t = 0; t < MR; ++t)
      Op::store(total[t][u], Op::fma(scale, Op::to_float(acc[t][u]), Op::load(total[t][u])));
  }
}

// Token scales and bias, and into y.
template <class Op, int MR, int NU>
inline void finish(const Call& c, int64_t token, const Unit* units, int live,
                   float (&total)[MR][NU][Op::kLanes]) {
  const tersor_spec& s = c.a.spec;
  const auto* token_scale = reinterpret_cast<const float*>(c.work + c.prepared.scales_at) + token;
  for (int u = 0; u < live; ++u) {
    const int64_t row = units[u].row;
    const int64_t rows = smaller(Op::kLanes, s.n - row);
    for (int t = 0; t < MR; ++t) {
      const float by = sizeof(typename Op::Element) == 1 ? token_scale[t] : 1.0f;
      float* y = total[t][u];
      for (int64_t r = 0; r < rows; ++r) y[r] = y[r] * by + (c.a.bias ? c.a.bias[row + r] : 0.0f);
      const int64_t at = (token + t) * c.a.ldy + row;
      if (rows == Op::kLanes)
        Op::store_y(c.a.y, at, c.a.dtype, Op::load(y));
      else
        for (int64_t r = 0; r < rows; ++r) store_element(c.a.y, at + r, c.a.dtype, y[r]);
    }
  }
}

template <class Op, int MR, int NU>
void multiply_block(const Call& c, int64_t token, const Unit* units, int live) {
  alignas(64) float total[MR][NU][Op::kLanes] = {};
  for (int64_t chunk = 0; chunk < c.prepared.chunks; ++chunk) {
    const int64_t step = c.prepared.chunk_begin(c.a.spec, chunk) / c.tile.columns_per_step;
    const uint8_t* w[NU];
#pragma GCC unroll 8
    for (int u = 0; u < NU; ++u) w[u] = units[u].lines + step * c.tile.step_bytes;
    add_chunk<Op, MR, NU>(c, token, units, chunk, w, c.tile.columns_per_step, total);
  }
  finish<Op, MR, NU>(c, token, units, live, total);
}

// The units from the first on; past the last one it is repeated and not stored, so that codes
// beyond n need no code path.
template <class Op, int NU>
inline void find_units(const Call& c, int64_t first, int64_t last, Unit (&units)[NU]) {
  constexpr int64_t kPerTile = kTileRows / Op::kLanes;
  for (int64_t u = 0; u < NU; ++u) {
    const int64_t i = smaller(first + u, last - 1);
    const uint8_t* tile = c.packed + i / kPerTile * c.tile.tile_bytes;
    const int64_t lane = i % kPerTile * Op::kLanes;
    units[u] = {tile + lane * 4, tile + c.tile.scales_at + lane * c.tile.scale_bytes,
                tile + c.tile.zeros_at + lane, i * Op::kLanes};
  }
}

using Block = void (*)(const Call&, int64_t, const Unit*, int);

// blocks[MR - 1] multiplies MR tokens.
template <class Op, int NU, int MR>
void fill_blocks(Block* blocks) {
  blocks[MR - 1] = multiply_block<Op, MR, NU>;
  if constexpr (MR > 1) fill_blocks<Op, NU, MR - 1>(blocks);
}

template <class Op, int MR, int NU>
void multiply(const Call& c, int64_t begin, int64_t end) {
  Block blocks[MR];
  fill_blocks<Op, NU, MR>(blocks);
  const int64_t first = begin / Op::kLanes, last = ceil_div(end, Op::kLanes);
  const int64_t fitting = kTokenBlockBytes / c.prepared.stride / MR * MR;
  const int64_t token_block = fitting > MR ? fitting : MR;

  for (int64_t from = 0; from < c.a.m; from += token_block) {
    const int64_t tokens = smaller(token_block, c.a.m - from);
    for (int64_t unit = first; unit < last; unit += NU) {
      Unit units[NU];
      find_units<Op>(c, unit, last, units);
      const int live = static_cast<int>(smaller(NU, last - unit));
      // Blocks of nearly equal size: 13 tokens are 7 and 6, not 12 and 1.
      const int64_t parts = ceil_div(tokens, MR);
      for (int64_t part = 0, token = from; part < parts; ++part) {
        const int64_t size = tokens / parts + (part < tokens % parts);
        blocks[size - 1](c, token, units, live);
        token += size;
      }
    }
  }
}

template <class Op>
void gemm(const tersor_args* args, int64_t begin, int64_t end) {
  const Call c(*args, sizeof(typename Op::Element));
  if (args->m <= Op::kFewTokens)
    multiply<Op, Op::kFewTokens, Op::kFewUnits>(c, begin, end);
  else
    multiply<Op, Op::kMaxTokens, Op::kUnits>(c, begin, end);
}

}  // namespace
