// csrc/cuda/device.cuh on the CPU: a block of threads as fibers that take turns in a random order.
//
// What a GPU leaves open is made as bad as it may be: between two barriers threads run in any
// order, blocks too; shared memory begins as NaN; and a copy from global to shared memory is done
// as late as wait_copies allows, or (eager) at once. A kernel that gives the right answer in both
// ways, for many seeds, has its barriers where they are needed. The fragments of the tensor cores
// are written after the figures of the PTX manual.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/tile16.h"

#define TERSOR_DEVICE inline

namespace tersor::cuda {

namespace emulator {

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "emulator: %s\n", what.c_str());
  std::abort();
}

struct Copy {
  void* to;
  const void* from;  // nullptr: zeros
  size_t bytes = 16;
};

constexpr int kWarp = 32;
using Operation = void (*)(void** lanes);
constexpr size_t kStack = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  // ready: also one that looks again and again whether something has happened.
  enum { ready, at_barrier, at_others, together, done } state = ready;
  // What the lanes of a warp, or of four, do together.
  int lanes = kWarp;
  void* operands = nullptr;
  Operation operation = nullptr;
  std::vector<std::vector<Copy>> groups;  // committed and not yet done, oldest first
  std::vector<Copy> open;                 // since the last commit
  bool reads = false;                     // shared memory, since the last fence_reads
};

struct Region {
  const uint8_t* begin;
  const uint8_t* end;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<uint8_t> shared_bytes;
  uint8_t* shared = nullptr;
  size_t shared_size = 0;
  std::vector<Region> readable;
  ucontext_t scheduler;
  int current = 0, worker = 0, workers = 0;
  bool eager = false;
  std::vector<int> released;                  // threads that may go on
  std::vector<std::function<void()>> engine;  // copies that are under way by themselves
  bool barriers = true;                       // or none, to see that this is noticed
  std::function<void()> body;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline Fiber& self() { return machine().fibers[machine().current]; }

inline void leave(decltype(Fiber::state) state) {
  Fiber& fiber = self();
  fiber.state = state;
  swapcontext(&fiber.context, &machine().scheduler);
}

inline void check_read(const void* from, size_t bytes, size_t alignment) {
  const auto* at = static_cast<const uint8_t*>(from);
  if (reinterpret_cast<uintptr_t>(at) % alignment) fail("an address is not aligned");
  const Machine& m = machine();
  if (at >= m.shared && at + bytes <= m.shared + m.shared_size) {
    self().reads = true;
    return;
  }
  for (const Region& region : m.readable)
    if (at >= region.begin && at + bytes <= region.end) return;
  fail("a read outside of the arrays that the kernel was given");
}

inline void check_shared(const void* to, size_t bytes) {
  const auto* at = static_cast<const uint8_t*>(to);
  const Machine& m = machine();
  if (at < m.shared || at + bytes > m.shared + m.shared_size)
    fail("a copy to outside of shared memory");
}

inline void perform(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, copy.bytes);
  else
    std::memset(copy.to, 0, copy.bytes);
}

inline void enter() {
  machine().body();
  Fiber& fiber = self();
  fiber.state = Fiber::done;
  swapcontext(&fiber.context, &machine().scheduler);
}

inline void run_block(std::mt19937& random) {
  Machine& m = machine();
  for (Fiber& fiber : m.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.state = Fiber::ready;
    fiber.groups.clear();
    fiber.open.clear();
    fiber.reads = false;
    makecontext(&fiber.context, enter, 0);
  }
  const int count = static_cast<int>(m.fibers.size());
  constexpr int kMostLooks = 1 << 20;  // in a row
  int looks = 0;
  m.engine.clear();
  std::vector<int> ready(count);
  std::iota(ready.begin(), ready.end(), 0);
  for (;;) {
    while (!ready.empty()) {
      const size_t pick = random() % ready.size();
      m.current = ready[pick];
      ready[pick] = ready.back();
      ready.pop_back();
      swapcontext(&m.scheduler, &self().context);
      if (self().state == Fiber::ready) {
        ready.push_back(m.current);
        if (++looks > kMostLooks) fail("threads wait for what never happens");
      } else {
        looks = 0;
      }
      const int lanes = self().lanes, first = m.current / lanes * lanes;
      std::vector<void*> operands(lanes);
      bool together = true;
      for (int i = 0; i < lanes && together; ++i) {
        const Fiber& lane = m.fibers[first + i];
        together = lane.state == Fiber::together && lane.operation == m.fibers[first].operation;
        operands[i] = lane.operands;
      }
      if (together) {
        m.fibers[first].operation(operands.data());
        for (int i = 0; i < lanes; ++i) m.fibers[first + i].state = Fiber::ready;
        for (int i = 0; i < lanes; ++i) ready.push_back(first + i);
      }
      for (int each : m.released) ready.push_back(each);
      m.released.clear();
      if (!m.engine.empty() && random() % 4 == 0) {
        const size_t picked = random() % m.engine.size();
        const std::function<void()> copy = std::move(m.engine[picked]);
        m.engine.erase(m.engine.begin() + static_cast<std::ptrdiff_t>(picked));
        copy();
      }
    }
    const auto all = [&](auto state) {
      return std::all_of(m.fibers.begin(), m.fibers.end(),
                         [&](const Fiber& fiber) { return fiber.state == state; });
    };
    if (all(Fiber::done)) return;
    if (!all(Fiber::at_barrier)) fail("threads wait for each other at different places");
    for (int i = 0; i < count; ++i) {
      m.fibers[i].state = Fiber::ready;
      ready.push_back(i);
    }
  }
}

