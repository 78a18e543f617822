// y = x * W^T for more tokens, on Hopper's own instructions.
//
// A worker is three groups of four warps. One thread of the first group copies, by the memory
// engine, the steps of the worker's stretch into a ring of stages, as far ahead as there is room.
// The other two groups have 64 rows each and all tokens of the tile: they make codes into first
// operands in registers, while the tensor cores read the tokens from shared memory by themselves.
// As in gemm_mma.cuh the codes enter the product as they are, minus their zero point, and the scale
// meets the sum of its group in float32; while one group of warps scales, the other multiplies.
//
// Of shared memory a stage is
//
//   x       [kTokens][64] of 16 bits, swizzled (see TensorMap), 1 KiB aligned
//   codes   [2] blocks as they are in memory
//   scales  [2][groups][64] as in memory, room for two groups of float32
//   zeros   [2][groups][64]
#pragma once

#include "arguments.h"
#include "dequantize.cuh"
#include "device.cuh"
#include "epilogue.cuh"
#include "hopper.cuh"

namespace tersor::cuda {

template <class T, int kBits_, int kTokens_>
struct WgmmaGemm {
  static constexpr int kBits = kBits_, kTokens = kTokens_, kBlocks = 2;
  static constexpr int kGroup = 128;  // threads that multiply together
  static constexpr int kConsumers = kBlocks * kGroup, kThreads = kGroup + kConsumers;
  static constexpr int kTokenTiles = kTokens / 8;
  using End = Epilogue<T, 1, kTokenTiles, kConsumers>;
  using Sums = typename End::Sums;
  static constexpr int kTile = End::kTile;
  static constexpr int kPerBlock = 1;  // workers that a multiprocessor holds

  // Registers of a thread that copies, and of one that multiplies. All of them must be of the block
  // when it starts, a multiple of 8 for each thread: to take more would never end.
  static constexpr int kGiven = 40, kTaken = 232;
  static constexpr int kAtStart = (64 << 10) / kThreads / 8 * 8;
  static_assert(kGroup * kGiven + kConsumers * kTaken <= kThreads * kAtStart, "they are there");

  static constexpr int kX = 0;
  static constexpr int kCodes = kX + kTokens * kBlock * 2;
  static constexpr int kScales = kCodes + kBlocks * block_bytes(kBits);
  static constexpr int kZeros = kScales + kBlocks * 2 * kBlock * 4;
  static constexpr int kStage = (kZeros + kBlocks * 2 * kBlock + 1023) / 1024 * 1024;
  static constexpr int kStages = 200 * 1024 / kStage < 8 ? 200 * 1024 / kStage : 8;
  static constexpr int kBarriers = kStages * kStage;  // [stages] full, [stages] empty
  static constexpr int kTurn = kBarriers + 2 * kStages * 8;
  static constexpr int kSharedBytes = kTurn + 16;

  // --- the thread that copies ----------------------------------------------------------------

  static TERSOR_DEVICE void fetch(const BoxedArgs& boxed, uint8_t* stage, int at, Barrier* full) {
    const LinearArgs& a = boxed.linear;
    const int tile = at / a.w.steps, step = at % a.w.steps;
    const int row_tile = tile / a.token_tiles, token = tile % a.token_tiles * kTokens;
    const int group = step / a.w.steps_per_group * a.w.groups_per_step;
    const int scale_bytes = a.w.groups_per_step * kBlock * a.w.scale_bytes;
    const int zero_bytes = a.w.asymmetric ? a.w.groups_per_step * kBlock : 0;
    const int rest = a.w.row_blocks - row_tile * kBlocks, blocks = rest < kBlocks ? rest : kBlocks;
    barrier_expect(full,
                   kTokens * kBlock * 2 + blocks * (block_bytes(kBits) + scale_bytes + zero_bytes));
    copy_box(stage + kX, &boxed.x, token, step * kBlock, full);
    for (int b = 0; b < blocks; ++b) {
      const int row_block = row_tile * kBlocks + b;
      copy_bulk(stage + kCodes + b * block_bytes(kBits), a.packed + block_at(a.w, row_block, step),
                block_bytes(kBits), full);
      const int64_t grid = grid_at(a.w, row_block, group, 0);
      copy_bulk(stage + kScales + b * 2 * kBlock * 4,
                a.packed + a.w.scales_at + grid * a.w.scale_bytes, scale_bytes, full);
      if (zero_bytes)
        copy_bulk(stage + kZeros + b * 2 * kBlock, a.packed + a.w.zeros_at + grid, zero_bytes,
                  full);
    }
  }

  static TERSOR_DEVICE void produce(const BoxedArgs& a, uint8_t* shared, int begin, int end) {
    Barrier* full = reinterpret_cast<Barrier*>(shared + kBarriers);
    for (int at = begin; at < end; ++at) {
      const int turn = (at - begin) / kStages, slot = (at - begin) % kStages;
      if (turn) barrier_wait(full + kStages + slot, (turn - 1) % 2);
      fetch(a, shared + slot * kStage, at, full + slot);
    }
  }

