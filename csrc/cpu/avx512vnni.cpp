// AVX-512 with VNNI: vpdpbusd for int8 activations, FMA for 16-bit ones.
#include <immintrin.h>

#include "cpu/avx512.h"
#include "cpu/features.h"
#include "cpu/kernels.h"
#include "cpu/tile16_gemm.h"
#include "cpu/tile16_pack.h"
#include "cpu/tile16_prepare.h"

namespace {

// Codes are the unsigned operand of vpdpbusd, activations the signed one.
template <int BITS>
struct A8 : Avx512 {
  using Element = int8_t;
  using Sum = int32_t;
  using Acc = __m512i;
  static constexpr int kBits = BITS;
  static constexpr bool kSumsAlways = true;
  static constexpr int kMaxTokens = 8, kUnits = 2, kFewTokens = 4, kFewUnits = 4;

  static Acc start(const uint8_t* zeros, int32_t sum) {
    if (!zeros) return _mm512_set1_epi32(-sum * (1 << (BITS - 1)));
    return _mm512_mullo_epi32(load_bytes(zeros), _mm512_set1_epi32(-sum));
  }
  static Float to_float(Acc acc) { return _mm512_cvtepi32_ps(acc); }

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t lines, const int8_t* a,
                  int64_t stride) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t l = 0; l < lines; ++l) {
      __m512i low[NU], high[NU];
#pragma GCC unroll 8
      for (int u = 0; u < NU; ++u) {
        const __m512i line = load_line(w[u] + l * kLineBytes);
        low[u] = BITS == 4 ? _mm512_and_si512(line, nibble) : line;
        if constexpr (BITS == 4) high[u] = _mm512_and_si512(_mm512_srli_epi16(line, 4), nibble);
      }
#pragma GCC unroll 16
      for (int t = 0; t < MR; ++t) {
        const int8_t* token = a + t * stride + l * (BITS == 4 ? 8 : 4);
        const __m512i x = broadcast4(token);
#pragma GCC unroll 8
        for (int u = 0; u < NU; ++u) acc[t][u] = _mm512_dpbusd_epi32(acc[t][u], low[u], x);
        if constexpr (BITS == 4) {
          const __m512i x4 = broadcast4(token + 4);
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) acc[t][u] = _mm512_dpbusd_epi32(acc[t][u], high[u], x4);
        }
      }
    }
  }
};

template <int BITS>
struct A16 : Avx512 {
  using Element = float;
  using Sum = float;
  using Acc = __m512;
  static constexpr int kBits = BITS;
  static constexpr bool kSumsAlways = false;
  static constexpr int kMaxTokens = 12, kUnits = 2, kFewTokens = 4, kFewUnits = 4;

  // Codes enter the product less their midpoint, so the zero point has only the rest to correct.
  static Acc start(const uint8_t* zeros, float sum) { return start_float<BITS>(zeros, sum); }
  static Float to_float(Acc acc) { return acc; }

  // Column c of a line of 4-bit codes sits at bit 8c, or 8(c - 4) + 4; vpermps reads four bits.
  static __m512 column(__m512i line, int c) {
    if constexpr (BITS == 4) {
      const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
      const int shift = c < 4 ? 8 * c : 8 * (c - 4) + 4;
      return _mm512_permutexvar_ps(_mm512_srli_epi32(line, static_cast<unsigned>(shift)), values);
    } else {
      return signed_byte(line, c);
    }
  }

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t lines, const float* a,
                  int64_t stride) {
    constexpr int kColumns = BITS == 4 ? 8 : 4;
    for (int64_t l = 0; l < lines; ++l) {
      __m512i line[NU];
#pragma GCC unroll 8
      for (int u = 0; u < NU; ++u)
        line[u] =
            BITS == 4 ? load_line(w[u] + l * kLineBytes) : centre(load_line(w[u] + l * kLineBytes));
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        __m512 value[NU];
#pragma GCC unroll 8
        for (int u = 0; u < NU; ++u) value[u] = column(line[u], c);
#pragma GCC unroll 16
        for (int t = 0; t < MR; ++t) {
          const __m512 x = _mm512_set1_ps(a[t * stride + l * kColumns + c]);
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) acc[t][u] = _mm512_fmadd_ps(value[u], x, acc[t][u]);
        }
      }
    }
  }
};

// ---- Steps of 2:4 weights: each row picks its own two of four activations
// ------------------------

constexpr Table512 kPickBytes(kept_bytes), kPickFloats(kept_lanes);

constexpr int64_t kFew = 8;  // tokens, up to which picking is cheaper than expanding

// Activations are the unsigned operand here, 128 above their codes, and weights the signed one, 16
// times their value for 4 bits: a nibble at the top of its byte needs no sign extension. What the
// 128 add is taken off at the end of the chunk, once for all tokens.
template <int BITS>
struct SparseA8 : Avx512 {
  using Element = uint8_t;
  using Sum = int32_t;
  using Acc = __m512i;
  static constexpr bool kSumsAlways = false;
  static constexpr int kFewTokens = 4, kFewUnits = 4;
  static constexpr int64_t kFewest = kFew;

