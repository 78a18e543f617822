// What the AVX-512 files share: vectors of 16 rows.
#pragma once

#include <immintrin.h>

#include "cpu/tile16_sparse.h"

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
  static __m512i broadcast8(const void* bytes) {
    int64_t word;
    __builtin_memcpy(&word, bytes, 8);
    return _mm512_set1_epi64(word);
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

// ---- Steps of "tile16s24" ----------------------------------------------------------------------

// The pattern lines of a step, each with the patterns of four units in its lowest 12 bits a half.
template <int BITS>
struct Patterns512 {
  __m512i line[4];

  explicit Patterns512(const uint8_t* step) {
    for (int q = 0; q < 3; ++q) line[q] = Avx512::load_line(step + q * kLineBytes);
    const __m512i low = _mm512_srli_epi16(line[0], 12);
    const __m512i middle = _mm512_slli_epi16(_mm512_srli_epi16(line[1], 12), 4);
    const __m512i high = _mm512_slli_epi16(_mm512_srli_epi16(line[2], 12), 8);
    line[3] = _mm512_or_si512(low, _mm512_or_si512(middle, high));
  }
};

// Tables by pattern. _mm512_permutexvar_epi32 reads four bits of an index and
// _mm512_permutexvar_epi16 five, where a pattern has three, so they are repeated.
struct alignas(64) Table512 {
  uint32_t words[16] = {};

  constexpr explicit Table512(uint32_t (*word)(int)) {
    for (int i = 0; i < 16; ++i) words[i] = word(i % 8);
  }
  constexpr explicit Table512(uint16_t (*half)(int)) {
    for (int i = 0; i < 16; ++i)
      words[i] = half(2 * i % 8) | static_cast<uint32_t>(half((2 * i + 1) % 8)) << 16;
  }
  __m512i load() const { return _mm512_load_si512(words); }
};

constexpr Table512 kExpandTable(expand_entry);

// Calls work(unit, v, patterns, codes) for every unit of 8 columns, counted through all steps: v is
// its place of four in a pattern line, which is a constant once this is unrolled; patterns[u] are
// in bits 3v of both halves, codes[u] is the line with its codes.
template <int BITS, int NU, class Work>
inline void each_four(const uint8_t* const (&w)[NU], int64_t steps, const Work& work) {
  for (int64_t s = 0; s < steps; ++s) {
    alignas(64) __m512i lines[4][NU];
    for (int u = 0; u < NU; ++u) {
      const Patterns512<BITS> patterns(w[u] + s * sparse_step_bytes(BITS));
      for (int q = 0; q < 4; ++q) lines[q][u] = patterns.line[q];
    }
    for (int64_t q = 0; q < 4; ++q) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const uint8_t* codes[NU];
        for (int u = 0; u < NU; ++u)
          codes[u] = w[u] + s * sparse_step_bytes(BITS) + sparse_codes_at(BITS, 4 * q + v);
        work(s * 16 + 4 * q + v, v, lines[q], codes);
      }
    }
  }
}

constexpr uint32_t expand_low(int pattern) { return expand_values(pattern, 0); }
constexpr uint32_t expand_high(int pattern) { return expand_values(pattern, 1); }
constexpr Table512 kExpandValues[2] = {Table512(expand_low), Table512(expand_high)};

// A row's values of a four, spread over the words of two lines.
inline void expand_values512(const uint8_t* steps, int64_t count, uint8_t* lines) {
  const __m512i rows = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  const __m512i tables[2] = {kExpandValues[0].load(), kExpandValues[1].load()};
  for (int64_t s = 0; s < count; ++s, steps += sparse_step_bytes(16)) {
    const Patterns512<16> patterns(steps);
    for (int unit = 0; unit < 16; ++unit)
      for (int f = 0; f < 2; ++f) {
        const __m512i values =
            _mm512_load_si512(steps + sparse_codes_at(16, unit) + f * kLineBytes);
        const __m512i at = _mm512_srli_epi32(patterns.line[unit / 4],
                                             static_cast<unsigned>(3 * (unit % 4) + 16 * f));
        for (const __m512i& table : tables) {
          const __m512i from = _mm512_or_si512(_mm512_permutexvar_epi32(at, table), rows);
          _mm512_store_si512(lines, _mm512_shuffle_epi8(values, from));
          lines += kLineBytes;
        }
      }
  }
}

template <int BITS>
void expand512(const uint8_t* steps, int64_t count, uint8_t* lines) {
  if constexpr (BITS == 16) return expand_values512(steps, count, lines);
  // A row's codes of a unit are the bytes of its own word within 128 bits.
  const __m512i rows = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  const __m512i odd = _mm512_add_epi8(rows, _mm512_set1_epi8(2));
  const __m512i table = kExpandTable.load();
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i centre = _mm512_set1_epi8(static_cast<char>(BITS == 4 ? 0x88 : 0x80));
  for (int64_t s = 0; s < count; ++s, steps += sparse_step_bytes(BITS)) {
    const Patterns512<BITS> patterns(steps);
    for (int unit = 0; unit < 16; ++unit) {
      __m512i codes = _mm512_load_si512(steps + sparse_codes_at(BITS, unit));
      if (BITS == 4)
        codes = _mm512_and_si512(unit % 2 ? _mm512_srli_epi16(codes, 4) : codes, nibble);
      const __m512i at =
          _mm512_srli_epi32(patterns.line[unit / 4], static_cast<unsigned>(3 * (unit % 4)));
      const __m512i first = _mm512_permutexvar_epi32(at, table);
      const __m512i second = _mm512_permutexvar_epi32(_mm512_srli_epi32(at, 16), table);
      // Or leaves a zero's 0x80 where it is.
      const __m512i low = _mm512_shuffle_epi8(codes, _mm512_or_si512(first, rows));
      const __m512i high = _mm512_shuffle_epi8(codes, _mm512_or_si512(second, odd));
      if (BITS == 4) {
        const __m512i both = _mm512_or_si512(low, _mm512_slli_epi16(high, 4));
        _mm512_store_si512(lines, _mm512_xor_si512(both, centre));
        lines += kLineBytes;
      } else {
        _mm512_store_si512(lines, _mm512_xor_si512(low, centre));
        _mm512_store_si512(lines + kLineBytes, _mm512_xor_si512(high, centre));
        lines += 2 * kLineBytes;
      }
    }
  }
}

}  // namespace