// Runs `body` for every thread of every block. readable: what the kernel may read by 16 bytes.
inline void launch(int workers, int threads, size_t shared, std::vector<Region> readable,
                   unsigned seed, bool eager, std::function<void()> body) {
  Machine& m = machine();
  std::mt19937 random(seed);
  m.fibers = std::vector<Fiber>(threads);
  m.shared_bytes.assign(shared + 1024, 0);
  m.shared = m.shared_bytes.data();
  m.shared += (1024 - reinterpret_cast<uintptr_t>(m.shared) % 1024) % 1024;
  m.shared_size = shared;
  m.readable = std::move(readable);
  m.workers = workers;
  m.eager = eager;
  m.body = std::move(body);
  std::vector<int> order(workers);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (int each : order) {
    m.worker = each;
    std::memset(m.shared, 0xff, shared);  // NaN, in every type
    run_block(random);
  }
  m.fibers.clear();
}

// All lanes of a warp, or of four, meet; then `operation` works on the operands of all of them.
template <class Operands>
void together(Operands& mine, Operation operation, int lanes = kWarp) {
  self().operands = &mine;
  self().operation = operation;
  self().lanes = lanes;
  leave(Fiber::together);
}

}  // namespace emulator

inline int thread() { return emulator::machine().current; }
inline int worker() { return emulator::machine().worker; }
inline int workers() { return emulator::machine().workers; }
inline uint8_t* shared_memory() { return emulator::machine().shared; }
inline void sync_block() {
  if (emulator::machine().barriers) emulator::leave(emulator::Fiber::at_barrier);
}
inline void sync_warp() {
  int nothing = 0;
  emulator::together(nothing, [](void**) {});
}
inline void fence() {}
inline int add_atomically(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}

inline void copy_bytes_async(void* shared, const void* global, bool inside, size_t bytes) {
  emulator::check_shared(shared, bytes);
  emulator::check_read(inside ? global : shared, inside ? bytes : 1, inside ? bytes : 1);
  const emulator::Copy copy{shared, inside ? global : nullptr, bytes};
  if (emulator::machine().eager)
    emulator::perform(copy);
  else
    emulator::self().open.push_back(copy);
}
inline void copy_async(void* shared, const void* global, bool inside = true) {
  copy_bytes_async(shared, global, inside, 16);
}
inline void copy_async4(void* shared, const void* global, bool inside = true) {
  copy_bytes_async(shared, global, inside, 4);
}
inline void commit_copies() {
  emulator::Fiber& fiber = emulator::self();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int pending>
void wait_copies() {
  auto& groups = emulator::self().groups;
  while (groups.size() > pending) {
    for (const emulator::Copy& copy : groups.front()) emulator::perform(copy);
    groups.erase(groups.begin());
  }
}

template <class T>
void load16(T* to, const void* from) {
  static_assert(sizeof(T) == 4, "four words");
  emulator::check_read(from, 16, 16);
  std::memcpy(to, from, 16);
}
inline void load8(uint32_t (&to)[2], const void* from) {
  emulator::check_read(from, 8, 8);
  std::memcpy(to, from, 8);
}
template <class T>
void store16(void* to, const T* from) {
  static_assert(sizeof(T) == 4, "four words");
  emulator::check_read(to, 16, 16);
  std::memcpy(to, from, 16);
}

inline uint16_t bits_of(float value, Half) { return to_f16(value); }
inline uint16_t bits_of(float value, Bfloat) { return to_bf16(value); }
inline float value_of(uint16_t bits, Half) { return from_f16(bits); }
inline float value_of(uint16_t bits, Bfloat) { return from_bf16(bits); }

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  struct Operands {
    uint32_t* to;
    const uint8_t* row;
  } mine{to, static_cast<const uint8_t*>(row)};
  emulator::check_shared(row, 16);
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("an address is not aligned");
  emulator::together(mine, [](void** lanes) {
    const auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane]); };
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(of(lane)->to + matrix, of(matrix * 8 + lane / 4)->row + lane % 4 * 4, 4);
  });
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    float* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  emulator::together(mine, [](void** lanes) {
    const auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane]); };
    const auto half = [](uint32_t pair, int second) {
      return static_cast<double>(value_of(static_cast<uint16_t>(pair >> 16 * second), T{}));
    };
    double first[16][16], second[16][8];
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int e = 0; e < 2; ++e) {
        const int r = lane / 4, t = lane % 4 * 2 + e;
        first[r][t] = half(of(lane)->a[0], e);
        first[r + 8][t] = half(of(lane)->a[1], e);
        first[r][t + 8] = half(of(lane)->a[2], e);
        first[r + 8][t + 8] = half(of(lane)->a[3], e);
        second[t][r] = half(of(lane)->b[0], e);
        second[t + 8][r] = half(of(lane)->b[1], e);
      }
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int r = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = of(lane)->c[i];
        for (int t = 0; t < 16; ++t) sum += first[r][t] * second[t][column];
        of(lane)->c[i] = static_cast<float>(sum);
      }
  });
}