  static Acc start(const uint8_t*, int32_t) { return _mm512_setzero_si512(); }
  static Float to_float(Acc acc) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_set1_ps(BITS == 4 ? 0.0625f : 1.0f));
  }

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t steps,
                  const uint8_t* a, int64_t stride) {
    const __m512i top = _mm512_set1_epi8(static_cast<char>(0xf0));
    const __m512i middle = _mm512_set1_epi8(static_cast<char>(128));
    const __m512i second_four = _mm512_set1_epi32(0x04040000);
    const __m512i table = kPickBytes.load();
    __m512i off[NU] = {};
    each_four<BITS, NU>(
        w, steps,
        [&](int64_t unit, int v, const __m512i(&patterns)[NU], const uint8_t* const(&codes)[NU]) {
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) {
            __m512i code = load_line(codes[u]);
            if (BITS == 4) code = _mm512_and_si512(v % 2 ? code : _mm512_slli_epi16(code, 4), top);
            const __m512i at = _mm512_srli_epi16(patterns[u], static_cast<unsigned>(3 * v));
            const __m512i pick = _mm512_or_si512(_mm512_permutexvar_epi16(at, table), second_four);
            off[u] = _mm512_dpbusd_epi32(off[u], middle, code);
#pragma GCC unroll 4
            for (int t = 0; t < MR; ++t) {
              const __m512i x = _mm512_shuffle_epi8(broadcast8(a + t * stride + unit * 8), pick);
              acc[t][u] = _mm512_dpbusd_epi32(acc[t][u], x, code);
            }
          }
        });
    for (int u = 0; u < NU; ++u)
      for (int t = 0; t < MR; ++t) acc[t][u] = _mm512_sub_epi32(acc[t][u], off[u]);
  }
};

inline void prepare_sparse_a8(const tersor_args* a, int64_t begin, int64_t end) {
  prepare_codes(a, begin, end, a->m > kFew ? int8_t{0} : int8_t{-128});
}

template <int BITS>
struct SparseA16 : Avx512 {
  using Element = float;
  using Sum = float;
  using Acc = __m512;
  static constexpr bool kSumsAlways = false;
  static constexpr int kFewTokens = 4, kFewUnits = 4;
  static constexpr int64_t kFewest = kFew;

  static Acc start(const uint8_t*, float) { return _mm512_setzero_ps(); }
  static Float to_float(Acc acc) { return acc; }

  // Byte `at` of each row's word, as a number.
  static __m512 value(__m512i line, int unit, int at) {
    if constexpr (BITS == 4) {
      const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
      const auto shift = static_cast<unsigned>(8 * at + 4 * (unit % 2));
      return _mm512_permutexvar_ps(_mm512_srli_epi32(line, shift), values);
    } else {
      return signed_byte(line, at);
    }
  }

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t steps, const float* a,
                  int64_t stride) {
    const __m512i table = kPickFloats.load();
    each_four<BITS, NU>(
        w, steps,
        [&](int64_t unit, int v, const __m512i(&patterns)[NU], const uint8_t* const(&codes)[NU]) {
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) {
            const __m512i line = load_line(codes[u]);
#pragma GCC unroll 2
            for (int f = 0; f < 2; ++f) {
              const __m512i at =
                  _mm512_srli_epi32(patterns[u], static_cast<unsigned>(3 * v + 16 * f));
              const __m512i first = _mm512_permutexvar_epi32(at, table);
              const __m512i second = _mm512_srli_epi32(first, 2);
              const __m512 one = value(line, v, 2 * f), two = value(line, v, 2 * f + 1);
#pragma GCC unroll 4
              for (int t = 0; t < MR; ++t) {
                const __m512 x =
                    _mm512_broadcast_f32x4(_mm_loadu_ps(a + t * stride + unit * 8 + f * 4));
                acc[t][u] = _mm512_fmadd_ps(one, _mm512_permutevar_ps(x, first), acc[t][u]);
                acc[t][u] = _mm512_fmadd_ps(two, _mm512_permutevar_ps(x, second), acc[t][u]);
              }
            }
          }
        });
  }
};

// ---- 16-bit values
// ------------------------------------------------------------------------------------------

// Of lines, which only an expansion makes.
template <int32_t DTYPE>
struct Values : Avx512 {
  using Element = float;
  using Sum = float;
  using Acc = __m512;
  static constexpr int kBits = 16;
  static constexpr bool kSumsAlways = false;
  static constexpr int kMaxTokens = 12, kUnits = 2;

  static Acc start(const uint8_t*, float) { return _mm512_setzero_ps(); }
  static Float to_float(Acc acc) { return acc; }
  static Float load_scale(const void*, int32_t) { return _mm512_set1_ps(1.0f); }

