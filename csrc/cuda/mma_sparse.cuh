// The tensor core operation whose first operand has 2:4 zeros: mma.sp, which sm_80 was the first to
// have. In the name "ordered_metadata" because of a pattern's two columns the smaller comes first.
#pragma once

#include "device.cuh"

#if defined(TERSOR_EMULATED)
#include "sparse.h"
#else

namespace tersor::cuda {

// c += a * b, 16 x 8 = 16 x 32 * 32 x 8 of all lanes, in the fragments of mma.sp.m16n8k32. a: what
// is kept. patterns: which columns that is; read from lanes 0 and 1 of every four where kSelector
// is 0, else from lanes 2 and 3 (see layout_sparse.h).
template <class T, int kSelector>
TERSOR_DEVICE void multiply_add_sparse(float (&c)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[4], uint32_t patterns) {
#if __CUDA_ARCH__ >= 800
#define TERSOR_MMA_SP(type)                                                                      \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type       \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, " \
               "%12, %13;"                                                                       \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),    \
                 "r"(b[3]), "r"(patterns), "n"(kSelector))
  if constexpr (T::kIsBfloat)
    TERSOR_MMA_SP("bf16");
  else
    TERSOR_MMA_SP("f16");
#undef TERSOR_MMA_SP
#endif  // the host never chooses such a kernel before
}

}  // namespace tersor::cuda
#endif
