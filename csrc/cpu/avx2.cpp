// AVX2: half a tile (8 rows) in a vector.
#include <immintrin.h>

#include "cpu/features.h"
#include "cpu/kernels.h"
#include "cpu/tile16_pack.h"
#include "cpu/tile16_prepare.h"
#include "cpu/tile16_sparse.h"

namespace {

struct Avx2 {
  using Float = __m256;
  static constexpr int kLanes = 8;

  static __m256i load_line(const uint8_t* line) {
    _mm_prefetch(reinterpret_cast<const char*>(line + 1024), _MM_HINT_T0);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(line));
  }
  static __m256i load_bytes(const uint8_t* bytes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  }
  static __m256i broadcast4(const void* bytes) {
    int32_t word;
    __builtin_memcpy(&word, bytes, 4);
    return _mm256_set1_epi32(word);
  }
  static __m256 widen(__m128i half, int32_t dtype) {
    if (dtype == TERSOR_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static Float load_scale(const void* scales, int32_t dtype) {
    if (dtype == TERSOR_F32) return _mm256_load_ps(static_cast<const float*>(scales));
    return widen(_mm_load_si128(static_cast<const __m128i*>(scales)), dtype);
  }
  static Float load(const float* x) { return _mm256_load_ps(x); }
  static void store(float* x, Float v) { _mm256_store_ps(x, v); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

  static void store_y(void* y, int64_t at, int32_t dtype, Float v) {
    if (dtype == TERSOR_F32) return _mm256_storeu_ps(static_cast<float*>(y) + at, v);
    auto* out = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(y) + at);
    if (dtype == TERSOR_F16)
      return _mm_storeu_si128(out,
                              _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    // As to_bf16: nearest even, NaN made quiet.
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
    _mm_storeu_si128(out, _mm256_castsi256_si128(packed));
  }
};

template <int BITS>
struct A8 : Avx2 {
  using Element = int8_t;
  using Sum = int32_t;
  using Acc = __m256i;
  static constexpr int kBits = BITS;
  static constexpr bool kSumsAlways = true;
  static constexpr int kMaxTokens = 4, kUnits = 2, kFewTokens = 1, kFewUnits = 4;

  static Acc start(const uint8_t* zeros, int32_t sum) {
    if (!zeros) return _mm256_set1_epi32(-sum * (1 << (BITS - 1)));
    return _mm256_mullo_epi32(load_bytes(zeros), _mm256_set1_epi32(-sum));
  }
  static Float to_float(Acc acc) { return _mm256_cvtepi32_ps(acc); }

  // 4 bits: vpmaddubsw adds pairs of products in 16 bits; 15 * 128 * 2 fits, and so do a line's
  // two. 8 bits: it would saturate, so bytes are widened to 16 bits, even and odd columns apart.
  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t lines, const int8_t* a,
                  int64_t stride) {
    const __m256i mask = BITS == 4 ? _mm256_set1_epi8(15) : _mm256_set1_epi16(255);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t l = 0; l < lines; ++l) {
      __m256i first[NU], second[NU];  // low and high nibbles, or even and odd columns
#pragma GCC unroll 8
      for (int u = 0; u < NU; ++u) {
        const __m256i line = load_line(w[u] + l * kLineBytes);
        first[u] = _mm256_and_si256(line, mask);
        second[u] = _mm256_srli_epi16(line, BITS);
        if constexpr (BITS == 4) second[u] = _mm256_and_si256(second[u], mask);
      }
#pragma GCC unroll 16
      for (int t = 0; t < MR; ++t) {
        const int8_t* token = a + t * stride + l * (BITS == 4 ? 8 : 4);
        const __m256i x = broadcast4(token);
        if constexpr (BITS == 4) {
          const __m256i x4 = broadcast4(token + 4);
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) {
            const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(first[u], x),
                                                   _mm256_maddubs_epi16(second[u], x4));
            acc[t][u] = _mm256_add_epi32(acc[t][u], _mm256_madd_epi16(pairs, ones));
          }
        } else {
          const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
          const __m256i odd = _mm256_srai_epi16(x, 8);
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) {
            const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(first[u], even),
                                                 _mm256_madd_epi16(second[u], odd));
            acc[t][u] = _mm256_add_epi32(acc[t][u], sum);
          }
        }
      }
    }
  }
};