  // Half j of each row's word.
  static __m512 value(__m512i line, int j) {
    if constexpr (DTYPE == TERSOR_F16)
      return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(j ? _mm512_srli_epi32(line, 16) : line));
    return _mm512_castsi512_ps(
        j ? _mm512_and_si512(line, _mm512_set1_epi32(static_cast<int>(0xffff0000)))
          : _mm512_slli_epi32(line, 16));
  }

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t lines, const float* a,
                  int64_t stride) {
    for (int64_t l = 0; l < lines; ++l) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        __m512 values[NU];
#pragma GCC unroll 8
        for (int u = 0; u < NU; ++u) values[u] = value(_mm512_load_si512(w[u] + l * kLineBytes), j);
#pragma GCC unroll 16
        for (int t = 0; t < MR; ++t) {
          const __m512 x = _mm512_set1_ps(a[t * stride + 2 * l + j]);
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) acc[t][u] = _mm512_fmadd_ps(values[u], x, acc[t][u]);
        }
      }
    }
  }
};

template <int32_t DTYPE>
struct SparseValues : Values<DTYPE> {
  using typename Values<DTYPE>::Acc;
  static constexpr int kFewTokens = 4, kFewUnits = 4;
  static constexpr int64_t kFewest = kFew;

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t steps, const float* a,
                  int64_t stride) {
    const __m512i table = kPickFloats.load();
    each_four<16, NU>(
        w, steps,
        [&](int64_t unit, int v, const __m512i(&patterns)[NU], const uint8_t* const(&values)[NU]) {
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) {
#pragma GCC unroll 2
            for (int f = 0; f < 2; ++f) {
              const __m512i line = Avx512::load_line(values[u] + f * kLineBytes);
              const __m512i at =
                  _mm512_srli_epi32(patterns[u], static_cast<unsigned>(3 * v + 16 * f));
              const __m512i first = _mm512_permutexvar_epi32(at, table);
              const __m512i second = _mm512_srli_epi32(first, 2);
              const __m512 one = SparseValues::value(line, 0), two = SparseValues::value(line, 1);
#pragma GCC unroll 4
              for (int t = 0; t < MR; ++t) {
                const __m512 x =
                    _mm512_broadcast_f32x4(_mm_loadu_ps(a + t * stride + unit * 8 + f * 4));
                acc[t][u] = _mm512_fmadd_ps(one, _mm512_permutevar_ps(x, first), acc[t][u]);
                acc[t][u] = _mm512_fmadd_ps(two, _mm512_permutevar_ps(x, second), acc[t][u]);
              }
            }
          }
        });
  }
};

}  // namespace

namespace tersor {

using namespace tile16;

const tersor_kernel kAvx512VnniKernels[] = {
    kernel("w4a8_avx512vnni", "avx512vnni", 30, avx512vnni_missing, refuses_w4a8, workspace_a8,
           prepare_a8, gemm<A8<4>>),
    kernel("w8a8_avx512vnni", "avx512vnni", 30, avx512vnni_missing, refuses_w8a8, workspace_a8,
           prepare_a8, gemm<A8<8>>),
    kernel("w4a16_avx512vnni", "avx512vnni", 30, avx512vnni_missing, refuses_w4a16, workspace_f32,
           prepare_f32, gemm<A16<4>>),
    kernel("w8a16_avx512vnni", "avx512vnni", 30, avx512vnni_missing, refuses_w8a16, workspace_f32,
           prepare_f32, gemm<A16<8>>),
    sparse_kernel("s24w4a8_avx512vnni", "avx512vnni", 35, avx512vnni_missing, sparse_refuses_w4a8,
                  workspace_a8, prepare_sparse_a8, sparse_gemm<SparseA8<4>, A8<4>, expand512<4>>),
    sparse_kernel("s24w8a8_avx512vnni", "avx512vnni", 35, avx512vnni_missing, sparse_refuses_w8a8,
                  workspace_a8, prepare_sparse_a8, sparse_gemm<SparseA8<8>, A8<8>, expand512<8>>),
    sparse_kernel("s24w4a16_avx512vnni", "avx512vnni", 35, avx512vnni_missing, sparse_refuses_w4a16,
                  workspace_f32, prepare_sparse_f32,
                  sparse_gemm<SparseA16<4>, A16<4>, expand512<4>>),
    sparse_kernel("s24w8a16_avx512vnni", "avx512vnni", 35, avx512vnni_missing, sparse_refuses_w8a16,
                  workspace_f32, prepare_sparse_f32,
                  sparse_gemm<SparseA16<8>, A16<8>, expand512<8>>),
    sparse_kernel("s24bf16_avx512vnni", "avx512vnni", 35, avx512vnni_missing, sparse_refuses_bf16,
                  workspace_f32, prepare_sparse_f32,
                  sparse_gemm<SparseValues<TERSOR_BF16>, Values<TERSOR_BF16>, expand512<16>>),
    sparse_kernel("s24f16_avx512vnni", "avx512vnni", 35, avx512vnni_missing, sparse_refuses_f16,
                  workspace_f32, prepare_sparse_f32,
                  sparse_gemm<SparseValues<TERSOR_F16>, Values<TERSOR_F16>, expand512<16>>),
};

}  // namespace tersor
