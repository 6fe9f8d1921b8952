// Exact arithmetic for the interval costs.
//
// Costs are 128-bit integers: fixed-point cost in the upper bits, the sum of squared interval sizes in the
// lower ones. Sums are then exact in any order, so every solver finds the same optimum, ties are ties, and
// among equal costs the smaller sum of squares, i.e. the most equal sizes, wins by plain comparison.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace diffmtl {

using Int = std::int64_t;
using Wide = __int128;
using UWide = unsigned __int128;

constexpr Int kMaxTimesteps = Int{1} << 28;

// Bits to hold 0 .. n.
inline int bit_width(Int n) {
  int bits = 0;
  while (n > 0) ++bits, n >>= 1;
  return bits;
}

inline double to_double(Wide x) {
  return static_cast<double>(static_cast<Int>(x >> 64)) * 18446744073709551616.0 +
         static_cast<double>(static_cast<std::uint64_t>(x));
}

// x · 2^shift rounded to an integer, without overflow or underflow of 2^shift itself.
inline Int to_fixed(double x, double half_scale, double rest_scale) {
  return static_cast<Int>(std::llrint(x * half_scale * rest_scale));
}

// Non-decreasing doubles as integers of `bits` bits relative to the largest magnitude.
//
// Nothing is rounded away that matters: either the values lie within a factor of two of each other, so that
// subtracting the smallest is exact, or their range is at least half the largest magnitude. shift_out: the number
// of fractional bits.
inline std::vector<Int> quantise(const double* x, Int n, int bits, int* shift_out) {
  const auto [low, high] = std::minmax_element(x, x + n);
  const bool same_binade = (*low > 0 && *high <= 2 * *low) || (*high < 0 && *low >= 2 * *high);
  const double offset = same_binade ? *low : 0.0;
  const double magnitude = std::max(std::abs(*high - offset), std::abs(*low - offset));
  const int shift = magnitude > 0 ? bits - 1 - std::ilogb(magnitude) : 0;
  const double half_scale = std::ldexp(1.0, shift / 2), rest_scale = std::ldexp(1.0, shift - shift / 2);
  std::vector<Int> fixed(n);
  for (Int i = 0; i < n; ++i) fixed[i] = to_fixed(x[i] - offset, half_scale, rest_scale);
  *shift_out = shift;
  return fixed;
}

// Sum with an error of about one rounding (Neumaier).
class Sum {
 public:
  void add(double x) {
    const double next = total_ + x;
    error_ += std::abs(total_) >= std::abs(x) ? (total_ - next) + x : (x - next) + total_;
    total_ = next;
  }
  double value() const { return total_ + error_; }

 private:
  double total_ = 0, error_ = 0;
};

}  // namespace diffmtl
