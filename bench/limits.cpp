// What one core of this machine can do at most: loops that only read, or only multiply.
// Compiled and called by limits.py; no part of the package.
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET(isa) __attribute__((target(isa), noinline))
// Twelve independent accumulators hide the latency of any of these instructions.
#define TWELVE(acc, step)                                                                   \
  step(acc[0]) step(acc[1]) step(acc[2]) step(acc[3]) step(acc[4]) step(acc[5]) step(acc[6]) \
      step(acc[7]) step(acc[8]) step(acc[9]) step(acc[10]) step(acc[11])
#define KEEP(acc) asm volatile("" : "+v"(acc));
#endif

extern "C" {

// Reads every cache line once; returns a value so that nothing is left out.
uint64_t read_all(const uint64_t* data, size_t bytes) {
  uint64_t a = 0, b = 0, c = 0, d = 0;
  for (size_t i = 0; i + 32 <= bytes / 8; i += 32)
    for (size_t j = 0; j < 32; j += 4) {
      a ^= data[i + j];
      b ^= data[i + j + 1];
      c ^= data[i + j + 2];
      d ^= data[i + j + 3];
    }
  return a ^ b ^ c ^ d;
}

#if defined(__x86_64__)

// Each returns the number of multiply-adds it has done.
TARGET("avx2,fma") double fma_avx2(int64_t rounds) {
  __m256 acc[12] = {}, x = _mm256_set1_ps(1), y = x;
  for (int64_t i = 0; i < rounds; ++i) {
#define STEP(a) a = _mm256_fmadd_ps(x, y, a); KEEP(a)
    TWELVE(acc, STEP)
#undef STEP
  }
  return 12.0 * 8 * static_cast<double>(rounds);
}

TARGET("avx2") double int8_avx2(int64_t rounds) {
  __m256i acc[12] = {}, x = _mm256_set1_epi8(1), y = x, ones = _mm256_set1_epi16(1);
  for (int64_t i = 0; i < rounds; ++i) {
#define STEP(a)                                                                             \
  {                                                                                         \
    __m256i p = _mm256_maddubs_epi16(x, y);                                                 \
    KEEP(p) a = _mm256_add_epi32(a, _mm256_madd_epi16(p, ones));                            \
    KEEP(a)                                                                                 \
  }
    TWELVE(acc, STEP)
#undef STEP
  }
  return 12.0 * 32 * static_cast<double>(rounds);
}

TARGET("avx512f") double fma_avx512(int64_t rounds) {
  __m512 acc[12] = {}, x = _mm512_set1_ps(1), y = x;
  for (int64_t i = 0; i < rounds; ++i) {
#define STEP(a) a = _mm512_fmadd_ps(x, y, a); KEEP(a)
    TWELVE(acc, STEP)
#undef STEP
  }
  return 12.0 * 16 * static_cast<double>(rounds);
}

TARGET("avx512f,avx512vnni") double int8_avx512vnni(int64_t rounds) {
  __m512i acc[12] = {}, x = _mm512_set1_epi8(1), y = x;
  for (int64_t i = 0; i < rounds; ++i) {
#define STEP(a) a = _mm512_dpbusd_epi32(a, x, y); KEEP(a)
    TWELVE(acc, STEP)
#undef STEP
  }
  return 12.0 * 64 * static_cast<double>(rounds);
}

TARGET("avx512f,avx512bf16") double bf16_avx512bf16(int64_t rounds) {
  __m512 acc[12] = {};
  __m512bh x = {}, y = {};
  for (int64_t i = 0; i < rounds; ++i) {
#define STEP(a) a = _mm512_dpbf16_ps(a, x, y); KEEP(a)
    TWELVE(acc, STEP)
#undef STEP
  }
  return 12.0 * 32 * static_cast<double>(rounds);
}

#endif
}
