/* The contract between tersor and a kernel for y = x * dequantize(W)^T + bias.
 *
 * Plain C, so that a kernel can come from any compiler and any binding library: a package offers a
 * tersor_kernel_table through the entry point "tersor.kernels" as a PyCapsule named
 * TERSOR_KERNEL_CAPSULE (see CONTRIBUTING.md). The kernels in this tree use the same structs.
 *
 * A kernel is stateless: it allocates nothing, starts no thread and never throws. The caller owns
 * the memory and the threads, and has checked every argument against the documented bounds.
 *
 * Shape letters: m tokens, n output features, k input features, g columns that share a scale.
 */
#ifndef TERSOR_KERNEL_H
#define TERSOR_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TERSOR_KERNEL_ABI 1u
#define TERSOR_KERNEL_CAPSULE "tersor.kernels.v1"
#define TERSOR_ALIGN 64 /* bytes: alignment of packed weights and of the workspace */

enum tersor_dtype { TERSOR_F32 = 0, TERSOR_BF16 = 1, TERSOR_F16 = 2 };

/* How the activations enter the product: as they are, or as int8: code = x / scale rounded to
 * nearest even, from -128 to 127, as compressed-tensors defines it. The scale is that of the call
 * (static), or else one for each token (dynamic), its absmax / 127.5. */
enum tersor_activation { TERSOR_A16 = 0, TERSOR_A8 = 1 };

/* What is fixed when a weight is loaded. */
typedef struct tersor_spec {
  int64_t n, k, g;     /* g divides k; g == k means one scale per row */
  int32_t bits;        /* 4 or 8: the width that codes are stored in; 16: the values themselves,
                          bfloat16 or float16, without scales, g == k, always with a pattern */
  int32_t asymmetric;  /* 0: the zero point is 1 << (bits - 1); 1: zeros are given */
  int32_t scale_dtype; /* enum tersor_dtype, as in the checkpoint: nothing is rounded at load;
                          where bits is 16, of the values */
  int32_t activation;  /* enum tersor_activation */
  int32_t kept, of;    /* of > 0: of every `of` columns from a multiple of it on, at most `kept`
                          codes are not the zero point; 0 and 0: nothing is known of zeros */
} tersor_spec;

/* A weight in portable order: dequantize(W)[i, j] = (codes[i, j] - zero) * scale,
 * zero and scale being those of row i and group j / g. */
typedef struct tersor_view {
  uint8_t* codes; /* [n, k], one code a byte, each below 1 << bits; values, where bits is 16 */
  void* scales;   /* [n, k / g] of scale_dtype, or NULL where bits is 16 */
  uint8_t* zeros; /* [n, k / g], or NULL when symmetric */
} tersor_view;

/* One call. Rows of x and y are contiguous; ldx and ldy count elements. x and y share a dtype. */
typedef struct tersor_args {
  tersor_spec spec;
  int64_t m;
  const void* packed; /* packed_bytes, aligned */
  const void* x;      /* [m, k], row stride ldx */
  void* y;            /* [m, n], row stride ldy */
  int64_t ldx, ldy;
  int32_t dtype;        /* enum tersor_dtype of x and y */
  const float* bias;    /* [n] or NULL */
  const float* x_scale; /* [1], of all tokens: positive and finite; or NULL. With TERSOR_A8 alone */
  void* workspace;      /* workspace_bytes, aligned, shared by all threads of the call */
} tersor_args;

typedef struct tersor_kernel {
  const char* name;    /* "w4a8_avx2" */
  const char* isa;     /* "scalar", "avx2", ...; TERSOR_ISA admits only kernels of that isa */
  const char* layout;  /* kernels with the same layout can run the same packed weight;
                          at most 31 characters */
  int32_t priority;    /* the highest that serves a request wins; the tree uses 0 to 99 */
  int64_t column_step; /* gemm is called with column ranges that start at multiples of this */

  /* NULL if this machine can run the kernel, else the reason why not. */
  const char* (*unavailable)(void);
  /* NULL if the kernel serves this weight at this m and dtype, else the reason why not.
   * Called with m = 0 when a weight is loaded: "for any m and dtype". */
  const char* (*refuses)(const tersor_spec*, int64_t m, int32_t dtype);

  size_t (*packed_bytes)(const tersor_spec*);
  /* Portable order to kernel order and back, for rows [begin, end) of the weight, begin at a
   * multiple of column_step. unpack is the exact inverse of pack. */
  void (*pack)(const tersor_spec*, const tersor_view*, void* packed, int64_t begin, int64_t end);
  void (*unpack)(const tersor_spec*, const void* packed, const tersor_view*, int64_t begin,
                 int64_t end);

  size_t (*workspace_bytes)(const tersor_spec*, int64_t m, int32_t dtype);
  /* First stage: tokens [begin, end) of x into the workspace. May be NULL. */
  void (*prepare)(const tersor_args*, int64_t begin, int64_t end);
  /* Second stage: columns [begin, end) of y, for all m tokens. The result must not depend on how
   * the columns were divided. A token that holds NaN or infinity gives a row of y without a finite
   * value, and changes no other row. */
  void (*gemm)(const tersor_args*, int64_t begin, int64_t end);
} tersor_kernel;

typedef struct tersor_kernel_table {
  uint32_t abi;         /* TERSOR_KERNEL_ABI */
  uint32_t kernel_size; /* sizeof(tersor_kernel) */
  uint32_t count;
  const tersor_kernel* kernels; /* lives as long as the process */
} tersor_kernel_table;

#ifdef __cplusplus
}
#endif
#endif
