// Built-in interval costs with O(1) evaluation. Intervals are half-open [l, e) here.
//
// Both are min_c Σ g(|x_i − c|) of a sorted x with a non-decreasing g, which proves the quadrangle inequality
// w(a, c) + w(b, d) <= w(a, d) + w(b, c) for a <= b <= c <= d: let u, v be the best centres of [a, d), [b, c).
// If u <= v, serve [a, c) by u and [b, d) by v: against the right-hand side only [c, d) changed its centre from u
// to v, and its elements are at least v. If u > v, serve [a, c) by v and [b, d) by u: only [a, b) changed, from u
// to v, and its elements are at most v. Limits on the sizes keep it: see Limits. So does the squared size.
#pragma once
#include "simd.hpp"
#include "wide.hpp"

namespace diffmtl {

// Σ |x_i − x_c| around the middle element c = ⌊(l + e) / 2⌋ of a monotone sequence, a median of it.
//
// With prefix sums P of a non-decreasing x it is P[l] + P[e] − P[⌊(l+e)/2⌋] − P[⌈(l+e)/2⌉]. The squared size
// (e − l)² has that form too with P[i] = 2 i², but for 1 in odd sizes, and rides along in P.
class AbsoluteCost {
 public:
  AbsoluteCost(const double* x, Int n) : prefix_(n + 1) {
    const int width = bit_width(n), tie_bits = 2 * width + 1;
    int shift = 0;
    const std::vector<Int> fixed = quantise(x, n, std::min(61, 123 - 3 * width), &shift);
    unit_ = shift + tie_bits;
    // |x_i − x_c| is the same for −x: a non-increasing sequence becomes a non-decreasing one.
    const Int sign = x[0] > x[n - 1] ? -1 : 1;
    Wide sum = 0;
    for (Int i = 0;; ++i) {
      prefix_[i] = sum * (Wide{1} << tie_bits) + 4 * Wide{i} * i;
      if (i == n) break;
      sum += sign * (fixed[i] - fixed[0]);
    }
  }

  Int size() const { return static_cast<Int>(prefix_.size()) - 1; }

  // The cost is fixed-point with this many fractional bits, and twice the squared size in the low ones: even.
  int unit() const { return unit_; }

  Wide operator()(Int l, Int e) const {
    const Int s = l + e;
    return prefix_[l] + prefix_[e] - prefix_[s >> 1] - prefix_[(s + 1) >> 1] + 2 * (s & 1);
  }

  // No partition costs more.
  static double bound(const double* x, Int n) { return static_cast<double>(n) * std::abs(x[n - 1] - x[0]); }

  static double exact(const double* x, Int l, Int e) {
    const double centre = x[(l + e) / 2];
    Sum sum;
    for (Int i = l; i < e; ++i) sum.add(std::abs(x[i] - centre));
    return sum.value();
  }

  // Candidates for the minimum of values[l] + cost(l, e) over l, from differences of doubles.
  class Filter {
   public:
    explicit Filter(const AbsoluteCost& cost) : cost_(cost), middle_(2 * cost.size() + 1) {
      for (Int s = 0; s <= 2 * cost.size(); ++s)
        middle_[s] = to_double(cost.prefix_[s >> 1] + cost.prefix_[(s + 1) >> 1]);
      margin_ = std::ldexp(to_double(cost.prefix_.back()), -47) + 4;  // left out: 2 for odd sizes
    }
    void set(const Wide* values, Int first, Int last) {
      first_ = first, left_.resize(last - first + 1);
      for (Int l = first; l <= last; ++l) left_[l - first] = to_double(values[l] + cost_.prefix_[l]);
    }
    double minimum(Int e, Int first, Int last) const {
      return minimum_of(&left_[first - first_], &middle_[first + e], last - first + 1);
    }
    Int next(Int e, Int from, Int last, double bound) const {
      return from + next_of(&left_[from - first_], &middle_[from + e], last - from + 1, bound);
    }
    double margin() const { return margin_; }

   private:
    DIFFMTL_CLONES static double minimum_of(const double* left, const double* middle, Int n) {
      return diffmtl::minimum(n, HUGE_VAL, [=](Int i) { return left[i] - middle[i]; });
    }
    DIFFMTL_CLONES static Int next_of(const double* left, const double* middle, Int n, double bound) {
      return first_within(0, n, bound, [=](Int i) { return left[i] - middle[i]; });
    }
    const AbsoluteCost& cost_;
    std::vector<double> middle_, left_;
    Int first_ = 0;
    double margin_;
  };

