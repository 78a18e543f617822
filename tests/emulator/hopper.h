// csrc/cuda/hopper.cuh on the CPU. The memory engine copies when chance will have it, and products
// of four warps are done as late as products_wait allows, from what registers and shared memory
// hold then; or (eager) both at once.
#pragma once

#include <map>

#include "cuda/arguments.h"
#include "device.h"

namespace tersor::cuda {

namespace emulator {

struct BarrierState {
  int count = 0, arrived = 0;
  int64_t bytes = 0;  // announced and not yet copied
  int phase = 0;

  void look() {
    if (arrived < count || bytes) return;
    arrived = 0;
    ++phase;
  }
};

// The first operand that products_begin was told of, until its product begins.
struct Begun {
  bool open = false;
  uint32_t a[4];
};

struct Product {
  void (*operation)(void** lanes);
  float* d;
  const uint32_t* a;
  uint64_t b;
  bool add;
};

// Of the block at hand; began anew by barrier_init.
inline std::map<const void*, BarrierState>& barriers() {
  static std::map<const void*, BarrierState> all;
  return all;
}
inline BarrierState& barrier(const void* at) {
  const auto found = barriers().find(at);
  if (found == barriers().end()) fail("a barrier that was not initialised");
  return found->second;
}
inline std::map<int, std::vector<int>>& named() {
  static std::map<int, std::vector<int>> all;
  return all;
}
inline std::vector<Product>& products() {  // of the thread at hand
  static std::vector<std::vector<Product>> all(1024);
  return all[machine().current];
}

inline Begun& begun() {  // of the thread at hand
  static std::vector<Begun> all(1024);
  return all[machine().current];
}

inline void start(std::function<void()> copy) {
  if (machine().eager)
    copy();
  else
    machine().engine.push_back(std::move(copy));
}

}  // namespace emulator

using Barrier = uint64_t;

inline void barrier_init(Barrier* at, int count) {
  emulator::check_shared(at, 8);
  emulator::barriers()[at] = {};
  emulator::barriers()[at].count = count;
}
inline void barrier_publish() {}
inline void fence_reads() { emulator::self().reads = false; }
inline void barrier_arrive(Barrier* at) {
  if (emulator::self().reads)
    emulator::fail("shared memory goes back to the memory engine without fence_reads");
  ++emulator::barrier(at).arrived;
  emulator::barrier(at).look();
}
inline void barrier_expect(Barrier* at, int bytes) {
  emulator::barrier(at).bytes += bytes;
  barrier_arrive(at);
}
inline void barrier_wait(Barrier* at, int parity) {
  while (emulator::barrier(at).phase % 2 == parity) emulator::leave(emulator::Fiber::ready);
}
inline void sync_threads(int number, int threads) {
  std::vector<int>& waiting = emulator::named()[number];
  waiting.push_back(emulator::machine().current);
  if (static_cast<int>(waiting.size()) == threads) {
    for (int each : waiting) {
      emulator::machine().fibers[each].state = emulator::Fiber::ready;
      if (each != emulator::machine().current) emulator::machine().released.push_back(each);
    }
    waiting.clear();
    return;
  }
  emulator::leave(emulator::Fiber::at_others);
}

inline void copy_bulk(void* shared, const void* global, int bytes, Barrier* at) {
  emulator::check_shared(shared, bytes);
  emulator::check_read(global, bytes, 16);
  if (bytes % 16 || reinterpret_cast<uintptr_t>(shared) % 16)
    emulator::fail("a copy whose bytes or destination are no multiple of 16");
  emulator::start([=] {
    std::memcpy(shared, global, bytes);
    emulator::barrier(at).bytes -= bytes;
    emulator::barrier(at).look();
  });
}

// A TensorMap here: address, rows, columns, elements from row to row, rows of a box.
inline TensorMap tensor_map(const void* at, int64_t rows, int64_t columns, int64_t stride,
                            int box) {
  return {{reinterpret_cast<uintptr_t>(at), static_cast<uint64_t>(rows),
           static_cast<uint64_t>(columns), static_cast<uint64_t>(stride),
           static_cast<uint64_t>(box)}};
}

inline void copy_box(void* shared, const TensorMap* map, int row, int column, Barrier* at) {
  const TensorMap m = *map;
  emulator::check_shared(shared, m.opaque[4] * 128);
  if (reinterpret_cast<uintptr_t>(shared) % 1024) emulator::fail("a box is not aligned to 1 KiB");
  emulator::start([=] {
    const auto* from = reinterpret_cast<const uint16_t*>(m.opaque[0]);
    auto* to = static_cast<uint8_t*>(shared);
    for (int r = 0; r < static_cast<int>(m.opaque[4]); ++r)
      for (int c = 0; c < 64; ++c) {
        const bool inside = row + r < static_cast<int64_t>(m.opaque[1]) &&
                            column + c < static_cast<int64_t>(m.opaque[2]);
        const uint16_t value = inside ? from[(row + r) * m.opaque[3] + column + c] : 0;
        std::memcpy(to + r * 128 + ((c / 8) ^ r % 8) * 16 + c % 8 * 2, &value, 2);
      }
    emulator::barrier(at).bytes -= static_cast<int64_t>(m.opaque[4]) * 128;
    emulator::barrier(at).look();
  });
}

inline uint64_t operand_of(const void* at) { return reinterpret_cast<uintptr_t>(at); }

namespace emulator {

// 64 x kTokens of 128 lanes. The second operand is where its descriptor says: rows of 128 bytes, of
// whose address bits 7 to 9 are added, without carry, to bits 4 to 6.
template <class T, int kTokens>
void multiply_now(void** lanes) {
  const auto of = [&](int lane) { return static_cast<Product*>(lanes[lane]); };
  const auto value = [](uint32_t pair, int second) {
    return static_cast<double>(value_of(static_cast<uint16_t>(pair >> 16 * second), T{}));
  };
  double tokens[kTokens][16];
  const uint8_t* shared = machine().shared;
  for (int t = 0; t < kTokens; ++t)
    for (int k = 0; k < 16; ++k) {
      uint64_t at = of(0)->b - reinterpret_cast<uintptr_t>(shared) + t * 128 + k * 2;
      at ^= (at >> 7 & 7) << 4;
      uint16_t bits;
      std::memcpy(&bits, shared + at, 2);
      tokens[t][k] = value_of(bits, T{});
    }
  for (int warp = 0; warp < 4; ++warp) {
    double rows[16][16];
    for (int lane = 0; lane < kWarp; ++lane) {
      const Product* p = of(warp * kWarp + lane);
      if (p->b != of(0)->b || p->add != of(0)->add) fail("lanes of a product differ");
      for (int pair = 0; pair < 4; ++pair)
        for (int e = 0; e < 2; ++e)
          rows[lane / 4 + pair % 2 * 8][lane % 4 * 2 + e + pair / 2 * 8] = value(p->a[pair], e);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      Product* p = of(warp * kWarp + lane);
      for (int i = 0; i < kTokens / 2; ++i) {
        const int r = lane / 4 + i % 4 / 2 * 8, t = i / 4 * 8 + lane % 4 * 2 + i % 2;
        double sum = p->add ? p->d[i] : 0.0;
        for (int k = 0; k < 16; ++k) sum += rows[r][k] * tokens[t][k];
        p->d[i] = static_cast<float>(sum);
      }
    }
  }
}

}  // namespace emulator

template <int kTiles>
void pin(float (&)[kTiles][4]) {}
inline void products_begin(uint32_t (&a)[4]) {
  emulator::begun() = {true, {a[0], a[1], a[2], a[3]}};
}
inline void products_commit() {}

template <class T, int kTokens>
void multiply_begin(float (&sums)[kTokens / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  const emulator::Begun before = std::exchange(emulator::begun(), {});
  if (!before.open || !std::equal(a, a + 4, before.a))
    emulator::fail("an operand of a product that was written after products_begin");
  emulator::Product mine{emulator::multiply_now<T, kTokens>, &sums[0][0], a, b, add};
  if (emulator::machine().eager)
    emulator::together(mine, mine.operation, 128);
  else
    emulator::products().push_back(mine);
}

template <int kTiles>
void products_wait(float (&sums)[kTiles][4]) {
  auto& mine = emulator::products();
  for (const emulator::Product& each : mine)
    if (each.d != &sums[0][0]) emulator::fail("a product has other sums than are waited for");
  for (emulator::Product& each : mine) emulator::together(each, each.operation, 128);
  mine.clear();
}

template <int count>
void give_registers() {}
template <int count>
void take_registers() {}

}  // namespace tersor::cuda
