// The O(k n²) dynamic programme, for costs without the quadrangle inequality.
#pragma once
#include <limits>

#include "windows.hpp"

namespace diffmtl {

// Gradient affinity: −Σ_t A[c, t] over the interval, c its middle element. In 64-bit fixed point, exact sums.
class AffinityCost {
 public:
  AffinityCost(const double* matrix, Int n) : matrix_(matrix), n_(n) {
    double magnitude = 0;
    for (Int i = 0; i < n * n; ++i) magnitude = std::max(magnitude, std::abs(matrix[i]));
    const int shift = magnitude > 0 ? 61 - bit_width(n) - std::ilogb(magnitude) - 1 : 0;
    half_scale_ = std::ldexp(1.0, shift / 2), rest_scale_ = std::ldexp(1.0, shift - shift / 2);
  }

  Int size() const { return n_; }
  Int entry(Int c, Int t) const { return -to_fixed(matrix_[c * n_ + t], half_scale_, rest_scale_); }

  static double exact(const double* matrix, Int n, Int l, Int e) {
    const double* row = matrix + ((l + e) / 2) * n;
    Sum sum;
    for (Int t = l; t < e; ++t) sum.add(-row[t]);
    return sum.value();
  }

 private:
  const double* matrix_;
  Int n_;
  double half_scale_, rest_scale_;
};

inline std::vector<Int> solve_affinity(const AffinityCost& cost, Int k, Limits limits) {
  const Int n = cost.size();
  constexpr Int kInfinity = std::numeric_limits<Int>::max() / 2;
  const std::vector<Window> windows = all_positions(n, k, limits);
  std::vector<std::vector<Int>> value(k + 1, std::vector<Int>(n + 1, kInfinity)), squares = value;
  std::vector<std::vector<std::int32_t>> argument(k + 1, std::vector<std::int32_t>(n + 1));
  value[0][0] = squares[0][0] = 0;
  // window_sum[c]: the largest interval ending at e with centre c. It grows on both sides as e advances.
  std::vector<Int> window_sum(n + 1, 0), row(n);
  for (Int e = 1; e <= n; ++e) {
    for (Int c = e / 2; c < e; ++c) {
      const Int odd = 2 * c + 1 - e, even = odd - 1;
      window_sum[c] += cost.entry(c, e - 1);
      row[odd] = window_sum[c];
      if (even >= 0) row[even] = window_sum[c] += cost.entry(c, even);
    }
    for (Int j = 1; j <= k; ++j) {
      if (e < windows[j].first || e > windows[j].last) continue;
      const Int first = std::max(windows[j - 1].first, e - limits.max);
      const Int last = std::min(windows[j - 1].last, e - limits.min);
      Int best = kInfinity, best_squares = kInfinity, best_l = first;
      for (Int l = first; l <= last; ++l) {
        const Int total = value[j - 1][l] + row[l];
        if (total > best) continue;
        const Int total_squares = squares[j - 1][l] + (e - l) * (e - l);
        if (total < best || total_squares < best_squares) best = total, best_squares = total_squares, best_l = l;
      }
      value[j][e] = best, squares[j][e] = best_squares, argument[j][e] = static_cast<std::int32_t>(best_l);
    }
  }
  std::vector<Int> boundaries(k + 1);
  boundaries[k] = n;
  for (Int j = k; j > 0; --j) boundaries[j - 1] = argument[j][boundaries[j]];
  return boundaries;
}

}  // namespace diffmtl