 private:
  std::vector<Wide> prefix_;
  int unit_ = 0;
};

// Σ (x_i − mean)², the cost of k-means.
//
// With integers S1 = Σ x and S2 = Σ x², for any q near S1 / n and r = S1 − q n: S1² / n = q (S1 + r) + r² / n. So
// S2 − q (S1 + r) is the cost exactly, up to r² / n < 2^30. Products may wrap around 2^128; the difference does not.
// At least those 30 bits are then dropped, in favour of the squared size, so the quadrangle inequality holds to the
// 73 bits or more that remain. Costs that are whole multiples of what is dropped stay exact, zero among them.
class SquaredCost {
 public:
  SquaredCost(const double* x, Int n) : sum_(n + 1), square_(n + 1) {
    const int width = bit_width(n);
    tie_bits_ = 2 * width + 1;
    const int bits = std::min(58, (124 - width) / 2 - 1);
    drop_bits_ = std::max(30, 2 * (bits + 1) + width + tie_bits_ - 122);
    int shift = 0;
    const std::vector<Int> fixed = quantise(x, n, bits, &shift);
    unit_ = 2 * shift + tie_bits_ - drop_bits_;
    Wide sum = 0;
    UWide square = 0;
    for (Int i = 0;; ++i) {
      sum_[i] = sum, square_[i] = square;
      if (i == n) break;
      const Int centred = fixed[i] - fixed[n / 2];
      sum += centred, square += static_cast<UWide>(Wide{centred} * centred);
    }
  }

  Int size() const { return static_cast<Int>(sum_.size()) - 1; }

  // The cost is fixed-point with this many fractional bits, and twice the squared size in the low ones: even.
  int unit() const { return unit_; }

  Wide operator()(Int l, Int e) const {
    const Int n = e - l;
    const Wide sum = sum_[e] - sum_[l];
    const double leading = static_cast<double>(static_cast<Int>(sum >> 14));
    const Int q = static_cast<Int>(leading * (16384.0 / static_cast<double>(n)));
    const Wide r = sum - Wide{q} * n;
    const Wide cost =
        static_cast<Wide>(square_[e] - square_[l] - static_cast<UWide>(Wide{q}) * static_cast<UWide>(sum + r));
    return ((cost >> drop_bits_) << tie_bits_) + 2 * Wide{n} * n;
  }

  // No partition costs more.
  static double bound(const double* x, Int n) {
    return static_cast<double>(n) * std::abs(x[n - 1] - x[0]) * std::abs(x[n - 1] - x[0]);
  }

  static double exact(const double* x, Int l, Int e) {
    Sum sum;
    for (Int i = l; i < e; ++i) sum.add(x[i] - x[l]);
    const double mean = x[l] + sum.value() / static_cast<double>(e - l);
    Sum deviation, square;
    for (Int i = l; i < e; ++i) deviation.add(x[i] - mean), square.add((x[i] - mean) * (x[i] - mean));
    return std::max(0.0, square.value() - deviation.value() * deviation.value() / static_cast<double>(e - l));
  }

  class Filter {
   public:
    explicit Filter(const SquaredCost& cost) : cost_(cost), sum_(cost.size() + 1) {
      scale_ = std::ldexp(1.0, cost.tie_bits_ - cost.drop_bits_);
      double largest = 0;
      for (Int i = 0; i <= cost.size(); ++i) {
        sum_[i] = to_double(cost.sum_[i]);
        largest = std::max(largest, std::abs(sum_[i]));
      }
      const double n = static_cast<double>(cost.size());
      const double spread = std::abs(to_double(cost.sum_[1])) + std::abs(sum_[cost.size()] - sum_[cost.size() - 1]);
      // Rounding of a difference of sums, times the largest mean, and of the sums of squares; left out: rounding of
      // the cost to an integer and the squared size.
      margin_ = scale_ * (std::ldexp(largest * spread + n * spread * spread, -47) + 4) + 4 * n * n;
    }
    void set(const Wide* values, Int first, Int last) {
      first_ = first, left_.resize(last - first + 1);
      for (Int l = first; l <= last; ++l)
        left_[l - first] = to_double(values[l]) - scale_ * to_double(static_cast<Wide>(cost_.square_[l]));
    }
    double minimum(Int e, Int first, Int last) const {
      return minimum_of(&left_[first - first_], &sum_[first], last - first + 1, sum_[e], scale_, e - first);
    }
    Int next(Int e, Int from, Int last, double bound) const {
      return from + next_of(&left_[from - first_], &sum_[from], last - from + 1, sum_[e], scale_, e - from, bound);
    }
    double margin() const { return margin_; }

   private:
    static DIFFMTL_INLINE double value(double left, double difference, double scale, double n) {
      return left - difference * difference * (scale / n);
    }
    DIFFMTL_CLONES static double minimum_of(const double* left, const double* sum, Int n, double end, double scale,
                                            Int size) {
      return diffmtl::minimum(n, HUGE_VAL, [=](Int i) {
        return value(left[i], end - sum[i], scale, static_cast<double>(static_cast<int>(size - i)));
      });
    }
    DIFFMTL_CLONES static Int next_of(const double* left, const double* sum, Int n, double end, double scale, Int size,
                                      double bound) {
      return first_within(0, n, bound, [=](Int i) {
        return value(left[i], end - sum[i], scale, static_cast<double>(static_cast<int>(size - i)));
      });
    }
    const SquaredCost& cost_;
    std::vector<double> sum_, left_;
    Int first_ = 0;
    double scale_, margin_;
  };

 private:
  std::vector<Wide> sum_;
  std::vector<UWide> square_;
  int tie_bits_ = 0, drop_bits_ = 0, unit_ = 0;
};

}  // namespace diffmtl
