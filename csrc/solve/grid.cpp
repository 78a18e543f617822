// The uniform grid of each group of weights.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>

#include "dispatch.h"
#include "parallel.h"
#include "solve/lanes.h"
#include "solve/solve.h"

namespace tersor::solve {
namespace {

constexpr double kShrinkStep = 0.02;

// x >= 0 with the lowest `bits` of its mantissa rounded off, to nearest even.
float drop_bits(float x, int bits) {
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
float stored(double x, int32_t dtype) {
  const float scale = std::max(static_cast<float>(x), 0x1p-126f);
  if (dtype == TERSOR_BF16) return drop_bits(scale, 16);
  if (dtype != TERSOR_F16) return scale;
  if (scale < 0x1p-14f) return std::max((scale + 0.5f) - 0.5f, 0x1p-24f);  // multiples of 2^-24
  const float half = drop_bits(scale, 13);
  return half <= 65504 ? half : INFINITY;
}

struct Grid {
  float scale;
  float zero;
};

class Search {
 public:
  explicit Search(const Grids& p)
      : p_(p), top_(static_cast<float>((1 << p.bits) - 1)), shrinks_(p.clip ? steps(p.bits) : 1) {}

  // The grid for a group that reaches from low to high; an infinite scale where none fits.
  Grid operator()(const float* w, Extent extent) const {
    const double low = std::min<double>(extent.min, 0), high = std::max<double>(extent.max, 0);
    if (low == high) return {1, p_.symmetric ? middle() : 0};
    const double reach = std::max(-low, high);
    // Errors are compared on weights brought near 1 by a power of two, where squares cannot
    // overflow. (Its bounds keep the power itself a normal number.)
    const float unit = std::ldexp(1.0f, -std::clamp(std::ilogb(reach), -126, 126));
    Grid best{INFINITY, 0};
    float least = INFINITY;
    for (int i = 0; i < shrinks_; ++i) {
      const double shrink = 1 - kShrinkStep * i;
      Grid grid{stored(shrink * (p_.symmetric ? reach / (middle() - 1) : (high - low) / top_),
                       p_.scale_dtype),
                middle()};
      if (!std::isfinite(grid.scale)) continue;
      if (!p_.symmetric)
        grid.zero = std::min(top_, static_cast<float>(std::nearbyint(-low * shrink / grid.scale)));
      const float error =
          lane_.grid_error(w, p_.group, unit, grid.scale * unit, -grid.zero, top_ - grid.zero);
      if (error < least) {
        least = error;
        best = grid;
      }
    }
    return best;
  }

 private:
  // With few levels the best range is a small part of the whole.
  static int steps(int bits) { return bits <= 3 ? 41 : 26; }
  float middle() const { return static_cast<float>(1 << (p_.bits - 1)); }

  const Grids& p_;
  const Lanes& lane_ = lanes();
  float top_;
  int shrinks_;
};

}  // namespace

void search_grid(const Grids& p, float* scales, uint8_t* zeros) {
  const Lanes& lane = lanes();
  const Search search(p);
  const int64_t groups = p.k / p.group;
  std::atomic<bool> good_weights{true}, good_scales{true};
  parallel_for(p.n * groups, 16, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const float* w = p.w + g * p.group;
      const Extent extent = lane.extent(w, p.group);
      if (!extent.finite) {
        good_weights = false;
        continue;
      }
      const Grid grid = search(w, extent);
      if (!std::isfinite(grid.scale)) good_scales = false;
      scales[g] = grid.scale;
      if (zeros) zeros[g] = static_cast<uint8_t>(grid.zero);
    }
  });
  if (!good_weights) throw Error("the weights hold NaN or infinity");
  if (!good_scales)
    throw Error(
        "the weights are too large for scales in this dtype; store the scales in bfloat16 "
        "or float32");
}

}  // namespace tersor::solve
