// AVX-512 with BF16: vdpbf16ps for bfloat16 activations. Codes less their midpoint are integers of
// at most 8 bits, exact in bfloat16; products are exact and sums are in float.
#include <immintrin.h>

#include "cpu/avx512.h"
#include "cpu/features.h"
#include "cpu/kernels.h"
#include "cpu/tile16_gemm.h"
#include "cpu/tile16_pack.h"
#include "cpu/tile16_prepare.h"

namespace {

template <int BITS>
struct BF16 : Avx512 {
  using Element = uint16_t;
  using Sum = float;
  using Acc = __m512;
  static constexpr int kBits = BITS;
  static constexpr bool kSumsAlways = false;
  static constexpr int kMaxTokens = 12, kUnits = 2, kFewTokens = 4, kFewUnits = 4;
  static constexpr int kColumns = BITS == 4 ? 8 : 4;
  static constexpr int kPairs = kColumns / 2;

  static Acc start(const uint8_t* zeros, float sum) { return start_float<BITS>(zeros, sum); }
  static Float to_float(Acc acc) { return acc; }

  // Pair i of a line, as two bfloat16 in each 32-bit lane. 4 bits: vpermw reads the low bits of
  // each 16-bit half, so shifting by 4i brings columns i' and i' + 2 under it, in the order that
  // kPairColumns gives; of the five bits it reads the fifth is another column's, hence a table of
  // 16 values twice. 8 bits: columns 2i and 2i + 1, a float's upper half being its bfloat16.
  static __m512bh pair(__m512i line, int i) {
    if constexpr (BITS == 4) {
      const __m512i values = _mm512_broadcast_i64x4(_mm256_setr_epi16(
          static_cast<short>(0xc100), static_cast<short>(0xc0e0), static_cast<short>(0xc0c0),
          static_cast<short>(0xc0a0), static_cast<short>(0xc080), static_cast<short>(0xc040),
          static_cast<short>(0xc000), static_cast<short>(0xbf80), 0x0000, 0x3f80, 0x4000, 0x4040,
          0x4080, 0x40a0, 0x40c0, 0x40e0));  // -8 ... 7
      const __m512i index = _mm512_srli_epi32(line, static_cast<unsigned>(4 * i));
      return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, values));
    } else {
      const __m512i even = _mm512_castps_si512(signed_byte(line, 2 * i));
      const __m512i odd = _mm512_castps_si512(signed_byte(line, 2 * i + 1));
      return reinterpret_cast<__m512bh>(
          _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even, 16), odd));
    }
  }

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t lines,
                  const uint16_t* a, int64_t stride) {
    for (int64_t l = 0; l < lines; ++l) {
      __m512i line[NU];
#pragma GCC unroll 8
      for (int u = 0; u < NU; ++u)
        line[u] =
            BITS == 4 ? load_line(w[u] + l * kLineBytes) : centre(load_line(w[u] + l * kLineBytes));
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        __m512bh value[NU];
#pragma GCC unroll 8
        for (int u = 0; u < NU; ++u) value[u] = pair(line[u], i);
#pragma GCC unroll 16
        for (int t = 0; t < MR; ++t) {
          const auto x =
              reinterpret_cast<__m512bh>(broadcast4(a + t * stride + l * kColumns + 2 * i));
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) acc[t][u] = _mm512_dpbf16_ps(acc[t][u], value[u], x);
        }
      }
    }
  }
};

// The columns of a line of 4-bit codes in the order in which pair() brings them up.
constexpr int kPairColumns[8] = {0, 2, 4, 6, 1, 3, 5, 7};

template <int BITS>
void prepare_bf16(const tersor_args* a, int64_t begin, int64_t end) {
  const tersor_spec& s = a->spec;
  const Prepared p(s, a->m, 2);
  auto* work = static_cast<uint8_t*>(a->workspace);
  for (int64_t token = begin; token < end; ++token) {
    const auto* x = static_cast<const uint16_t*>(token_of(*a, token));
    auto* out = reinterpret_cast<uint16_t*>(work + token * p.stride);
    int64_t i = 0;
    if constexpr (BITS == 4) {
      for (; i + 8 <= s.k; i += 8)
        for (int j = 0; j < 8; ++j) out[i + j] = x[i + kPairColumns[j]];
      if (i < s.k) {
        for (int j = 0; j < 8; ++j) {
          const int64_t column = i + kPairColumns[j];
          out[i + j] = column < s.k ? x[column] : uint16_t{0};
        }
        i += 8;
      }
    } else {
      for (; i < s.k; ++i) out[i] = x[i];
    }
    for (; i < p.stride / 2; ++i) out[i] = 0;
    if (s.asymmetric) {
      auto* sums = reinterpret_cast<float*>(work + p.sums_at) + token * p.chunks;
      for (int64_t c = 0; c < p.chunks; ++c)
        sums[c] = sum_chunk<LoadBF16>(x, p.chunk_begin(s, c), p.chunk_end(s, c));
    }
  }
}