template <int BITS>
struct A16 : Avx2 {
  using Element = float;
  using Sum = float;
  using Acc = __m256;
  static constexpr int kBits = BITS;
  static constexpr bool kSumsAlways = false;
  static constexpr int kMaxTokens = 6, kUnits = 2, kFewTokens = 2, kFewUnits = 4;

  // Codes enter the product less their midpoint, so the zero point has only the rest to correct.
  static Acc start(const uint8_t* zeros, float sum) {
    if (!zeros) return _mm256_setzero_ps();
    const __m256i off = _mm256_sub_epi32(_mm256_set1_epi32(1 << (BITS - 1)), load_bytes(zeros));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(off), _mm256_set1_ps(sum));
  }
  static Float to_float(Acc acc) { return acc; }

  // Moves column c's code to the top bits, centred, and brings it down with its sign.
  static __m256 column(__m256i line, int c) {
    const int at = BITS == 4 ? (c < 4 ? 8 * c : 8 * (c - 4) + 4) : 8 * c;
    const __m256i top = _mm256_slli_epi32(line, 32 - BITS - at);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 32 - BITS));
  }

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t lines, const float* a,
                  int64_t stride) {
    constexpr int kColumns = BITS == 4 ? 8 : 4;
    // Flipping the top bit of an unsigned code makes it the two's complement of code - midpoint.
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(BITS == 4 ? 0x88 : 0x80));
    for (int64_t l = 0; l < lines; ++l) {
      __m256i line[NU];
#pragma GCC unroll 8
      for (int u = 0; u < NU; ++u)
        line[u] = _mm256_xor_si256(load_line(w[u] + l * kLineBytes), flip);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        __m256 value[NU];
#pragma GCC unroll 8
        for (int u = 0; u < NU; ++u) value[u] = column(line[u], c);
#pragma GCC unroll 16
        for (int t = 0; t < MR; ++t) {
          const __m256 x = _mm256_set1_ps(a[t * stride + l * kColumns + c]);
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) acc[t][u] = _mm256_fmadd_ps(value[u], x, acc[t][u]);
        }
      }
    }
  }
};

// ---- 16-bit values
// ------------------------------------------------------------------------------------------

template <int32_t DTYPE>
struct Values : Avx2 {
  using Element = float;
  using Sum = float;
  using Acc = __m256;
  static constexpr int kBits = 16;
  static constexpr bool kSumsAlways = false;
  static constexpr int kMaxTokens = 6, kUnits = 2;

  static Acc start(const uint8_t*, float) { return _mm256_setzero_ps(); }
  static Float to_float(Acc acc) { return acc; }
  static Float load_scale(const void*, int32_t) { return _mm256_set1_ps(1.0f); }

  // Half j of each row's word.
  static __m256 value(__m256i line, int j) {
    const __m256i low = j ? _mm256_srli_epi32(line, 16) : line;
    if constexpr (DTYPE == TERSOR_F16) {
      const __m256i halves = _mm256_and_si256(low, _mm256_set1_epi32(0xffff));
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
      return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(low, 16));
  }

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t lines, const float* a,
                  int64_t stride) {
    for (int64_t l = 0; l < lines; ++l) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        __m256 values[NU];
#pragma GCC unroll 8
        for (int u = 0; u < NU; ++u)
          values[u] =
              value(_mm256_load_si256(reinterpret_cast<const __m256i*>(w[u] + l * kLineBytes)), j);
#pragma GCC unroll 16
        for (int t = 0; t < MR; ++t) {
          const __m256 x = _mm256_set1_ps(a[t * stride + 2 * l + j]);
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) acc[t][u] = _mm256_fmadd_ps(values[u], x, acc[t][u]);
        }
      }
    }
  }
};

// ---- Steps of 2:4 weights: each row picks its own two of four activations
// ------------------------------------------------------------------------

// The pattern lines of a step, each with the patterns of four units in its lowest 12 bits a half.
struct Patterns256 {
  __m256i line[4];

  explicit Patterns256(const uint8_t* step) {
    for (int q = 0; q < 3; ++q) line[q] = Avx2::load_line(step + q * kLineBytes);
    line[3] =
        _mm256_or_si256(_mm256_srli_epi16(line[0], 12),
                        _mm256_or_si256(_mm256_slli_epi16(_mm256_srli_epi16(line[1], 12), 4),
                                        _mm256_slli_epi16(_mm256_srli_epi16(line[2], 12), 8)));
  }
};

