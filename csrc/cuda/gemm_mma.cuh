// y = x * W^T for a few tokens to some hundreds, on mma.sync: every architecture since sm_75.
//
// A worker (a block of four warps) goes through its stretch of the partition, a step of 64 columns
// at a time; copies of the next steps are under way in a ring of stages, across the borders of
// tiles. Each warp has its own 16 rows of each block of W, which no other warp reads, and all
// tokens of the tile. What is multiplied, and how, is a Product (products.cuh). The scale meets the
// sum of its group in float32, so that a weight is never rounded to 16 bits. Where a Product is of
// whole rows, sums are exact to the end of the tile, and the scale of the row meets them there.
//
// Of shared memory a stage is
//
//   codes   of kBlocks blocks, as they are in memory
//   x       [kTokens][64] elements; their 16 bytes stand in another order for every token, so that
//           the eight rows of a matrix that ldmatrix reads lie in different banks
//   scales  [kBlocks][groups][64] as in memory, room for two groups of float32
//   zeros   [kBlocks][groups][64], or multipliers; each for products that have it
//   x sums  [groups][kTokens] int32, for products that need them
//   exact   [kTokens][64] of 16 bits, in the order of x, where some columns stay in 16 bits
//
// A weight of indices into sixteen values (codebook.h) has no zeros: where its scales are int8,
// they are in their place, and the float32 step of each in that of the scales. With kOutliers
// (outliers.cuh) the same codes meet, in the steps that hold such columns, these columns in 16 bits
// too, in a second set of sums.
#pragma once

#include "arguments.h"
#include "codebook.cuh"
#include "device.cuh"
#include "epilogue.cuh"
#include "products.cuh"

namespace tersor::cuda {

// Stages of the ring: more where they are small.
constexpr int stages_of(int tokens, int bits, int unit_blocks, bool outliers) {
  if (outliers) return tokens <= 16 ? 4 : 3;
  if (tokens <= 16) return bits == 16 ? 4 : 6;
  return bits == 4 && tokens * unit_blocks <= 64 ? 4 : 3;
}

template <class Product, int kTokens_, int kBlocks_, bool kOutliers = false>
struct MmaGemm {
  static constexpr int kBits = Product::kBits, kTokens = kTokens_, kBlocks = kBlocks_;
  static constexpr int kWarps = 4, kThreads = kWarps * kLanes;
  static constexpr int kTokenTiles = kTokens / 8;  // of one tensor core operation
  using Args = typename Product::Args;
  using Result = typename Product::Result;
  using Lookup = typename Product::Lookup;
  using Unit = typename Product::Unit;  // blocks that lie together
  static constexpr int kUnits = kBlocks / Unit::kBlocks;
  static_assert(kBlocks % Unit::kBlocks == 0, "whole units");
  using Sum = std::conditional_t<Product::kWhole, typename Product::Sum, float>;
  using End = Epilogue<Result, kBlocks, kTokenTiles, kThreads, Sum, kOutliers ? 2 : 1>;
  using Sums = typename End::Sums;
  template <class P>
  using Group = typename P::Sum[kBlocks][kTokenTiles][4];
  using Exact = FloatProduct<Result, kOutliers ? kBits : 4>;
  static constexpr int kTile = End::kTile;
  static constexpr int kStages = stages_of(kTokens, kBits, Unit::kBlocks, kOutliers);
  static constexpr int kPerBlock = kTokens <= 16 ? 4 : 2;  // workers that a multiprocessor holds

  static constexpr int kRow = kBlock * Product::kElement;  // bytes of a token in a stage
  static constexpr int kCodes = 0;
  static constexpr int kX = kCodes + kUnits * Unit::kBytes;
  static constexpr int kScales = kX + kTokens * kRow;
  static constexpr int kZeros = kScales + (Product::kScaled ? kBlocks * 2 * kBlock * 4 : 0);
  static constexpr bool kBytes = Product::kScaled || Product::kWhole;  // zeros, or multipliers
  static constexpr int kXSums = kZeros + (kBytes ? kBlocks * 2 * kBlock : 0);
  static constexpr int kExact = kXSums + (Product::kCorrects ? 2 * kTokens * 4 : 0);
  static constexpr int kStage = kExact + (kOutliers ? kTokens * kBlock * 2 : 0);
  static constexpr int kTurn = kStages * kStage;  // of this worker, where it shares a tile
  static constexpr int kMarks = kTurn + 16;       // see look_at
  static constexpr int kTable = kTurn + 128;      // of values, where there is a codebook
  static_assert(!Lookup::kBytes || kTable % 128 == 0, "entries begin at the first bank");
  static constexpr int kSharedBytes = Lookup::kBytes  ? kTable + Lookup::kBytes
                                      : Unit::kSparse ? kMarks + 2 * kTokens * 4
                                                      : kMarks;