constexpr uint16_t pair_bytes(int column) {
  return static_cast<uint16_t>(2 * column | (2 * column + 1) << 8);
}
constexpr uint16_t first_pair(int p) { return pair_bytes(kKeptColumns[p][0]); }
constexpr uint16_t second_pair(int p) { return pair_bytes(kKeptColumns[p][1]); }

// A prepared activation of a few tokens takes as much as four: a unit of 8 columns is
// two tables, for the first and for the second code of a four, of what the code meets by the four's
// pattern: | four 2i: patterns 0 to 7 | four 2i + 1: patterns 0 to 7 |. A row looks its own up.
struct Picked {
  uint16_t values[4];
};

// 2:4: each row picks its own two of four activations, of both fours of a unit at a time.
template <int BITS>
struct SparseBF16 : Avx512 {
  using Element = Picked;
  using Sum = float;
  using Acc = __m512;
  static constexpr bool kSumsAlways = false;
  static constexpr int kFewTokens = 4, kFewUnits = 4;
  static constexpr int64_t kFewest = tersor::tile16::kPickedTokens;

  static Acc start(const uint8_t*, float) { return _mm512_setzero_ps(); }
  static Float to_float(Acc acc) { return acc; }

  // Code `j` of both fours as a pair of bfloat16.
  static __m512bh pair(__m512i line, int unit, int j) {
    if constexpr (BITS == 4) {
      const __m512i values = _mm512_broadcast_i64x4(_mm256_setr_epi16(
          0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
          static_cast<short>(0xc100), static_cast<short>(0xc0e0), static_cast<short>(0xc0c0),
          static_cast<short>(0xc0a0), static_cast<short>(0xc080), static_cast<short>(0xc040),
          static_cast<short>(0xc000), static_cast<short>(0xbf80)));  // 0 ... 7, -8 ... -1
      const auto shift = static_cast<unsigned>(8 * j + 4 * (unit % 2));
      return reinterpret_cast<__m512bh>(
          _mm512_permutexvar_epi16(_mm512_srli_epi16(line, shift), values));
    } else {
      const __m512i first = _mm512_castps_si512(signed_byte(line, j));
      const __m512i second = _mm512_castps_si512(signed_byte(line, j + 2));
      return reinterpret_cast<__m512bh>(
          _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(first, 16), second));
    }
  }

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t steps, const Picked* a,
                  int64_t stride) {
    const __m512i pattern = _mm512_set1_epi16(7), second_four = _mm512_set1_epi32(0x00080000);
    each_four<BITS, NU>(
        w, steps,
        [&](int64_t unit, int v, const __m512i(&patterns)[NU], const uint8_t* const(&codes)[NU]) {
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) {
            const __m512i line = load_line(codes[u]);
            constexpr int kAndOr = 0xea;  // (a & b) | c
            const __m512i at = _mm512_ternarylogic_epi32(
                _mm512_srli_epi32(patterns[u], static_cast<unsigned>(3 * v)), pattern, second_four,
                kAndOr);
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
              const __m512bh value = pair(line, v, j);
#pragma GCC unroll 4
              for (int t = 0; t < MR; ++t) {
                const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256(
                    reinterpret_cast<const __m256i*>(a + t * stride + unit * 8 + 4 * j)));
                acc[t][u] = _mm512_dpbf16_ps(
                    acc[t][u], value,
                    reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(at, table)));
              }
            }
          }
        });
  }
};

// By pattern, the bytes of a four's first and second activation.
alignas(16) constexpr uint16_t kPickPairs[2][8] = {
    {first_pair(0), first_pair(1), first_pair(2), first_pair(3), first_pair(4), first_pair(5),
     first_pair(6), first_pair(7)},
    {second_pair(0), second_pair(1), second_pair(2), second_pair(3), second_pair(4), second_pair(5),
     second_pair(6), second_pair(7)}};

inline void prepare_picked(const tersor_args* a, int64_t begin, int64_t end) {
  const int64_t k = a->spec.k;
  const Prepared p(a->spec, a->m, sizeof(Picked));
  const __m128i picks[2] = {_mm_load_si128(reinterpret_cast<const __m128i*>(kPickPairs[0])),
                            _mm_load_si128(reinterpret_cast<const __m128i*>(kPickPairs[1]))};
  for (int64_t token = begin; token < end; ++token) {
    const auto* x = static_cast<const uint16_t*>(token_of(*a, token));
    auto* out = static_cast<uint8_t*>(a->workspace) + token * p.stride;
    const bool spoilt = is_spoilt(x, k);
    for (int64_t i = 0; i < k; i += 4) {  // k is a multiple of 128
      uint8_t* tables = out + i / 8 * 64 + i % 8 * 4;
      const __m128i four = spoilt ? _mm_set1_epi16(0x7fc0)
                                  : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + i));
      for (int j = 0; j < 2; ++j)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(tables + 32 * j),
                         _mm_shuffle_epi8(four, picks[j]));
    }
  }
}