// Tables by pattern, for _mm256_permutevar8x32_epi32, which reads three bits of an index.
struct alignas(32) Table256 {
  uint32_t words[8] = {};

  constexpr explicit Table256(uint32_t (*word)(int)) {
    for (int p = 0; p < 8; ++p) words[p] = word(p);
  }
  __m256i load() const { return _mm256_load_si256(reinterpret_cast<const __m256i*>(words)); }
};

// Which bytes of a unit's eight activations the codes of its first, then of its second four meet.
constexpr uint32_t kept_first(int p) { return kept_bytes(p); }
constexpr uint32_t kept_second(int p) { return (kept_bytes(p) + 0x0404u) << 16; }
constexpr Table256 kPickFirst(kept_first), kPickSecond(kept_second), kPickFloats(kept_lanes);

inline __m256i broadcast_unit(const void* bytes) {
  int64_t word;
  __builtin_memcpy(&word, bytes, 8);
  return _mm256_set1_epi64x(word);
}

constexpr int64_t kFew = 8;  // tokens, up to which picking is cheaper than expanding

template <int BITS>
struct SparseA8 : Avx2 {
  // 4 bits: activations are the unsigned operand of vpmaddubsw, 128 above their codes, and weights
  // the signed one; what the 128 add is taken off before it can add up. 8 bits would saturate, so
  // both are widened to 16 bits, even and odd bytes apart.
  using Element = uint8_t;
  using Sum = int32_t;
  using Acc = __m256i;
  static constexpr bool kSumsAlways = false;
  static constexpr int kFewTokens = 4, kFewUnits = 2;
  static constexpr int64_t kFewest = kFew;

  static Acc start(const uint8_t*, int32_t) { return _mm256_setzero_si256(); }
  static Float to_float(Acc acc) { return _mm256_cvtepi32_ps(acc); }

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t steps,
                  const uint8_t* a, int64_t stride) {
    for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 4
      for (int u = 0; u < NU; ++u) {
        const uint8_t* step = w[u] + s * sparse_step_bytes(BITS);
        const Patterns256 patterns(step);
        for (int q = 0; q < 4; ++q) {
          __m256i sum[MR];
          four_units<MR>(sum, step, q, patterns.line[q], a + s * kSparseColumns + q * 32, stride);
#pragma GCC unroll 4
          for (int t = 0; t < MR; ++t) acc[t][u] = _mm256_add_epi32(acc[t][u], sum[t]);
        }
      }
  }

  // The sums of units 4q to 4q + 3 of a step.
  template <int MR>
  static void four_units(__m256i (&sum)[MR], const uint8_t* step, int q, __m256i patterns,
                         const uint8_t* a, int64_t stride) {
    const __m256i first = kPickFirst.load(), second = kPickSecond.load();
    const __m256i values = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i middle = _mm256_set1_epi8(static_cast<char>(128));
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i off = _mm256_setzero_si256();
    for (int t = 0; t < MR; ++t) sum[t] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      __m256i code = load_line(step + sparse_codes_at(BITS, 4 * q + v));
      const __m256i at = _mm256_srli_epi32(patterns, 3 * v);
      const __m256i pick =
          _mm256_or_si256(_mm256_permutevar8x32_epi32(first, at),
                          _mm256_permutevar8x32_epi32(second, _mm256_srli_epi32(at, 16)));
      if constexpr (BITS == 4) {
        code = _mm256_and_si256(v % 2 ? _mm256_srli_epi16(code, 4) : code, nibble);
        code = _mm256_shuffle_epi8(values, code);
        off = _mm256_add_epi16(off, _mm256_maddubs_epi16(middle, code));
#pragma GCC unroll 4
        for (int t = 0; t < MR; ++t) {
          const __m256i x = _mm256_shuffle_epi8(broadcast_unit(a + t * stride + v * 8), pick);
          sum[t] = _mm256_add_epi16(sum[t], _mm256_maddubs_epi16(x, code));
        }
      } else {
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(code, 8), 8);
        const __m256i odd = _mm256_srai_epi16(code, 8);
#pragma GCC unroll 4
        for (int t = 0; t < MR; ++t) {
          const __m256i x = _mm256_shuffle_epi8(broadcast_unit(a + t * stride + v * 8), pick);
          const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
          sum[t] = _mm256_add_epi32(
              sum[t], _mm256_add_epi32(_mm256_madd_epi16(even, x_even),
                                       _mm256_madd_epi16(odd, _mm256_srai_epi16(x, 8))));
        }
      }
    }
    // Four units are within 16 bits: 4 * 2 * 8 * 255, and 4 * 2 * 8 * 128 once the 128 are off.
    if constexpr (BITS == 4)
      for (int t = 0; t < MR; ++t) sum[t] = _mm256_madd_epi16(_mm256_sub_epi16(sum[t], off), ones);
  }
};