  // Where the 16 bytes c of a token stand: eight rows of 128 bytes, or of 64, in different banks.
  template <class P = Product>
  static TERSOR_DEVICE int x_at(int token, int c) {
    constexpr int kBytes = kBlock * P::kElement;
    const int turn = kBytes == 128 ? token % 8 : token / 2 % 4;
    return token * kBytes + (c ^ turn) * 16;
  }

  // --- one step: what is copied, and what is done with it ------------------------------------

  static TERSOR_DEVICE void fetch(const Args& a, uint8_t* stage, int at) {
    const int tile = at / a.w.steps, step = at % a.w.steps;
    const int row_tile = tile / a.token_tiles, first_token = tile % a.token_tiles * kTokens;
    const int group = step / a.w.steps_per_group * a.w.groups_per_step;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = row_tile * kUnits + u;
      const bool inside = unit * Unit::kBlocks < a.w.row_blocks;
      const uint8_t* codes = a.packed + Unit::at(a.w, inside ? unit : 0, step);
#pragma unroll
      for (int i = 0; i < (Unit::kBytes / 16 + kThreads - 1) / kThreads; ++i) {
        const int at16 = (i * kThreads + thread()) * 16;
        if (at16 < Unit::kBytes)
          copy_async(stage + kCodes + u * Unit::kBytes + at16, codes + at16, inside);
      }
    }
    if constexpr (kBytes) fetch_grid(a, stage, row_tile, group);
    constexpr int kChunks = kRow / 16, kPerChunk = 16 / Product::kElement;
    const auto* x = reinterpret_cast<const uint8_t*>(a.x);
#pragma unroll
    for (int i = 0; i < (kTokens * kChunks + kThreads - 1) / kThreads; ++i) {
      const int chunk = i * kThreads + thread(), row = chunk / kChunks, c = chunk % kChunks;
      const int token = first_token + row, column = step * kBlock + c * kPerChunk;
      if (row >= kTokens) break;
      const bool inside = token < a.m && column < a.w.k;
      copy_async(stage + kX + x_at(row, c),
                 x + (inside ? (token * a.ldx + column) * Product::kElement : 0), inside);
    }
    if constexpr (Product::kCorrects) {
      constexpr int kPerGroup = kTokens * 4 / 16;
      if (thread() < a.w.groups_per_step * kPerGroup) {
        const int64_t row = (group + thread() / kPerGroup) * a.x_rows;
        copy_async(stage + kXSums + thread() * 16,
                   a.x_sums + row + first_token + thread() % kPerGroup * 4);
      }
    }
    if constexpr (kOutliers) {
      const uint64_t columns = a.outliers[step];
      if (columns) fetch_exact(a, stage, first_token, step, columns);
    }
  }