template <class T>
uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto of = [&](uint32_t pair) {
      return static_cast<double>(value_of(static_cast<uint16_t>(pair >> i), T{}));
    };
    const auto sum = static_cast<float>(of(a) * of(b) + of(c));
    result |= static_cast<uint32_t>(bits_of(sum, T{})) << i;
  }
  return result;
}

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t picks) {
  const uint64_t all = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(all >> 8 * (picks >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int nearest(float value) { return static_cast<int>(std::nearbyint(value)); }
inline float quotient(float a, float b) { return a / b; }
inline float times(float a, float b) { return a * b; }

template <class T, class Join>
T over_lanes(T value, Join) {
  struct Operands {
    T* value;
  } mine{&value};
  emulator::together(mine, [](void** lanes) {
    const auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane])->value; };
    T all = *of(0);
    for (int lane = 1; lane < emulator::kWarp; ++lane) all = Join{}(all, *of(lane));
    for (int lane = 0; lane < emulator::kWarp; ++lane) *of(lane) = all;
  });
  return value;
}
struct Larger {
  float operator()(float a, float b) const { return std::fmax(a, b); }
};
inline int sum_of_lanes(int value) { return over_lanes(value, std::plus<int>()); }
inline float sum_of_lanes(float value) { return over_lanes(value, std::plus<float>()); }
inline float of_lane(float value, int lane) {
  struct Operands {
    float value;
    int lane;
    float* to;
  } mine{value, lane, &value};
  emulator::together(mine, [](void** lanes) {
    const auto of = [&](int each) { return static_cast<Operands*>(lanes[each]); };
    for (int each = 0; each < emulator::kWarp; ++each) *of(each)->to = of(of(each)->lane)->value;
  });
  return value;
}
inline float most_of_lanes(float value) { return over_lanes(value, Larger()); }

// Fragments of mma.m16n8k32 with bytes: as those above, four columns where there are two.
template <class Byte>
void multiply_add_int8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    int32_t* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  emulator::together(mine, [](void** lanes) {
    const auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane]); };
    int first[16][32], second[32][8];
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int e = 0; e < 4; ++e) {
        const int r = lane / 4, t = lane % 4 * 4 + e;
        const auto byte = [&](uint32_t word) { return static_cast<Byte>(word >> 8 * e & 0xff); };
        first[r][t] = byte(of(lane)->a[0]);
        first[r + 8][t] = byte(of(lane)->a[1]);
        first[r][t + 16] = byte(of(lane)->a[2]);
        first[r + 8][t + 16] = byte(of(lane)->a[3]);
        second[t][r] = static_cast<int8_t>(byte(of(lane)->b[0]));
        second[t + 16][r] = static_cast<int8_t>(byte(of(lane)->b[1]));
      }
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int r = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int t = 0; t < 32; ++t) of(lane)->c[i] += first[r][t] * second[t][column];
      }
  });
}

}  // namespace tersor::cuda