template <int BITS>
void prepare_sparse_a8(const tersor_args* a, int64_t begin, int64_t end) {
  prepare_codes(a, begin, end, BITS == 8 || a->m > kFew ? int8_t{0} : int8_t{-128});
}

// Numbers that a four's word holds: byte or nibble `at` of codes, or half `at` of values.
template <int BITS>
struct SparseA16 : A16<BITS> {
  static __m256 value(__m256i line, int unit, int at) {
    const int shift = BITS == 4 ? 28 - 8 * at - 4 * (unit % 2) : 24 - 8 * at;
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(line, shift), 32 - BITS));
  }
};

// Op: SparseA16<4>, SparseA16<8> or Values.
template <class Op>
struct Picking : Op {
  using typename Op::Acc;
  static constexpr int kFewTokens = 4, kFewUnits = 2;
  static constexpr int64_t kFewest = kFew;

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t steps, const float* a,
                  int64_t stride) {
    constexpr int kBits = Op::kBits;
    const __m256i table = kPickFloats.load();
    for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 4
      for (int u = 0; u < NU; ++u) {
        const uint8_t* step = w[u] + s * sparse_step_bytes(kBits);
        const Patterns256 patterns(step);
        for (int q = 0; q < 4; ++q)
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            const uint8_t* codes = step + sparse_codes_at(kBits, 4 * q + v);
            __m256i line = Avx2::load_line(codes);
#pragma GCC unroll 2
            for (int f = 0; f < 2; ++f) {
              if (kBits == 16 && f) line = Avx2::load_line(codes + kLineBytes);
              const __m256i first = _mm256_permutevar8x32_epi32(
                  table, _mm256_srli_epi32(patterns.line[q], 3 * v + 16 * f));
              const __m256i second = _mm256_srli_epi32(first, 2);
              const __m256 one = number(line, v, f, 0), two = number(line, v, f, 1);
#pragma GCC unroll 4
              for (int t = 0; t < MR; ++t) {
                const __m256 x = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(
                    a + t * stride + s * kSparseColumns + (4 * q + v) * 8 + f * 4));
                acc[t][u] = _mm256_fmadd_ps(one, _mm256_permutevar_ps(x, first), acc[t][u]);
                acc[t][u] = _mm256_fmadd_ps(two, _mm256_permutevar_ps(x, second), acc[t][u]);
              }
            }
          }
      }
  }

  static __m256 number(__m256i line, int unit, int f, int j) {
    if constexpr (Op::kBits == 16)
      return Op::value(line, j);
    else
      return Op::value(line, unit, 2 * f + j);
  }
};

// ---- Steps of 2:4 weights into dense lines
// -------------------------------------------------------

constexpr uint32_t expand_low(int pattern) { return expand_values(pattern, 0); }
constexpr uint32_t expand_high(int pattern) { return expand_values(pattern, 1); }
constexpr Table256 kExpandTable(expand_entry), kExpandValues[2] = {Table256(expand_low),
                                                                   Table256(expand_high)};