  static TERSOR_DEVICE void fetch_grid(const Args& a, uint8_t* stage, int row_tile, int group) {
    const int scale_chunks =
        Product::kScaled ? a.w.groups_per_step * kBlock * a.w.scale_bytes / 16 : 0;
    const int zero_chunks = has_zeros(a.w) ? a.w.groups_per_step * kBlock / 16 : 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int row_block = row_tile * kBlocks + b;
      const bool inside = row_block < a.w.row_blocks;
      // An address that may be read, if only for zeros.
      const int64_t grid = grid_at(a.w, inside ? row_block : 0, group, 0);
      uint8_t* scales = stage + kScales + b * 2 * kBlock * 4;
      if constexpr (Lookup::kBytes)
        if (a.doubled) {
          fetch_steps(a, scales, row_block, group);
          scales = stage + kZeros + b * 2 * kBlock;
        }
      if (thread() < scale_chunks)
        copy_async(scales + thread() * 16,
                   a.packed + a.w.scales_at + grid * a.w.scale_bytes + thread() * 16, inside);
      const int chunk = thread() - kThreads / 2;
      if (chunk >= 0 && chunk < zero_chunks)
        copy_async(stage + kZeros + b * 2 * kBlock + chunk * 16,
                   a.packed + a.w.zeros_at + grid + chunk * 16, inside);
    }
  }

  // Of a codebook the step of each scale of a block of rows. A row that is only padding has none,
  // and a group that is has some.
  static TERSOR_DEVICE void fetch_steps(const Args& a, uint8_t* to, int row_block, int group) {
    if (thread() >= a.w.groups_per_step * kBlock) return;
    const int row = row_block * kBlock + thread() % kBlock, each = group + thread() / kBlock;
    const bool inside = row < a.w.n;
    const int last = a.row_groups - 1;
    const int step = inside ? scale_step_of(row, a.row_groups, each < last ? each : last) : 0;
    copy_async4(to + thread() * 4, a.scale_steps + step, inside);
  }

  // Of the step's columns in 16 bits those 16 bytes that hold an outlier: what stands in the place
  // of the others is never used.
  static TERSOR_DEVICE void fetch_exact(const Args& a, uint8_t* stage, int first_token, int step,
                                        uint64_t columns) {
    constexpr int kChunks = kBlock * 2 / 16;
    const auto* x = static_cast<const uint8_t*>(a.exact);
#pragma unroll
    for (int i = 0; i < (kTokens * kChunks + kThreads - 1) / kThreads; ++i) {
      const int chunk = i * kThreads + thread(), row = chunk / kChunks, c = chunk % kChunks;
      if (row >= kTokens) break;
      if (!(columns >> 8 * c & 0xff)) continue;
      const int64_t token = first_token + row;
      const bool inside = token < a.m;
      copy_async(stage + kExact + x_at<Exact>(row, c),
                 x + (inside ? (token * a.ld_exact + step * kBlock + c * 8) * 2 : 0), inside);
    }
  }

  // The second operands of the tensor cores for the columns of operation `q`, which are kPieces
  // times 32 bytes of every token. ldmatrix gives four 8 x 8 matrices: those of 16 tokens and 32
  // bytes; or of the only 8 tokens and 64.
  template <class P>
  static constexpr int kPieces = P::kColumns * P::kElement / 32;
  template <class P>
  using Tokens = uint32_t[kTokenTiles][2 * kPieces<P>];

  template <class P>
  static TERSOR_DEVICE void activations(Tokens<P>& b, const uint8_t* x, int q) {
    constexpr int kEach = kPieces<P>;
    const int lane = thread() % kLanes, matrix = lane / 8, row = lane % 8;
    uint32_t four[4];
    if constexpr (kTokenTiles == 1) {
      load_matrices(four, x + x_at<P>(row, q * kEach / 2 * 4 + matrix));
#pragma unroll
      for (int i = 0; i < 2 * kEach; ++i) b[0][i] = four[q * kEach % 2 * 2 + i];
    } else {
#pragma unroll
      for (int i = 0; i < kTokenTiles / 2 * kEach; ++i) {
        const int j = i / kEach, piece = i % kEach;
        load_matrices(
            four, x + x_at<P>(j * 16 + matrix / 2 * 8 + row, (q * kEach + piece) * 2 + matrix % 2));
        b[2 * j][2 * piece] = four[0], b[2 * j][2 * piece + 1] = four[1];
        b[2 * j + 1][2 * piece] = four[2], b[2 * j + 1][2 * piece + 1] = four[3];
      }
    }
  }

  // Leaves of an operation with 16-bit columns those alone that have a bit in `columns`.
  static TERSOR_DEVICE void keep(Tokens<Exact>& b, uint64_t columns, int q) {
    const int first = q * Exact::kColumns + thread() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto two = static_cast<uint32_t>(columns >> (first + 8 * i));
      const uint32_t mask = (two & 1 ? 0xffffu : 0) | (two & 2 ? 0xffff0000u : 0);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) b[j][i] &= mask;
    }
  }

  // Where columns are left out, the sums may miss an activation there that is not finite: so all
  // that a step has are looked at, and their tokens marked; at the end of a tile (spread) every sum
  // of such a token becomes NaN. Two tiles have marks of their own, so that those of the one can
  // be cleared while the other's are read.
  static TERSOR_DEVICE void look_at(const uint8_t* x, int* marks) {
#pragma unroll
    for (int i = 0; i < (kTokens * kRow / 16 + kThreads - 1) / kThreads; ++i) {
      const int at16 = (i * kThreads + thread()) * 16;
      if (at16 >= kTokens * kRow) break;
      uint32_t words[4], sum = 0;
      load16(words, x + at16);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum = fma_pair<Result>(words[j], 0, sum);
      if (sum & 0x7fff7fff) marks[at16 / kRow] = 1;
    }
  }
  static TERSOR_DEVICE void spread(const int* marks, int* others, Sums& sums) {
    sync_block();
    const int token = thread() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (marks[j * 8 + token + i % 2])
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) sums[b][j][i] = float_of_bits(0x7fc00000);
    if (thread() < kTokens) others[thread()] = 0;
  }

  // sums += scale * group, group = 0. index: of the group within the step; kSet: of the sums. Of a
  // group that workers share, the one that has its end corrects for the zero points of the whole.
  template <class P, int kSet>
  static TERSOR_DEVICE void fold(const Args& a, const uint8_t* stage, const Lookup& lookup,
                                 int index, bool has_end, Sums& sums, Group<P>& group) {
    const int warp = thread() / kLanes, lane = thread() % kLanes;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint8_t* scales = stage + kScales + b * 2 * kBlock * 4;
      const int row = index * kBlock + warp * kStrip + lane / 4;
      float upper, lower;
      if constexpr (Lookup::kBytes) {
        const uint8_t* codes = stage + kZeros + b * 2 * kBlock;
        upper = Product::scale(a, lookup, scales, codes, row);
        lower = Product::scale(a, lookup, scales, codes, row + 8);
      } else {
        upper = scale_of(scales, a.scale_dtype, row);
        lower = scale_of(scales, a.scale_dtype, row + 8);
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (P::kCorrects) {
            const int* x_sums = reinterpret_cast<const int*>(stage + kXSums) + index * kTokens;
            if (has_end)
              group[b][j][i] -=
                  zero_of(a, stage, b, row + i / 2 * 8) * x_sums[j * 8 + lane % 4 * 2 + i % 2];
          }
          sums[kSet * kBlocks + b][j][i] +=
              (i < 2 ? upper : lower) * static_cast<float>(group[b][j][i]);
          group[b][j][i] = 0;
        }
    }
  }

  // The zero point, or the multiplier; row: of the scales and zeros in a stage.
  static TERSOR_DEVICE int zero_of(const Args& a, const uint8_t* stage, int b, int row) {
    constexpr int kNone = Product::kWhole ? 1 : 1 << (kBits - 1);
    return has_zeros(a.w) ? stage[kZeros + b * 2 * kBlock + row] : kNone;
  }

  // What a step is of a group, and of x.
  struct Part {
    const uint8_t* x;  // of P in the stage
    bool ends_group;   // a group, or what this worker has of it, ends with this step
    bool has_end;      // and it ends there for all workers
    uint64_t columns;  // with kSet 1, those that count
  };

  // group: the sums themselves, where there are no scales.
  template <class P, int kSet, class Group>
  static TERSOR_DEVICE void step(const Args& a, const uint8_t* stage, const Lookup& lookup,
                                 const Part& part, Sums& sums, Group& group) {
    const int warp = thread() / kLanes, lane = thread() % kLanes;
    constexpr int kOperations = kBlock / P::kColumns, kHalf = kOperations / 2;
    constexpr int kWords = kBits / 4 * Unit::kWords / kOperations;  // of a lane in an operand
    constexpr int kChunks = kOperations * Unit::kBlocks * kWords / 4;
    uint32_t words[kUnits][4];  // 16 bytes at a time
    uint32_t patterns[kUnits][Unit::kBlocks] = {};
    typename P::Zero zeros[kBlocks][2];
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      Unit::patterns(patterns[u], stage + kCodes + u * Unit::kBytes, thread());
#pragma unroll
    for (int q = 0; q < kOperations; ++q) {
      const int index = a.w.groups_per_step == 2 ? q / kHalf : 0;
      if (q % kHalf == 0)
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int lower = 0; lower < 2; ++lower) {
            const int row = index * kBlock + warp * kStrip + lane / 4 + lower * 8;
            zeros[b][lower].set(zero_of(a, stage, b, row));
          }
      Tokens<P> tokens;
      activations<P>(tokens, part.x, q);
      if constexpr (kSet == 1) keep(tokens, part.columns, q);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const int u = b / Unit::kBlocks, at = (q * Unit::kBlocks + b % Unit::kBlocks) * kWords;
        if (at % 4 == 0) {
          const int chunk = (warp * kChunks + at / 4) * kLanes + lane;
          load16(words[u], stage + kCodes + u * Unit::kBytes + chunk * 16);
        }
        uint32_t codes[4];
        P::operands(codes, words[u] + at % 4, zeros[b], lookup);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j)
          P::multiply(group[b][j], codes, tokens[j], patterns[u][b % Unit::kBlocks], q);
      }
      if constexpr (P::kScaled)
        if (q + 1 == kHalf && a.w.groups_per_step == 2)
          fold<P, kSet>(a, stage, lookup, 0, true, sums, group);
    }
    if constexpr (P::kScaled)
      if (part.ends_group)
        fold<P, kSet>(a, stage, lookup, a.w.groups_per_step - 1, part.has_end, sums, group);
  }

  // --- a worker ------------------------------------------------------------------------------

  static TERSOR_DEVICE void run(const Args& a) {
    uint8_t* shared = shared_memory();
    Lookup lookup{};
    if constexpr (Lookup::kBytes) lookup = Product::begin(a, shared + kTable, kThreads);
    const Partition& p = a.partition;
    const int begin = p.begin(worker()), end = p.begin(worker() + 1);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (begin + i < end) fetch(a, shared + i * kStage, begin + i);
      commit_copies();
    }
    Sums sums{};
    Group<Product> group{};
    int* marks = reinterpret_cast<int*>(shared + kMarks);
    if constexpr (Unit::kSparse)
      if (thread() < 2 * kTokens) marks[thread()] = 0;
    int tile_begin = begin;  // of this worker's part of the tile at hand
    for (int at = begin; at < end; ++at) {
      wait_copies<kStages - 2>();
      sync_block();
      const int ahead = at + kStages - 1;
      if (ahead < end) fetch(a, shared + (ahead - begin) % kStages * kStage, ahead);
      commit_copies();
      const int tile = at / p.steps, next = at % p.steps + 1;
      const bool ends_tile = next == p.steps || at + 1 == end;
      const uint8_t* stage = shared + (at - begin) % kStages * kStage;
      const bool has_end = next % a.w.steps_per_group == 0 || next == p.steps;
      const Part part{stage + kX, ends_tile || has_end, has_end, 0};
      if constexpr (Product::kScaled)
        step<Product, 0>(a, stage, lookup, part, sums, group);
      else
        step<Product, 0>(a, stage, lookup, part, sums, sums);
      if constexpr (kOutliers) {
        Group<Exact> exact{};
        const uint64_t columns = a.outliers[at % p.steps];
        const Part beside{stage + kExact, true, true, columns};
        if (columns) step<Exact, 1>(a, stage, lookup, beside, sums, exact);
      }
      if constexpr (Unit::kSparse) {
        int* mine = marks + tile % 2 * kTokens;
        look_at(stage + kX, mine);
        if (ends_tile) spread(mine, marks + (tile + 1) % 2 * kTokens, sums);
      }
      if (!ends_tile) continue;
      const bool whole = at + 1 - tile_begin == p.steps;
      int* turn = reinterpret_cast<int*>(shared + kTurn);
      if (whole || End::share(a, tile, thread(), turn, sync_block, sums)) {
        const int warp = thread() / kLanes, lane = thread() % kLanes;
        End::template store<Product::kElement == 1>(
            a, tile / a.token_tiles * kBlocks * kBlock + warp * kStrip + lane / 4,
            tile % a.token_tiles * kTokens + lane % 4 * 2, sums);
      }
      tile_begin = at + 1;
      End::clear(sums);
    }
  }
};

}  // namespace tersor::cuda