  // --- those that multiply -------------------------------------------------------------------

  // sums += scale * group. row: of the block, this thread's first. index: of the group in the step.
  static TERSOR_DEVICE void fold(const LinearArgs& a, const uint8_t* scales, int row, int index,
                                 Sums& sums, const Sums& group) {
    const float upper = scale_of(scales, a.scale_dtype, index * kBlock + row);
    const float lower = scale_of(scales, a.scale_dtype, index * kBlock + row + 8);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][j][i] += (i < 2 ? upper : lower) * group[0][j][i];
  }

  // begins, ends: a group, or what this worker has of it, does so with this step. block: 0 or 1.
  static TERSOR_DEVICE void step(const LinearArgs& a, const uint8_t* stage, int block, bool begins,
                                 bool ends, Sums& sums, Sums& group) {
    const int warp = thread() % kGroup / kLanes, lane = thread() % kLanes;
    const int row = warp * kStrip + lane / 4;
    const uint8_t* scales = stage + kScales + block * 2 * kBlock * 4;
    const uint8_t* zeros = stage + kZeros + block * 2 * kBlock;
    uint32_t words[kBits], codes[4][4];
#pragma unroll
    for (int half = 0; half < kBits / 4; ++half) {
      const int chunk = (warp * (kBits / 4) + half) * kLanes + lane;
      load16(words + half * 4, stage + kCodes + block * block_bytes(kBits) + chunk * 16);
    }
    Zero<T, kBits> z[2];
    pin(group[0]);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int index = a.w.groups_per_step == 2 ? q / 2 : 0;
      if (q % 2 == 0)
#pragma unroll
        for (int lower = 0; lower < 2; ++lower)
          z[lower].set(a.w.asymmetric ? zeros[index * kBlock + row + lower * 8] : 1 << (kBits - 1));
      operands<T, kBits>(codes[q], words + q * (kBits / 4), z);
      const bool first = q == 0 ? begins : q == 2 && a.w.groups_per_step == 2;
      products_begin(codes[q]);
      multiply_begin<T, kTokens>(group[0], codes[q], operand_of(stage + kX + q * kStrip * 2),
                                 !first);
      products_commit();
      if (q == 1 && a.w.groups_per_step == 2) {
        products_wait(group[0]);
        fold(a, scales, row, 0, sums, group);
      }
    }
    products_wait(group[0]);
    if (ends) fold(a, scales, row, a.w.groups_per_step - 1, sums, group);
  }

  static TERSOR_DEVICE void consume(const LinearArgs& a, uint8_t* shared, int begin, int end) {
    const Partition& p = a.partition;
    Barrier* full = reinterpret_cast<Barrier*>(shared + kBarriers);
    int* turn = reinterpret_cast<int*>(shared + kTurn);
    const int at_tile = thread() - kGroup, block = at_tile / kGroup;
    const int warp = at_tile % kGroup / kLanes, lane = thread() % kLanes;
    Sums sums{}, group{};
    int tile_begin = begin;
    bool begins = true;
    for (int at = begin; at < end; ++at) {
      const int slot = (at - begin) % kStages;
      const int tile = at / p.steps, next = at % p.steps + 1;
      const bool ends_tile = next == p.steps || at + 1 == end;
      const bool ends = ends_tile || next % a.w.steps_per_group == 0;
      barrier_wait(full + slot, (at - begin) / kStages % 2);
      step(a, shared + slot * kStage, block, begins, ends, sums, group);
      fence_reads();
      sync_warp();  // every lane has read what it needs of the stage
      if (lane == 0) barrier_arrive(full + kStages + slot);
      begins = ends;
      if (!ends_tile) continue;
      const auto sync = [] { sync_threads(1, kConsumers); };
      const bool whole = at + 1 - tile_begin == p.steps;
      if (whole || End::share(a, tile, at_tile, turn, sync, sums))
        End::store(a, (tile / a.token_tiles * kBlocks + block) * kBlock + warp * kStrip + lane / 4,
                   tile % a.token_tiles * kTokens + lane % 4 * 2, sums);
      tile_begin = at + 1;
      End::clear(sums);
    }
  }

  // --- a worker ------------------------------------------------------------------------------

  static TERSOR_DEVICE void run(const BoxedArgs& a) {
    uint8_t* shared = shared_memory();
    const Partition& p = a.linear.partition;
    const int begin = p.begin(worker()), end = p.begin(worker() + 1);
    if (thread() == 0) {
      Barrier* full = reinterpret_cast<Barrier*>(shared + kBarriers);
      for (int i = 0; i < kStages; ++i) {
        barrier_init(full + i, 1);
        barrier_init(full + kStages + i, kConsumers / kLanes);
      }
      barrier_publish();
    }
    sync_block();
    if (thread() < kGroup) {
      give_registers<kGiven>();
      if (thread() == 0) produce(a, shared, begin, end);
    } else {
      take_registers<kTaken>();
      consume(a.linear, shared, begin, end);
    }
  }
};

}  // namespace tersor::cuda
