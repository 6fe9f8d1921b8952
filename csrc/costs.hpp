// Built-in interval costs with O(1) evaluation. Intervals are half-open [l, e) here.
#pragma once
#include "wide.hpp"

namespace diffmtl {

// Σ |x_i − x_c| around the middle element c = ⌊(l + e) / 2⌋ of a monotone sequence, a median of it.
//
// With prefix sums P the cost is P[l] + P[e] − P[⌊(l+e)/2⌋] − P[⌈(l+e)/2⌉]. The subtracted part is a function
// Q of l + e whose differences are the non-decreasing x: Q is convex, which is the quadrangle inequality. The
// squared size (e − l)² has the same form with P[i] = i², up to one for odd sizes, so it rides along in P.
class AbsoluteCost {
 public:
  AbsoluteCost(const double* x, Int n) : prefix_(n + 1) {
    const int width = bit_width(n), tie_bits = 2 * width;
    const std::vector<Int> fixed = quantise(x, n, std::min(61, 124 - 3 * width));
    // |x_i − x_c| is the same for −x: a non-increasing sequence becomes a non-decreasing one.
    const Int sign = n > 0 && x[0] > x[n - 1] ? -1 : 1;
    Wide sum = 0;
    for (Int i = 0;; ++i) {
      prefix_[i] = sum * (Wide{1} << tie_bits) + 2 * Wide{i} * i;
      if (i == n) break;
      sum += sign * (fixed[i] - fixed[0]);
    }
  }

  Int size() const { return static_cast<Int>(prefix_.size()) - 1; }

  Wide operator()(Int l, Int e) const {
    const Int s = l + e;
    return prefix_[l] + prefix_[e] - prefix_[s >> 1] - prefix_[(s + 1) >> 1] + (s & 1);
  }

  static double exact(const double* x, Int l, Int e) {
    const double centre = x[(l + e) / 2];
    Sum sum;
    for (Int i = l; i < e; ++i) sum.add(std::abs(x[i] - centre));
    return sum.value();
  }

 private:
  std::vector<Wide> prefix_;
};

// Σ (x_i − mean)², the cost of k-means.
//
// With integers S1 = Σ x, S2 = Σ x², any q near S1 / n and r = S1 − q n: S1² / n = q (S1 + r) + r² / n, so the
// cost S2 − S1² / n is exact in integers but for the fraction of r² / n, rounded once. Products may wrap
// around 2^128; the difference does not. Quadrangle inequality: for b ≤ c the second difference of the cost in
// l and e is −2 n^{-1}(n+1)^{-1}-weighted products of one-sided deviations of sorted values, never positive.
class SquaredCost {
 public:
  SquaredCost(const double* x, Int n) : sum_(n + 1), square_(n + 1) {
    const int width = bit_width(n);
    tie_bits_ = 2 * width;
    const int bits = (125 - width) / 2 - 1;
    drop_bits_ = std::max(0, 2 * (bits + 1) + width + tie_bits_ - 125);
    const std::vector<Int> fixed = quantise(x, n, bits);
    Wide sum = 0;
    UWide square = 0;
    for (Int i = 0;; ++i) {
      sum_[i] = sum, square_[i] = square;
      if (i == n) break;
      sum += fixed[i], square += static_cast<UWide>(Wide{fixed[i]} * fixed[i]);
    }
  }

  Int size() const { return static_cast<Int>(sum_.size()) - 1; }

  Wide operator()(Int l, Int e) const {
    const Int n = e - l;
    const Wide sum = sum_[e] - sum_[l];
    // 16 low bits do not matter for a quotient that need not be exact, and a 64-bit conversion is fast.
    const Int q = static_cast<Int>(static_cast<double>(static_cast<Int>(sum >> 16)) * 65536.0 / static_cast<double>(n));
    const Wide r = sum - Wide{q} * n;
    const double r_double = static_cast<double>(static_cast<Int>(r));
    const Int rest = static_cast<Int>(r_double * r_double / static_cast<double>(n));
    const UWide product = static_cast<UWide>(Wide{q}) * static_cast<UWide>(sum + r);
    const Wide cost = static_cast<Wide>(square_[e] - square_[l] - product - static_cast<UWide>(Wide{rest}));
    return ((cost >> drop_bits_) << tie_bits_) + Wide{n} * n;
  }

  static double exact(const double* x, Int l, Int e) {
    Sum sum;
    for (Int i = l; i < e; ++i) sum.add(x[i]);
    const double mean = sum.value() / static_cast<double>(e - l);
    Sum deviation, square;
    for (Int i = l; i < e; ++i) deviation.add(x[i] - mean), square.add((x[i] - mean) * (x[i] - mean));
    return std::max(0.0, square.value() - deviation.value() * deviation.value() / static_cast<double>(e - l));
  }

 private:
  std::vector<Wide> sum_;
  std::vector<UWide> square_;
  int tie_bits_ = 0, drop_bits_ = 0;
};

}  // namespace diffmtl