template <int BITS>
void expand(const uint8_t* steps, int64_t count, uint8_t* lines) {
  const __m256i rows = _mm256_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0, 0x0c0c0c0c,
                                        0x08080808, 0x04040404, 0);
  const __m256i odd = _mm256_add_epi8(rows, _mm256_set1_epi8(2));
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i centre = _mm256_set1_epi8(static_cast<char>(BITS == 4 ? 0x88 : 0x80));
  const __m256i table = kExpandTable.load();
  const auto store = [](uint8_t* to, __m256i v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), v);
  };
  for (int64_t s = 0; s < count; ++s, steps += sparse_step_bytes(BITS)) {
    for (int64_t half = 0; half < kLineBytes; half += 32) {  // 8 rows
      const uint8_t* step = steps + half;
      const Patterns256 patterns(step);
      uint8_t* out = lines + half;
      for (int unit = 0; unit < 16; ++unit) {
        __m256i codes = Avx2::load_line(step + sparse_codes_at(BITS, unit));
        const __m256i first = _mm256_srli_epi32(patterns.line[unit / 4], 3 * (unit % 4));
        const __m256i second = _mm256_srli_epi32(first, 16);
        if constexpr (BITS == 16) {
          for (int f = 0; f < 2; ++f, out += 2 * kLineBytes) {
            const __m256i values =
                f ? Avx2::load_line(step + sparse_codes_at(16, unit) + kLineBytes) : codes;
            for (int h = 0; h < 2; ++h) {
              const __m256i from =
                  _mm256_permutevar8x32_epi32(kExpandValues[h].load(), f ? second : first);
              store(out + h * kLineBytes, _mm256_shuffle_epi8(values, _mm256_or_si256(from, rows)));
            }
          }
          continue;
        }
        if (BITS == 4)
          codes = _mm256_and_si256(unit % 2 ? _mm256_srli_epi16(codes, 4) : codes, nibble);
        // Or leaves a zero's 0x80 where it is.
        const __m256i low = _mm256_shuffle_epi8(
            codes, _mm256_or_si256(_mm256_permutevar8x32_epi32(table, first), rows));
        const __m256i high = _mm256_shuffle_epi8(
            codes, _mm256_or_si256(_mm256_permutevar8x32_epi32(table, second), odd));
        if (BITS == 4) {
          const __m256i both = _mm256_or_si256(low, _mm256_slli_epi16(high, 4));
          store(out, _mm256_xor_si256(both, centre));
          out += kLineBytes;
        } else {
          store(out, _mm256_xor_si256(low, centre));
          store(out + kLineBytes, _mm256_xor_si256(high, centre));
          out += 2 * kLineBytes;
        }
      }
    }
    lines += kSparseColumns / line_columns(BITS) * kLineBytes;
  }
}

}  // namespace

namespace tersor {

using namespace tile16;

const tersor_kernel kAvx2Kernels[] = {
    kernel("w4a8_avx2", "avx2", 20, avx2_missing, refuses_w4a8, workspace_a8, prepare_a8,
           gemm<A8<4>>),
    kernel("w8a8_avx2", "avx2", 20, avx2_missing, refuses_w8a8, workspace_a8, prepare_a8,
           gemm<A8<8>>),
    kernel("w4a16_avx2", "avx2", 20, avx2_missing, refuses_w4a16, workspace_f32, prepare_f32,
           gemm<A16<4>>),
    kernel("w8a16_avx2", "avx2", 20, avx2_missing, refuses_w8a16, workspace_f32, prepare_f32,
           gemm<A16<8>>),
    sparse_kernel("s24w4a8_avx2", "avx2", 25, avx2_missing, sparse_refuses_w4a8, workspace_a8,
                  prepare_sparse_a8<4>, sparse_gemm<SparseA8<4>, A8<4>, expand<4>>),
    sparse_kernel("s24w8a8_avx2", "avx2", 25, avx2_missing, sparse_refuses_w8a8, workspace_a8,
                  prepare_sparse_a8<8>, sparse_gemm<SparseA8<8>, A8<8>, expand<8>>),
    sparse_kernel("s24w4a16_avx2", "avx2", 25, avx2_missing, sparse_refuses_w4a16, workspace_f32,
                  prepare_sparse_f32, sparse_gemm<Picking<SparseA16<4>>, A16<4>, expand<4>>),
    sparse_kernel("s24w8a16_avx2", "avx2", 25, avx2_missing, sparse_refuses_w8a16, workspace_f32,
                  prepare_sparse_f32, sparse_gemm<Picking<SparseA16<8>>, A16<8>, expand<8>>),
    sparse_kernel("s24bf16_avx2", "avx2", 25, avx2_missing, sparse_refuses_bf16, workspace_f32,
                  prepare_sparse_f32,
                  sparse_gemm<Picking<Values<TERSOR_BF16>>, Values<TERSOR_BF16>, expand<16>>),
    sparse_kernel("s24f16_avx2", "avx2", 25, avx2_missing, sparse_refuses_f16, workspace_f32,
                  prepare_sparse_f32,
                  sparse_gemm<Picking<Values<TERSOR_F16>>, Values<TERSOR_F16>, expand<16>>),
};

}  // namespace tersor
