// What the kernels use of the machine: one small function for each instruction that C++ has no word
// for. With TERSOR_EMULATED they come from a stand-in that runs on the CPU (tests/emulator), so
// that the same kernels are tested where there is no GPU.
//
// T is Half or Bfloat. A pair is two of them in a word, the first in the low half.
#pragma once

#include <cstdint>
#include <limits>

#include "kernel.h"

namespace tersor::cuda {

constexpr float kMostFloat = std::numeric_limits<float>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Half {
  static constexpr bool kIsBfloat = false;
};
struct Bfloat {
  static constexpr bool kIsBfloat = true;
};

}  // namespace tersor::cuda

#if defined(TERSOR_EMULATED)
#include "device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define TERSOR_DEVICE __device__ __forceinline__
#define TERSOR_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace tersor::cuda {

// --- where a thread is -----------------------------------------------------------------------

TERSOR_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
TERSOR_DEVICE int worker() { return static_cast<int>(blockIdx.x); }
TERSOR_DEVICE int workers() { return static_cast<int>(gridDim.x); }
TERSOR_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t bytes[];
  return bytes;
}

TERSOR_DEVICE void sync_block() { __syncthreads(); }
TERSOR_DEVICE void sync_warp() { __syncwarp(); }

// Makes this block's writes to global memory seen by other blocks before what follows, for all of
// its threads together with sync_block.
TERSOR_DEVICE void fence() { __threadfence(); }
TERSOR_DEVICE int add_atomically(int* at, int value) { return atomicAdd(at, value); }

// --- copies from global to shared memory -----------------------------------------------------

TERSOR_DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// 16 bytes, aligned on both sides, or 16 zeros where not `inside`; done after wait_copies.
TERSOR_DEVICE void copy_async(void* shared, const void* global, bool inside = true) {
#if __CUDA_ARCH__ >= 800
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
#else
  *static_cast<uint4*>(shared) =
      inside ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
#endif
}

// The same with 4 bytes.
TERSOR_DEVICE void copy_async4(void* shared, const void* global, bool inside = true) {
#if __CUDA_ARCH__ >= 800
  const int bytes = inside ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
#else
  *static_cast<uint32_t*>(shared) = inside ? __ldg(static_cast<const uint32_t*>(global)) : 0;
#endif
}

// The copies since the last call are one group.
TERSOR_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most `pending` groups of this thread are under way.
template <int pending>
TERSOR_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// The sum, or the largest, of the warp's lanes.
TERSOR_DEVICE int sum_of_lanes(int value) {
#pragma unroll
  for (int at = 16; at; at /= 2) value += __shfl_xor_sync(0xffffffffu, value, at);
  return value;
}
TERSOR_DEVICE float sum_of_lanes(float value) {
#pragma unroll
  for (int at = 16; at; at /= 2) value += __shfl_xor_sync(0xffffffffu, value, at);
  return value;
}
// What another lane has, from each lane the value of one.
TERSOR_DEVICE float of_lane(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
TERSOR_DEVICE float most_of_lanes(float value) {
#pragma unroll
  for (int at = 16; at; at /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, at));
  return value;
}

// 16 bytes, aligned, between registers and memory.
template <class T>
TERSOR_DEVICE void load16(T* to, const void* from) {
  static_assert(sizeof(T) == 4, "four words");
  const uint4 words = *static_cast<const uint4*>(from);
  const uint32_t each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) memcpy(to + i, each + i, 4);
}
// 8 bytes, aligned.
TERSOR_DEVICE void load8(uint32_t (&to)[2], const void* from) {
  const uint2 words = *static_cast<const uint2*>(from);
  to[0] = words.x, to[1] = words.y;
}
template <class T>
TERSOR_DEVICE void store16(void* to, const T* from) {
  static_assert(sizeof(T) == 4, "four words");
  uint32_t each[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) memcpy(each + i, from + i, 4);
  *static_cast<uint4*>(to) = make_uint4(each[0], each[1], each[2], each[3]);
}

// --- tensor cores ----------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8,
// and receives of each matrix the elements (lane / 4, lane % 4 * 2) and the next.
TERSOR_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a * b, 16 x 8 = 16 x 16 * 16 x 8 of all lanes, in the fragments of mma.m16n8k16.
template <class T>
TERSOR_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define TERSOR_MMA(shape, type, ...)                                   \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type \
               ".f32 {%0, %1, %2, %3}, " __VA_ARGS__)

