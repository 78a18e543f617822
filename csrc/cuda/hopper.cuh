// What Hopper (sm_90a) has beyond device.cuh: products of four warps that read shared memory by
// themselves and run on while the warps do other things (wgmma), copies by the memory engine (TMA),
// and barriers in shared memory that count the bytes of such copies (mbarrier).
#pragma once

#include "arguments.h"
#include "device.cuh"

#if defined(TERSOR_EMULATED)
#include "hopper.h"
#else

namespace tersor::cuda {

// --- barriers of copies ----------------------------------------------------------------------

// A phase ends when `count` arrivals have come and the bytes that they announced; phases are told
// apart by their parity, beginning with 0.
using Barrier = uint64_t;

TERSOR_DEVICE void barrier_init(Barrier* at, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count)
               : "memory");
}

// Makes initialised barriers known to the memory engine; before a sync_block.
TERSOR_DEVICE void barrier_publish() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

TERSOR_DEVICE void barrier_arrive(Barrier* at) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}

// Arrives, and announces bytes that will be copied.
TERSOR_DEVICE void barrier_expect(Barrier* at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(at)),
               "r"(bytes)
               : "memory");
}

// Until the phase with that parity has ended.
TERSOR_DEVICE void barrier_wait(Barrier* at, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(shared_address(at)),
      "r"(parity)
      : "memory");
#endif
}

// A barrier of `threads` threads of the block, by its number from 1 on.
TERSOR_DEVICE void sync_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// --- copies by the memory engine -------------------------------------------------------------

// `bytes`, a multiple of 16, from and to addresses that are multiples of 16.
TERSOR_DEVICE void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// The box of a matrix whose first element is (row, column), swizzled (see TensorMap); zeros where
// it lies outside of the matrix.
TERSOR_DEVICE void copy_box(void* shared, const TensorMap* map, int row, int column,
                            Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
#endif
}

// Orders what this thread has read of shared memory before copies that write there next. To the
// memory model the engine is a proxy of its own, which no barrier holds back by itself.
TERSOR_DEVICE void fence_reads() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// --- products of four warps ------------------------------------------------------------------

// What the tensor cores must know of a second operand in shared memory: rows of 64 16-bit elements,
// swizzled as TensorMap says, each eight rows 1 KiB after the last. at: 1 KiB aligned, or that plus
// the bytes of columns that are a multiple of 16.
TERSOR_DEVICE uint64_t operand_of(const void* at) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStride = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kStride | kUnused | (shared_address(at) & 0x3ffff) >> 4;
}

// To the compiler a product is done once multiply_begin is behind it: it might read the sums before
// products_wait, or write an operand after products_begin, though these registers are the tensor
// cores' in between. What is pinned is read before this or after it, as it stands here.
template <int kTiles>
TERSOR_DEVICE void pin(float (&sums)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
}
TERSOR_DEVICE void pin(uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// Orders what the warps have done with registers before the product that follows, whose first
// operand is `a`. Its sums are pinned where no product with them is under way.
TERSOR_DEVICE void products_begin(uint32_t (&a)[4]) {
  pin(a);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
TERSOR_DEVICE void products_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until no product is under way; their registers are free then.
template <int kTiles>
TERSOR_DEVICE void products_wait(float (&sums)[kTiles][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
  pin(sums);
}

#define TERSOR_EIGHT(d, i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define TERSOR_WGMMA_64(type)                                                             \
  asm volatile(                                                                           \
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;"                                            \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                         \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0; }"                                          \
      : TERSOR_EIGHT(d, 0), TERSOR_EIGHT(d, 8), TERSOR_EIGHT(d, 16), TERSOR_EIGHT(d, 24)  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#define TERSOR_WGMMA_128(type)                                                             \
  asm volatile(                                                                            \
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;"                                             \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                         \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "   \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "  \
      "{%64, %65, %66, %67}, %68, p, 1, 1, 0; }"                                           \
      : TERSOR_EIGHT(d, 0), TERSOR_EIGHT(d, 8), TERSOR_EIGHT(d, 16), TERSOR_EIGHT(d, 24),  \
        TERSOR_EIGHT(d, 32), TERSOR_EIGHT(d, 40), TERSOR_EIGHT(d, 48), TERSOR_EIGHT(d, 56) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

// d = a * b, or d += a * b where `add`: 64 x kTokens = 64 x 16 * 16 x kTokens of four warps, each
// with 16 rows, in the fragments of mma.m16n8k16; d[4 * i + ...]: of tokens 8 * i on.
template <class T, int kTokens>
TERSOR_DEVICE void multiply_begin(float (&sums)[kTokens / 8][4], const uint32_t (&a)[4], uint64_t b,
                                  bool add) {
  static_assert(kTokens == 64 || kTokens == 128, "the shapes that are written out");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  float* d = &sums[0][0];
  if constexpr (kTokens == 64) {
    if constexpr (T::kIsBfloat)
      TERSOR_WGMMA_64("bf16");
    else
      TERSOR_WGMMA_64("f16");
  } else {
    if constexpr (T::kIsBfloat)
      TERSOR_WGMMA_128("bf16");
    else
      TERSOR_WGMMA_128("f16");
  }
#endif
}

#undef TERSOR_EIGHT
#undef TERSOR_WGMMA_64
#undef TERSOR_WGMMA_128

// Registers between warps: of the calling warpgroup, from now on.
template <int count>
TERSOR_DEVICE void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}
template <int count>
TERSOR_DEVICE void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

}  // namespace tersor::cuda
#endif
