// One source for every ISA, in the vector extensions that GCC and Clang share. The flags that this
// file is compiled with decide the width. All code is in an anonymous namespace and no library
// template is used, so that the linker cannot put AVX code into a baseline path.
#include "solve/lanes.h"

#include "cpu/features.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

using tersor::solve::Extent;
using tersor::solve::kDoubleRows;
using tersor::solve::kFloatRows;
using tersor::solve::kPanel;
using tersor::solve::SolvePanel;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2 on x86-64, NEON on aarch64
#endif

// Columns of a matrix product that are kept in registers, two vectors of rows each.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kColumns = 8;  // 32 registers
#else
constexpr int kColumns = 4;  // 16 registers
#endif

constexpr int kFloats = kVectorBytes / 4;
constexpr int kDoubles = kVectorBytes / 8;
typedef float Float __attribute__((vector_size(kVectorBytes)));
typedef float FloatAnywhere __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
typedef uint8_t Byte __attribute__((vector_size(kFloats), aligned(1), may_alias));
typedef double Double __attribute__((vector_size(kVectorBytes)));

// a * b + c, in one rounding where the ISA can.
#if defined(__AVX512F__)
inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
inline Double fma(Double a, Double b, Double c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
inline Double fma(Double a, Double b, Double c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__ARM_NEON)
inline Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
inline Double fma(Double a, Double b, Double c) { return vfmaq_f64(c, a, b); }
#else
inline Float fma(Float a, Float b, Float c) { return a * b + c; }
inline Double fma(Double a, Double b, Double c) { return a * b + c; }
#endif

// The same value in every lane; x - 0 is x to the last bit, signs of zero too, and costs nothing.
inline Float all(float x) { return x - Float{}; }
inline Double all(double x) { return x - Double{}; }

inline Float& at(float* p) { return *reinterpret_cast<Float*>(p); }
inline Float at(const float* p) { return *reinterpret_cast<const Float*>(p); }
inline Double& at(double* p) { return *reinterpret_cast<Double*>(p); }
inline Double at(const double* p) { return *reinterpret_cast<const Double*>(p); }

// To the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bit for a
// fraction.
inline Float round(Float x) {
  const Float shift = all(12582912.0f);
  return (x + shift) - shift;
}

// NaN becomes low, so that a code is a number whatever happens.
inline Float clamp(Float x, Float low, Float high) {
  x = x > low ? x : low;
  return x < high ? x : high;
}

// kColumns columns of c and two vectors of rows.
template <bool kSubtract, class Vector, class T>
inline void product_strip(const T* a, const T* b, int64_t depth, int64_t rows, T* c) {
  constexpr int kLanes = sizeof(Vector) / sizeof(T);
  Vector sum[kColumns][2] = {};
  for (int64_t p = 0; p < depth; ++p, a += rows, b += kPanel) {
    const Vector a0 = at(a), a1 = at(a + kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const Vector x = all(b[j]);
      sum[j][0] = fma(a0, x, sum[j][0]);
      sum[j][1] = fma(a1, x, sum[j][1]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) {
    T* out = c + j * rows;
    at(out) = kSubtract ? at(out) - sum[j][0] : at(out) + sum[j][0];
    at(out + kLanes) = kSubtract ? at(out + kLanes) - sum[j][1] : at(out + kLanes) + sum[j][1];
  }
}

// The sum of one call starts at zero and is then added to c: rounding errors grow with the depth of
// a call plus the number of calls, not with their product.
void add_product(const float* a, const float* b, int64_t depth, float* c) {
  for (int64_t r = 0; r < kFloatRows; r += 2 * kFloats)
    for (int64_t j = 0; j < kPanel; j += kColumns)
      product_strip<false, Float>(a + r, b + j, depth, kFloatRows, c + j * kFloatRows + r);
}

void subtract_product(const double* a, const double* b, int64_t depth, double* c) {
  for (int64_t r = 0; r < kDoubleRows; r += 2 * kDoubles)
    for (int64_t j = 0; j < kPanel; j += kColumns)
      product_strip<true, Double>(a + r, b + j, depth, kDoubleRows, c + j * kDoubleRows + r);
}

void back_substitute(const double* r, double* c) {
  for (int64_t p = kPanel - 1; p >= 0; --p) {
    const double* column = r + p * kDoubleRows;
    for (int64_t i = 0; i < kDoubleRows; i += kDoubles) {
      const Double x = at(c + p * kDoubleRows + i) / column[p];
      at(c + p * kDoubleRows + i) = x;
      for (int64_t j = 0; j < p; ++j) {
        double* out = c + j * kDoubleRows + i;
        at(out) = fma(-x, all(column[j]), at(out));
      }
    }
  }
}

inline Int& at(int32_t* p) { return *reinterpret_cast<Int*>(p); }

// Keeps those of `of` columns whose loss |x| * pivot, were they zero, is largest (SparseGPT,
// Frantar and Alistarh, arXiv:2301.00774, equation 3); of equals, the first. x is the best value
// for each if none of them became zero.
inline void choose(const SolvePanel& p, int64_t first, int64_t r) {
  Float error[kPanel], loss[kPanel];
  for (int64_t j = 0; j < p.of; ++j) {
    const int64_t here = (first + j) * kFloatRows + r;
    Float x = at(p.value + here);
    for (int64_t l = 0; l < j; ++l)
      x = fma(error[l], all(p.unit[(first + l) * kPanel + first + j]), x);
    error[j] = at(p.weight + here) - x;
    loss[j] = (x < 0 ? -x : x) * all(p.pivots[first + j]);
  }
  for (int64_t j = 0; j < p.of; ++j) {
    Int better = {};  // how many go before, as a negative number
    for (int64_t l = 0; l < p.of; ++l)
      if (l != j) better += l < j ? loss[l] >= loss[j] : loss[l] > loss[j];
    at(p.keep + (first + j) * kFloatRows + r) = better > -static_cast<int32_t>(p.kept);
  }
}

template <bool kSparse, bool kGrid>
void solve_panel(const SolvePanel& p) {
  for (int64_t i = 0; i < p.columns; ++i) {
    for (int64_t r = 0; r < kFloatRows; r += kFloats) {
      if (kSparse && p.of > 0 && i % p.of == 0) choose(p, i, r);
      const int64_t here = i * kFloatRows + r;
      Float value = at(p.value + here);
      if (kSparse) value = at(p.keep + here) ? value : Float{};
      if (kGrid) {
        const Float scale = at(p.scales + p.group[i] * kFloatRows + r);
        const Float zero = at(p.zeros + p.group[i] * kFloatRows + r);
        const Float step = round(clamp(value / scale, -zero, p.top - zero));
        const Int code = __builtin_convertvector(step + zero, Int);
        *reinterpret_cast<Byte*>(p.codes + here) = __builtin_convertvector(code, Byte);
        value = step * scale;
      } else {
        at(p.value + here) = value;
      }
      const Float error = at(p.weight + here) - value;
      at(p.weight + here) = error;
      for (int64_t j = i + 1; j < p.columns; ++j) {
        float* later = p.value + j * kFloatRows + r;
        at(later) = fma(error, all(p.unit[i * kPanel + j]), at(later));
      }
    }
  }
}

void solve_panel(const SolvePanel& p) {
  if (p.codes)
    p.keep ? solve_panel<true, true>(p) : solve_panel<false, true>(p);
  else
    p.keep ? solve_panel<true, false>(p) : solve_panel<false, false>(p);
}

inline Float load(const float* p) { return *reinterpret_cast<const FloatAnywhere*>(p); }

// The last floats of a list, filled up with a value that changes nothing.
inline Float load_some(const float* p, int64_t count, float fill) {
  Float x = all(fill);
  for (int64_t i = 0; i < count; ++i) x[i] = p[i];
  return x;
}

Extent extent(const float* w, int64_t count) {
  Float low = all(w[0]), high = low, bad = {};
  const auto take = [&](Float x) {
    low = x < low ? x : low;
    high = x > high ? x : high;
    bad += x - x;  // 0, or NaN for NaN and infinity
  };
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) take(load(w + i));
  if (i < count) take(load_some(w + i, count - i, w[0]));
  Extent e{low[0], high[0], true};
  for (int lane = 0; lane < kFloats; ++lane) {
    e.min = low[lane] < e.min ? low[lane] : e.min;
    e.max = high[lane] > e.max ? high[lane] : e.max;
    e.finite &= bad[lane] == 0;
  }
  return e;
}

float grid_error(const float* w, int64_t count, float unit, float scale, float low, float high) {
  const float inverse = 1 / scale;
  Float sum = {};
  const auto take = [&](Float x) {
    x *= unit;
    const Float step = round(clamp(x * inverse, all(low), all(high)));
    const Float error = x - step * scale;
    sum = fma(error, error, sum);
  };
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) take(load(w + i));
  if (i < count) take(load_some(w + i, count - i, 0));
  float total = 0;
  for (int lane = 0; lane < kFloats; ++lane) total += sum[lane];
  return total;
}

}  // namespace

#define TERSOR_LANES(name, isa, missing)                                                    \
  extern const tersor::solve::Lanes name = {isa,         missing,          add_product,     \
                                            solve_panel, subtract_product, back_substitute, \
                                            extent,      grid_error}

namespace tersor::solve {
#if defined(__AVX512F__)
TERSOR_LANES(kAvx512Lanes, "avx512", avx512vnni_missing);
#elif defined(__AVX2__)
TERSOR_LANES(kAvx2Lanes, "avx2", avx2_missing);
#else
TERSOR_LANES(kBaselineLanes, "scalar", nothing_missing);
#endif
}  // namespace tersor::solve
