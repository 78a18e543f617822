#include "cpu/features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tersor {

const char* nothing_missing() { return nullptr; }

#if defined(__x86_64__)

const char* avx2_missing() {
  // Compilers before GCC 11 do not know __builtin_cpu_supports("f16c"). Asked once: every call of a
  // kernel comes by here, and a virtual machine takes microseconds for a cpuid.
  static const bool f16c = [] {
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c) return nullptr;
  return "needs AVX2, FMA and F16C";
}

const char* avx512vnni_missing() {
  if (!avx2_missing() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return nullptr;
  return "needs AVX-512 F, BW, DQ, VL and VNNI";
}

const char* avx512bf16_missing() {
  if (!avx512vnni_missing() && __builtin_cpu_supports("avx512bf16")) return nullptr;
  return "needs AVX-512 VNNI and BF16";
}

#else

const char* avx2_missing() { return "needs an x86-64 processor"; }
const char* avx512vnni_missing() { return "needs an x86-64 processor"; }
const char* avx512bf16_missing() { return "needs an x86-64 processor"; }

#endif

}  // namespace tersor
