// What the AVX-512 files share: vectors of 16 rows.
#pragma once

#include <immintrin.h>

#include "cpu/tile16.h"

namespace {

struct Avx512 {
  using Float = __m512;
  static constexpr int kLanes = 16;

  static __m512i load_line(const uint8_t* line) {
    _mm_prefetch(reinterpret_cast<const char*>(line + 1024), _MM_HINT_T0);
    return _mm512_load_si512(line);
  }
  static __m512i load_bytes(const uint8_t* bytes) {
    return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static __m512i broadcast4(const void* bytes) {
    int32_t word;
    __builtin_memcpy(&word, bytes, 4);
    return _mm512_set1_epi32(word);
  }
  // 8-bit codes less 128.
  static __m512i centre(__m512i line) {
    return _mm512_xor_si512(line, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  // Byte c of each row, as a float.
  static __m512 signed_byte(__m512i line, int c) {
    const __m512i top = _mm512_slli_epi32(line, static_cast<unsigned>(24 - 8 * c));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
  }
  // (midpoint - zero) * sum
  template <int BITS>
  static __m512 start_float(const uint8_t* zeros, float sum) {
    if (!zeros) return _mm512_setzero_ps();
    const __m512i off = _mm512_sub_epi32(_mm512_set1_epi32(1 << (BITS - 1)), load_bytes(zeros));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(off), _mm512_set1_ps(sum));
  }

  static __m512 widen(__m256i half, int32_t dtype) {
    if (dtype == TERSOR_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Float load_scale(const void* scales, int32_t dtype) {
    if (dtype == TERSOR_F32) return _mm512_load_ps(scales);
    return widen(_mm256_load_si256(static_cast<const __m256i*>(scales)), dtype);
  }
  static Float load(const float* x) { return _mm512_load_ps(x); }
  static void store(float* x, Float v) { _mm512_store_ps(x, v); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

  static void store_y(void* y, int64_t at, int32_t dtype, Float v) {
    if (dtype == TERSOR_F32) return _mm512_storeu_ps(static_cast<float*>(y) + at, v);
    auto* out = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(y) + at);
    if (dtype == TERSOR_F16)
      return _mm256_storeu_si256(out,
                                 _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    // As to_bf16: nearest even, NaN made quiet.
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(
        out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(even, nan, quiet), 16)));
  }
};

}  // namespace
