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
//   codes   [kBlocks] blocks as they are in memory
//   x       [kTokens][64] elements; their 16 bytes stand in another order for every token, so that
//           the eight rows of a matrix that ldmatrix reads lie in different banks
//   scales  [kBlocks][groups][64] as in memory, room for two groups of float32; for products that
//           are not of whole rows
//   zeros   [kBlocks][groups][64], or multipliers
//   x sums  [groups][kTokens] int32, for products that need them
//
// A weight of indices into sixteen values (codebook.h), whose Args are CodebookArgs, has no zeros:
// where its scales are int8, they are in their place, and the float32 step of each in that of the
// scales.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "codebook.cuh"
#include "device.cuh"
#include "epilogue.cuh"
#include "products.cuh"

namespace tersor::cuda {

template <class Product, int kTokens_, int kBlocks_, class Args = LinearArgs>
struct MmaGemm {
  static constexpr bool kCodebook = std::is_same_v<Args, CodebookArgs>;
  static constexpr int kBits = Product::kBits, kTokens = kTokens_, kBlocks = kBlocks_;
  static constexpr int kWarps = 4, kThreads = kWarps * kLanes;
  static constexpr int kTokenTiles = kTokens / 8;  // of one tensor core operation
  using Sum = std::conditional_t<Product::kWhole, typename Product::Sum, float>;
  using End = Epilogue<typename Product::Result, kBlocks, kTokenTiles, kThreads, Sum>;
  using Sums = typename End::Sums;
  using Group = typename Product::Sum[kBlocks][kTokenTiles][4];
  using Lookup = typename LookupOf<Product, kCodebook>::Type;
  static constexpr int kTile = End::kTile;
  static constexpr int kStages = kTokens <= 16 ? 6 : kBits == 4 ? 4 : 3;
  static constexpr int kPerBlock = kTokens <= 16 ? 4 : 2;  // workers that a multiprocessor holds

  static constexpr int kRow = kBlock * Product::kElement;  // bytes of a token in a stage
  static constexpr int kCodes = 0;
  static constexpr int kX = kCodes + kBlocks * block_bytes(kBits);
  static constexpr int kScales = kX + kTokens * kRow;
  static constexpr int kZeros = kScales + (Product::kWhole ? 0 : kBlocks * 2 * kBlock * 4);
  static constexpr int kXSums = kZeros + kBlocks * 2 * kBlock;
  static constexpr int kStage = kXSums + (Product::kCorrects ? 2 * kTokens * 4 : 0);
  static constexpr int kTurn = kStages * kStage;  // of this worker, where it shares a tile
  static constexpr int kTable = kTurn + 128;      // of values, where there is a codebook
  static_assert(!kCodebook || kTable % 128 == 0, "entries begin at the first bank");
  static constexpr int kSharedBytes = kCodebook ? kTable + Lookup::kBytes : kTurn + 16;

  // Where the 16 bytes c of a token stand: eight rows of 128 bytes, or of 64, in different banks.
  static TERSOR_DEVICE int x_at(int token, int c) {
    const int turn = kRow == 128 ? token % 8 : token / 2 % 4;
    return token * kRow + (c ^ turn) * 16;
  }

  // --- one step: what is copied, and what is done with it ------------------------------------