// 16-bit values are pairs as they are.
struct Values : Avx512 {
  using Element = uint16_t;
  using Sum = float;
  using Acc = __m512;
  static constexpr int kBits = 16;
  static constexpr bool kSumsAlways = false;
  static constexpr int kMaxTokens = 12, kUnits = 2;

  static Acc start(const uint8_t*, float) { return _mm512_setzero_ps(); }
  static Float to_float(Acc acc) { return acc; }
  static Float load_scale(const void*, int32_t) { return _mm512_set1_ps(1.0f); }

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t lines,
                  const uint16_t* a, int64_t stride) {
    for (int64_t l = 0; l < lines; ++l) {
      __m512bh pairs[NU];
#pragma GCC unroll 8
      for (int u = 0; u < NU; ++u)
        pairs[u] = reinterpret_cast<__m512bh>(_mm512_load_si512(w[u] + l * kLineBytes));
#pragma GCC unroll 16
      for (int t = 0; t < MR; ++t) {
        const auto x = reinterpret_cast<__m512bh>(broadcast4(a + t * stride + 2 * l));
#pragma GCC unroll 8
        for (int u = 0; u < NU; ++u) acc[t][u] = _mm512_dpbf16_ps(acc[t][u], pairs[u], x);
      }
    }
  }
};

constexpr uint32_t both_pairs(int p) {
  return first_pair(p) | static_cast<uint32_t>(second_pair(p)) << 16;
}
constexpr Table512 kPickBoth(both_pairs);

struct SparseValues : Values {
  static constexpr int kFewTokens = 4, kFewUnits = 4;
  static constexpr int64_t kFewest = 8;

  template <int MR, int NU>
  static void dot(Acc (&acc)[MR][NU], const uint8_t* const (&w)[NU], int64_t steps,
                  const uint16_t* a, int64_t stride) {
    const __m512i table = kPickBoth.load();
    each_four<16, NU>(
        w, steps,
        [&](int64_t unit, int v, const __m512i(&patterns)[NU], const uint8_t* const(&values)[NU]) {
#pragma GCC unroll 8
          for (int u = 0; u < NU; ++u) {
#pragma GCC unroll 2
            for (int f = 0; f < 2; ++f) {
              const auto pair = reinterpret_cast<__m512bh>(load_line(values[u] + f * kLineBytes));
              const __m512i pick = _mm512_permutexvar_epi32(
                  _mm512_srli_epi32(patterns[u], static_cast<unsigned>(3 * v + 16 * f)), table);
#pragma GCC unroll 4
              for (int t = 0; t < MR; ++t) {
                const __m512i x = broadcast8(a + t * stride + unit * 8 + f * 4);
                acc[t][u] = _mm512_dpbf16_ps(
                    acc[t][u], pair, reinterpret_cast<__m512bh>(_mm512_shuffle_epi8(x, pick)));
              }
            }
          }
        });
  }
};

// In the order that the inner product of so many tokens reads.
template <int BITS>
void prepare_sparse_bf16(const tersor_args* a, int64_t begin, int64_t end) {
  if (a->m <= tersor::tile16::kPickedTokens) return prepare_picked(a, begin, end);
  prepare_bf16<BITS>(a, begin, end);
  spoil_tokens<uint16_t>(a, begin, end);
}

inline void prepare_values(const tersor_args* a, int64_t begin, int64_t end) {
  prepare_bf16<16>(a, begin, end);
  spoil_tokens<uint16_t>(a, begin, end);
}

}  // namespace

namespace tersor {

using namespace tile16;

const tersor_kernel kAvx512Bf16Kernels[] = {
    kernel("w4a16_avx512bf16", "avx512bf16", 40, avx512bf16_missing, refuses_w4bf16, workspace_bf16,
           prepare_bf16<4>, gemm<BF16<4>>),
    kernel("w8a16_avx512bf16", "avx512bf16", 40, avx512bf16_missing, refuses_w8bf16, workspace_bf16,
           prepare_bf16<8>, gemm<BF16<8>>),
    sparse_kernel("s24w4a16_avx512bf16", "avx512bf16", 45, avx512bf16_missing,
                  sparse_refuses_w4bf16, workspace_picked, prepare_sparse_bf16<4>,
                  sparse_gemm<SparseBF16<4>, BF16<4>, expand512<4>>),
    sparse_kernel("s24w8a16_avx512bf16", "avx512bf16", 45, avx512bf16_missing,
                  sparse_refuses_w8bf16, workspace_picked, prepare_sparse_bf16<8>,
                  sparse_gemm<SparseBF16<8>, BF16<8>, expand512<8>>),
    sparse_kernel("s24bf16_avx512bf16", "avx512bf16", 45, avx512bf16_missing,
                  sparse_refuses_bf16bf16, workspace_bf16, prepare_values,
                  sparse_gemm<SparseValues, Values, expand512<16>>),
};

}  // namespace tersor