template <>
TERSOR_DEVICE void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  TERSOR_MMA("m16n8k16", "f16", "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(c[0]),
             "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
             "r"(b[0]), "r"(b[1]));
#else
  TERSOR_MMA("m16n8k8", "f16", "{%4, %5}, {%6}, {%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]),
             "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  TERSOR_MMA("m16n8k8", "f16", "{%4, %5}, {%6}, {%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]),
             "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

template <>
TERSOR_DEVICE void multiply_add<Bfloat>(float (&c)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  TERSOR_MMA("m16n8k16", "bf16", "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(c[0]),
             "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
             "r"(b[0]), "r"(b[1]));
#endif  // before that no tensor core reads bfloat16: the host never chooses such a kernel
}

#undef TERSOR_MMA

// The same, 16 x 8 = 16 x 32 * 32 x 8, in the fragments of mma.m16n8k32; Byte: of a, uint8_t or
// int8_t. b is signed.
template <class Byte>
TERSOR_DEVICE void multiply_add_int8(int32_t (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]);

#define TERSOR_MMA_INT8(type)                                                            \
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." type                             \
               ".s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <>
TERSOR_DEVICE void multiply_add_int8<uint8_t>(int32_t (&c)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  TERSOR_MMA_INT8("u8");
#endif
}

template <>
TERSOR_DEVICE void multiply_add_int8<int8_t>(int32_t (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  TERSOR_MMA_INT8("s8");
#endif
}

#undef TERSOR_MMA_INT8

// --- arithmetic ------------------------------------------------------------------------------

// a * b + c, of each half of a word, rounded once.
template <class T>
TERSOR_DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c);

template <>
TERSOR_DEVICE uint32_t fma_pair<Half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <>
TERSOR_DEVICE uint32_t fma_pair<Bfloat>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
#if __CUDA_ARCH__ >= 800
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
  return d;
}

// Four bytes out of the eight of low and high, by the digits of `picks`, lowest first.
TERSOR_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t picks) {
  return __byte_perm(low, high, picks);
}

TERSOR_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
// To the nearest integer, ties to even.
TERSOR_DEVICE int nearest(float value) { return __float2int_rn(value); }
// a / b, rounded once, whatever the compiler's flags.
TERSOR_DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
// a * b, rounded by itself, even where a sum follows.
TERSOR_DEVICE float times(float a, float b) { return __fmul_rn(a, b); }

TERSOR_DEVICE uint16_t bits_of(float value, Half) {
  return __half_as_ushort(__float2half_rn(value));
}
TERSOR_DEVICE uint16_t bits_of(float value, Bfloat) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
TERSOR_DEVICE float value_of(uint16_t bits, Half) { return __half2float(__ushort_as_half(bits)); }
TERSOR_DEVICE float value_of(uint16_t bits, Bfloat) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

}  // namespace tersor::cuda
#endif

namespace tersor::cuda {

template <class T>
TERSOR_DEVICE uint32_t pair_of(float first, float second) {
  return bits_of(first, T{}) | static_cast<uint32_t>(bits_of(second, T{})) << 16;
}

// A scale in the dtype of the checkpoint, enum tersor_dtype.
TERSOR_DEVICE float scale_of(const uint8_t* scales, int32_t dtype, int64_t index) {
  if (dtype == TERSOR_F32) return reinterpret_cast<const float*>(scales)[index];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(scales)[index];
  return dtype == TERSOR_BF16 ? value_of(bits, Bfloat{}) : value_of(bits, Half{});
}

// 16 bits of a T in memory.
template <class T>
struct Bits {
  uint16_t bits;
};

TERSOR_DEVICE void put(float* to, float value) { *to = value; }
template <class T>
TERSOR_DEVICE void put(Bits<T>* to, float value) {
  to->bits = bits_of(value, T{});
}
TERSOR_DEVICE float value_at(const float* x, int64_t index) { return x[index]; }
template <class T>
TERSOR_DEVICE float value_at(const Bits<T>* x, int64_t index) {
  return value_of(x[index].bits, T{});
}

}  // namespace tersor::cuda