  static TERSOR_DEVICE void fetch(const Args& a, uint8_t* stage, int at) {
    const int tile = at / a.w.steps, step = at % a.w.steps;
    const int row_tile = tile / a.token_tiles, first_token = tile % a.token_tiles * kTokens;
    const int group = step / a.w.steps_per_group * a.w.groups_per_step;
    const int scale_chunks =
        Product::kWhole ? 0 : a.w.groups_per_step * kBlock * a.w.scale_bytes / 16;
    const int zero_chunks = has_zeros(a.w) ? a.w.groups_per_step * kBlock / 16 : 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int row_block = row_tile * kBlocks + b;
      const bool inside = row_block < a.w.row_blocks;
      const int from = inside ? row_block : 0;  // an address that may be read, if only for zeros
      const uint8_t* codes = a.packed + block_at(a.w, from, step);
#pragma unroll
      for (int i = 0; i < block_bytes(kBits) / 16 / kThreads; ++i) {
        const int at16 = (i * kThreads + thread()) * 16;
        copy_async(stage + kCodes + b * block_bytes(kBits) + at16, codes + at16, inside);
      }
      const int64_t grid = grid_at(a.w, from, group, 0);
      uint8_t* scales = stage + kScales + b * 2 * kBlock * 4;
      if constexpr (kCodebook)
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
        const int64_t row = int64_t{group + thread() / kPerGroup} * a.token_tiles * kTokens;
        copy_async(stage + kXSums + thread() * 16,
                   a.x_sums + row + first_token + thread() % kPerGroup * 4);
      }
    }
  }

  // The step of each scale of a block of rows. A row that is only padding has none, and a group
  // that is has some.
  static TERSOR_DEVICE void fetch_steps(const Args& a, uint8_t* to, int row_block, int group) {
    if (thread() >= a.w.groups_per_step * kBlock) return;
    const int row = row_block * kBlock + thread() % kBlock, each = group + thread() / kBlock;
    const bool inside = row < a.w.n;
    const int last = a.row_groups - 1;
    const int step = inside ? scale_step_of(row, a.row_groups, each < last ? each : last) : 0;
    copy_async4(to + thread() * 4, a.scale_steps + step, inside);
  }

  // The second operands of the tensor cores for the columns of operation `q`, which are 32 bytes of
  // every token. ldmatrix gives four 8 x 8 matrices: those of 16 tokens and one operation; or of
  // the only 8 tokens and two.
  static TERSOR_DEVICE void activations(uint32_t (&b)[kTokenTiles][2], const uint8_t* x, int q) {
    const int lane = thread() % kLanes, matrix = lane / 8, row = lane % 8;
    uint32_t four[4];
    if constexpr (kTokenTiles == 1) {
      load_matrices(four, x + x_at(row, q / 2 * 4 + matrix));
      b[0][0] = q % 2 ? four[2] : four[0];
      b[0][1] = q % 2 ? four[3] : four[1];
    } else {
#pragma unroll
      for (int j = 0; j < kTokenTiles / 2; ++j) {
        load_matrices(four, x + x_at(j * 16 + matrix / 2 * 8 + row, q * 2 + matrix % 2));
        b[2 * j][0] = four[0], b[2 * j][1] = four[1];
        b[2 * j + 1][0] = four[2], b[2 * j + 1][1] = four[3];
      }
    }
  }

  // sums += scale * group, group = 0. index: of the group within the step.
  static TERSOR_DEVICE void fold(const Args& a, const uint8_t* stage, const Lookup& lookup,
                                 int index, Sums& sums, Group& group) {
    const int warp = thread() / kLanes, lane = thread() % kLanes;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint8_t* scales = stage + kScales + b * 2 * kBlock * 4;
      const int row = index * kBlock + warp * kStrip + lane / 4;
      float upper, lower;
      if constexpr (kCodebook) {
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
          if constexpr (Product::kCorrects) {
            const int* x_sums = reinterpret_cast<const int*>(stage + kXSums) + index * kTokens;
            group[b][j][i] -=
                zero_of(a, stage, b, row + i / 2 * 8) * x_sums[j * 8 + lane % 4 * 2 + i % 2];
          }
          sums[b][j][i] += (i < 2 ? upper : lower) * static_cast<float>(group[b][j][i]);
          group[b][j][i] = 0;
        }
    }
  }

  // The zero point, or the multiplier; row: of the scales and zeros in a stage.
  static TERSOR_DEVICE int zero_of(const Args& a, const uint8_t* stage, int b, int row) {
    constexpr int kNone = Product::kWhole ? 1 : 1 << (kBits - 1);
    return has_zeros(a.w) ? stage[kZeros + b * 2 * kBlock + row] : kNone;
  }

  // ends_group: a group, or what this worker has of it, ends with this step.
  static TERSOR_DEVICE void step(const Args& a, const uint8_t* stage, const Lookup& lookup,
                                 bool ends_group, Sums& sums, Group& group) {
    const int warp = thread() / kLanes, lane = thread() % kLanes;
    constexpr int kOperations = kBlock / Product::kColumns, kHalf = kOperations / 2;
    constexpr int kWords = kBits / kOperations;  // of a lane in an operation
    uint32_t words[kBlocks][4];                  // 16 bytes at a time
    typename Product::Zero zeros[kBlocks][2];
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
      uint32_t tokens[kTokenTiles][2];
      activations(tokens, stage + kX, q);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (q * kWords % 4 == 0) {
          const int chunk = (warp * (kBits / 4) + q * kWords / 4) * kLanes + lane;
          load16(words[b], stage + kCodes + b * block_bytes(kBits) + chunk * 16);
        }
        uint32_t codes[4];
        if constexpr (kCodebook)
          Product::operands(codes, words[b][q * kWords % 4], lookup);
        else
          Product::operands(codes, words[b] + q * kWords % 4, zeros[b]);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          if constexpr (Product::kWhole)
            Product::multiply(sums[b][j], codes, tokens[j]);
          else
            Product::multiply(group[b][j], codes, tokens[j]);
        }
      }
      if constexpr (!Product::kWhole)
        if (q + 1 == kHalf && a.w.groups_per_step == 2) fold(a, stage, lookup, 0, sums, group);
    }
    if constexpr (!Product::kWhole)
      if (ends_group) fold(a, stage, lookup, a.w.groups_per_step - 1, sums, group);
  }

  // --- a worker ------------------------------------------------------------------------------

  static TERSOR_DEVICE void run(const Args& a) {
    uint8_t* shared = shared_memory();
    Lookup lookup{};
    if constexpr (kCodebook) lookup = Product::begin(a, shared + kTable, kThreads);
    const Partition& p = a.partition;
    const int begin = p.begin(worker()), end = p.begin(worker() + 1);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (begin + i < end) fetch(a, shared + i * kStage, begin + i);
      commit_copies();
    }
    Sums sums{};
    Group group{};
    int tile_begin = begin;  // of this worker's part of the tile at hand
    for (int at = begin; at < end; ++at) {
      wait_copies<kStages - 2>();
      sync_block();
      const int ahead = at + kStages - 1;
      if (ahead < end) fetch(a, shared + (ahead - begin) % kStages * kStage, ahead);
      commit_copies();
      const int tile = at / p.steps, next = at % p.steps + 1;
      const bool ends_tile = next == p.steps || at + 1 == end;
      step(a, shared + (at - begin) % kStages * kStage, lookup,
           ends_tile || next % a.w.steps_per_group == 0, sums, group);
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
