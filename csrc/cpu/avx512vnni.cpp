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
};

}  // namespace tersor
