// The ranges that a group's uniform grid is tried with: the same arithmetic on the CPU and on a
// GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel.h"

#if defined(__CUDACC__)
#define TERSOR_EVERYWHERE __host__ __device__ inline
#else
#define TERSOR_EVERYWHERE inline
#endif

namespace tersor::solve {

constexpr double kShrinkStep = 0.02;

// x >= 0 with the lowest `bits` of its mantissa rounded off, to nearest even.
TERSOR_EVERYWHERE float drop_bits(float x, int bits) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  u += (1u << (bits - 1)) - 1 + (u >> bits & 1);
  u &= ~0u << bits;
  std::memcpy(&x, &u, 4);
  return x;
}

// A positive scale as the dtype stores it; infinity beyond its range. Never zero, and never a
// float32 or bfloat16 denormal, which processors may flush to zero. float16 denormals do not
// suffer that: they are normal numbers in float32, and small weights need them.
TERSOR_EVERYWHERE float stored(double x, int32_t dtype) {
  float scale = static_cast<float>(x);
  if (scale < 0x1p-126f) scale = 0x1p-126f;
  if (dtype == TERSOR_BF16) return drop_bits(scale, 16);
  if (dtype != TERSOR_F16) return scale;
  if (scale < 0x1p-14f) {  // multiples of 2^-24
    const float denormal = (scale + 0.5f) - 0.5f;
    return denormal < 0x1p-24f ? 0x1p-24f : denormal;
  }
  const float half = drop_bits(scale, 13);
  return half <= 65504 ? half : static_cast<float>(INFINITY);
}

struct Grid {
  float scale, zero;
};

// A group that reaches from low to high (low <= 0 <= high, not both 0), and the grids for it.
struct Range {
  double low, high;
  int32_t bits;
  bool symmetric;
  int32_t scale_dtype;

  TERSOR_EVERYWHERE float top() const { return static_cast<float>((1 << bits) - 1); }
  TERSOR_EVERYWHERE float middle() const { return static_cast<float>(1 << (bits - 1)); }
  TERSOR_EVERYWHERE double reach() const { return -low > high ? -low : high; }

  // With few levels the best range is a small part of the whole.
  TERSOR_EVERYWHERE int candidates(bool clip) const { return !clip ? 1 : bits <= 3 ? 41 : 26; }

  // Errors are compared on weights brought near 1 by this power of two, where squares cannot
  // overflow. (Its bounds keep the power itself a normal number.)
  TERSOR_EVERYWHERE float unit() const {
    const int exponent = ilogb(reach());
    return static_cast<float>(ldexp(1.0, exponent < -126  ? 126
                                         : exponent > 126 ? -126
                                                          : -exponent));
  }

  // The candidate i, of a range that is less by i steps; an infinite scale where none fits.
  TERSOR_EVERYWHERE Grid candidate(int i) const {
    const double shrink = 1 - kShrinkStep * i;
    Grid grid{
        stored(shrink * (symmetric ? reach() / (middle() - 1) : (high - low) / top()), scale_dtype),
        middle()};
    if (!symmetric && grid.scale < static_cast<float>(INFINITY)) {
      const float zero = static_cast<float>(nearbyint(-low * shrink / grid.scale));
      grid.zero = zero < top() ? zero : top();
    }
    return grid;
  }
};

}  // namespace tersor::solve
