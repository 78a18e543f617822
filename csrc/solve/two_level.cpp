// Scales on a two-level grid: those of a row become products of one number and whole numbers from 1
// to 15.
#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "parallel.h"
#include "solve/lanes.h"
#include "solve/range.h"
#include "solve/solve.h"

namespace tersor::solve {
namespace {

constexpr int kBits = 4;
constexpr int kMost = 15;     // the largest multiplier
constexpr int kDigits = 7;    // binary ones of a row's scale
constexpr size_t kTried = 8;  // candidates whose error is measured

// The products of a row's scale that the dtype holds exactly, rising.
struct Candidate {
  double distance = 0;  // squared, of the scales of the groups to the nearest
  int count = 0;
  std::array<float, kMost> products;

  // Those on both sides of a scale.
  std::pair<float, float> around(float scale) const {
    const float* end = products.data() + count;
    const float* above = std::lower_bound(products.data(), end, scale);
    if (above == products.data()) return {*above, *above};
    if (above == end) return {above[-1], above[-1]};
    return {above[-1], *above};
  }
};

class Row {
 public:
  // w, scales: of one row; scales are finite.
  Row(const Grids& p, const float* w, const float* scales)
      : p_(p), w_(w), scales_(scales), groups_(p.k / p.group), empty_(groups_) {
    for (int64_t g = 0; g < groups_; ++g) {
      const Extent extent = lane_.extent(w + g * p.group, p.group);
      empty_[g] = extent.min == 0 && extent.max == 0;
      if (empty_[g]) continue;
      peak_ = std::max<double>(peak_, scales[g]);
      range_.low = std::min<double>(range_.low, extent.min);
      range_.high = std::max<double>(range_.high, extent.max);
    }
  }

  // The scales that replace those of the row.
  std::vector<float> best() const {
    std::vector<float> best(scales_, scales_ + groups_), tried(groups_);
    if (peak_ == 0) return best;  // no weights, and all scales are 1
    std::fill(best.begin(), best.end(), static_cast<float>(peak_));
    double least = INFINITY;
    for (const Candidate& each : nearest()) {
      const double error = apply(each, tried);
      if (error >= least) continue;
      least = error;
      best = tried;
    }
    return best;
  }

 private:
  // The candidates that come nearest to the scales, of all whose multiples reach the largest one.
  std::vector<Candidate> nearest() const {
    std::vector<Candidate> all;
    const int exponent = std::ilogb(peak_);
    for (int e = exponent - 4; e <= exponent - 2; ++e)
      for (int digits = 1 << (kDigits - 1); digits < 1 << kDigits; ++digits) {
        const double row = std::ldexp(digits, e - kDigits + 1);
        if (row < peak_ / (kMost + 1) || row > peak_ / (kMost / 2)) continue;
        Candidate made;
        for (int i = 1; i <= kMost; ++i)
          if (stored(row * i, p_.scale_dtype) == row * i)
            made.products[made.count++] = static_cast<float>(row * i);
        if (!made.count) continue;
        made.distance = distance(made);
        all.push_back(made);
      }
    std::stable_sort(all.begin(), all.end(), [](const Candidate& one, const Candidate& other) {
      return one.distance < other.distance;
    });
    if (all.size() > kTried) all.resize(kTried);
    return all;
  }

  double distance(const Candidate& candidate) const {
    double sum = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      if (empty_[g]) continue;
      const auto [below, above] = candidate.around(scales_[g]);
      const double away =
          std::min(std::abs(scales_[g] - below), std::abs(above - scales_[g])) / peak_;
      sum += away * away;
    }
    return sum;
  }

  // The least squared error of the row's weights, and the products that give it.
  double apply(const Candidate& candidate, std::vector<float>& made) const {
    const float unit = range_.unit(), middle = range_.middle();
    double total = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      made[g] = candidate.products.front();
      if (empty_[g]) continue;
      const auto error = [&](float scale) {
        return lane_.grid_error(w_ + g * p_.group, p_.group, unit, scale * unit, -middle,
                                range_.top() - middle);
      };
      const auto [below, above] = candidate.around(scales_[g]);
      const float under = error(below), over = above == below ? under : error(above);
      made[g] = under < over ? below : above;
      total += std::min(under, over);
    }
    return total;
  }

  const Grids& p_;
  const float *w_, *scales_;
  const int64_t groups_;
  std::vector<char> empty_;
  const Lanes& lane_ = lanes();
  double peak_ = 0;
  Range range_{0, 0, kBits, true, p_.scale_dtype};
};

}  // namespace

void put_on_two_levels(const Grids& p, float* scales) {
  lanes();  // throws here, not in a thread
  const int64_t groups = p.k / p.group;
  parallel_for(p.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const std::vector<float> best = Row(p, p.w + i * p.k, scales + i * groups).best();
      std::copy(best.begin(), best.end(), scales + i * groups);
    }
  });
}

}  // namespace tersor::solve
