// First stage of the "tile16" kernels: tokens of x into the form that the inner loops read.
//
// Plain loops that the compiler vectorises with the flags of the including ISA file; internal
// linkage, as in tile16.h.
#pragma once

#include "cpu/tile16.h"

namespace {

struct LoadF32 {
  static float at(const void* x, int64_t i) { return static_cast<const float*>(x)[i]; }
};
struct LoadBF16 {
  static float at(const void* x, int64_t i) {
    return from_bf16(static_cast<const uint16_t*>(x)[i]);
  }
};
struct LoadF16 {
  static float at(const void* x, int64_t i) { return from_f16(static_cast<const uint16_t*>(x)[i]); }
};

inline const void* token_of(const tersor_args& a, int64_t token) {
  return static_cast<const uint8_t*>(a.x) + token * a.ldx * (a.dtype == TERSOR_F32 ? 4 : 2);
}

// Sum in 16 parts, so that it vectorises and its order is fixed.
template <class Load>
float sum_chunk(const void* x, int64_t begin, int64_t end) {
  float part[16] = {};
  int64_t i = begin;
  for (; i + 16 <= end; i += 16)
    for (int j = 0; j < 16; ++j) part[j] += Load::at(x, i + j);
  for (int j = 0; i < end; ++i, ++j) part[j] += Load::at(x, i);
  for (int width = 8; width; width /= 2)
    for (int j = 0; j < width; ++j) part[j] += part[j + width];
  return part[0];
}

// Symmetric int8: code = rint(x / scale), from -128 to 127. given: the scale, or nullptr for
// absmax / 127.5, by which the largest value takes code -128 where it is negative.
template <class Load>
void quantize_token(const tersor_spec& s, const Prepared& p, const void* x, const float* given,
                    int8_t flip, int8_t* codes, float* scale, int32_t* sums) {
  // Among the bit patterns of absolute values NaN > infinity > any number: none of them is lost.
  uint32_t top = 0;
  for (int64_t i = 0; i < s.k; ++i) {
    const uint32_t bits = float_to_bits(Load::at(x, i)) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  const bool finite = top < 0x7f800000u;
  const float step = given ? *given : bits_to_float(top) / 127.5f;
  *scale = finite ? step : bits_to_float(0x7fc00000u);  // NaN in, NaN out
  const float divisor = step > 0 ? step : 1.0f;
  for (int64_t c = 0; c < p.chunks; ++c) {
    int32_t sum = 0;
    const int64_t end = p.chunk_end(s, c);
    for (int64_t i = p.chunk_begin(s, c); i < end; ++i) {
      // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
      float q = Load::at(x, i) / divisor;
      q = q > 127.0f ? 127.0f : q;
      q = q < -128.0f ? -128.0f : q;
      const int32_t code = finite ? static_cast<int32_t>((q + 12582912.0f) - 12582912.0f) : 0;
      codes[i] = static_cast<int8_t>(code ^ flip);
      sum += code;
    }
    sums[c] = sum;
  }
  for (int64_t i = s.k; i < p.stride; ++i) codes[i] = 0;
}

template <class Load>
void convert_token(const tersor_spec& s, const Prepared& p, const void* x, float* out,
                   float* sums) {
  for (int64_t i = 0; i < s.k; ++i) out[i] = Load::at(x, i);
  for (int64_t i = s.k; i < p.stride / 4; ++i) out[i] = 0;
  if (s.asymmetric)
    for (int64_t c = 0; c < p.chunks; ++c)
      sums[c] = sum_chunk<Load>(x, p.chunk_begin(s, c), p.chunk_end(s, c));
}

// flip: xored with every code; -128 makes them unsigned.
inline void prepare_codes(const tersor_args* a, int64_t begin, int64_t end, int8_t flip) {
  const Prepared p(a->spec, a->m, 1);
  auto* work = static_cast<uint8_t*>(a->workspace);
  for (int64_t token = begin; token < end; ++token) {
    auto* codes = reinterpret_cast<int8_t*>(work + token * p.stride);
    auto* scale = reinterpret_cast<float*>(work + p.scales_at) + token;
    auto* sums = reinterpret_cast<int32_t*>(work + p.sums_at) + token * p.chunks;
    const void* x = token_of(*a, token);
    if (a->dtype == TERSOR_F32)
      quantize_token<LoadF32>(a->spec, p, x, a->x_scale, flip, codes, scale, sums);
    else if (a->dtype == TERSOR_BF16)
      quantize_token<LoadBF16>(a->spec, p, x, a->x_scale, flip, codes, scale, sums);
    else
      quantize_token<LoadF16>(a->spec, p, x, a->x_scale, flip, codes, scale, sums);
  }
}

inline void prepare_a8(const tersor_args* a, int64_t begin, int64_t end) {
  prepare_codes(a, begin, end, 0);
}

// A row of weights that passes over the one activation that is NaN or infinite would hide it: where
// there is such a one, the whole token becomes NaN.
inline void spoil(float* x, int64_t k) {
  float bad = 0;
  for (int64_t i = 0; i < k; ++i) bad += x[i] - x[i];
  if (bad != bad)
    for (int64_t i = 0; i < k; ++i) x[i] = bad;
}

inline bool is_spoilt(const uint16_t* x, int64_t k) {  // bfloat16
  bool bad = false;
  for (int64_t i = 0; i < k; ++i) bad |= (x[i] & 0x7f80) == 0x7f80;
  return bad;
}

inline void spoil(uint16_t* x, int64_t k) {
  const bool bad = is_spoilt(x, k);
  for (int64_t i = 0; bad && i < k; ++i) x[i] = 0x7fc0;
}

template <class Element>
void spoil_tokens(const tersor_args* a, int64_t begin, int64_t end) {
  const Prepared p(a->spec, a->m, sizeof(Element));
  for (int64_t token = begin; token < end; ++token)
    spoil(reinterpret_cast<Element*>(static_cast<uint8_t*>(a->workspace) + token * p.stride),
          a->spec.k);
}

inline void prepare_f32(const tersor_args* a, int64_t begin, int64_t end) {
  const Prepared p(a->spec, a->m, 4);
  auto* work = static_cast<uint8_t*>(a->workspace);
  for (int64_t token = begin; token < end; ++token) {
    auto* out = reinterpret_cast<float*>(work + token * p.stride);
    auto* sums = reinterpret_cast<float*>(work + p.sums_at) + token * p.chunks;
    const void* x = token_of(*a, token);
    if (a->dtype == TERSOR_F32)
      convert_token<LoadF32>(a->spec, p, x, out, sums);
    else if (a->dtype == TERSOR_BF16)
      convert_token<LoadBF16>(a->spec, p, x, out, sums);
    else
      convert_token<LoadF16>(a->spec, p, x, out, sums);
  }
}

inline void prepare_sparse_f32(const tersor_args* a, int64_t begin, int64_t end) {
  prepare_f32(a, begin, end);
  spoil_tokens<float>(a, begin, end);
}

}  // namespace
