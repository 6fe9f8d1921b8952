// The minimum of a convex quadratic over non-negative unknowns.
#pragma once
#include "gramians.hpp"

namespace diffmtl::cpu {
namespace {

// Minimises 1/2 x^T Q x + q^T x over x >= 0 by the active-set method of Lawson and Hanson, "Solving Least Squares
// Problems", 1974, chapter 23: unknowns enter the support one at a time, and a Cholesky factor of Q on it grows by a row.
class NonnegativeQuadratic {
 public:
  // Q symmetric positive definite; a ridge makes a semidefinite one so.
  explicit NonnegativeQuadratic(const Matrix& matrix)
      : matrix_(matrix), n_(matrix.size), factor_(n_), inverse_(n_), forward_(n_), target_(n_), slope_(n_), useless_(n_) {}

  // x: where to begin, and in the end the minimum for this q.
  void minimise(const double* linear, Vec& x) {
    double largest = 0;
    for (int i = 0; i < n_; ++i) largest = std::max(largest, std::abs(linear[i]));
    support_.clear();
    for (int i = 0; i < n_; ++i)
      if (x[i] > 0 && !enter(i, linear)) x[i] = 0;
    bool at_minimum = support_.empty();  // of the support
    std::fill(useless_.begin(), useless_.end(), false);
    for (int step = 0; step < kStepsPerUnknown * n_; ++step) {
      if (at_minimum) {
        const int steepest = find_steepest(linear, x, -kZero * largest);
        if (steepest < 0) return;
        // Rounding can find a slope where there is none: of a gradient that depends on those of the support.
        useless_[steepest] = true;
        if (!enter(steepest, linear)) continue;
        if (!(forward_[support_.size() - 1] > 0)) {  // it would fall below 0 at once
          support_.pop_back();
          continue;
        }
      }
      at_minimum = move(linear, x);
    }
  }

 private:
  static constexpr double kZero = 1e-13;  // the relative slope that counts as zero
  static constexpr int kStepsPerUnknown = 4;

  // Adds a row to the factor, and an entry to the solution of L y = -q on the support. False where the pivot is lost.
  bool enter(int unknown, const double* linear) {
    const int s = static_cast<int>(support_.size());
    double* row = factor_[s];
    for (int i = 0; i < s; ++i) row[i] = (matrix_[unknown][support_[i]] - dot(row, factor_[i], i)) * inverse_[i];
    const double pivot = matrix_[unknown][unknown] - dot(row, row, s);
    if (!(pivot > 0)) return false;
    inverse_[s] = 1 / std::sqrt(pivot);
    forward_[s] = (-linear[unknown] - dot(row, forward_.data(), s)) * inverse_[s];
    support_.push_back(unknown);
    return true;
  }

  int find_steepest(const double* linear, const Vec& x, double below) {
    std::copy(linear, linear + n_, slope_.begin());
    for (const int i : support_) add_scaled(slope_.data(), x[i], matrix_[i], n_), useless_[i] = true;
    int steepest = -1;
    for (int i = 0; i < n_; ++i)
      if (!useless_[i] && slope_[i] < below) below = slope_[i], steepest = i;
    return steepest;
  }

  // Goes towards the minimum on the support, up to the first unknown that falls to 0 and leaves it. Whether it got there.
  bool move(const double* linear, Vec& x) {
    const int s = static_cast<int>(support_.size());
    std::copy(forward_.begin(), forward_.begin() + s, target_.begin());
    for (int i = s - 1; i >= 0; --i) {
      target_[i] *= inverse_[i];
      add_scaled(target_.data(), -target_[i], factor_[i], i);
    }
    double length = 1;
    int first = -1;
    for (int i = 0; i < s; ++i) {
      const double now = x[support_[i]];
      if (!(target_[i] < 0) || now / (now - target_[i]) > length) continue;
      length = now / (now - target_[i]), first = i;
    }
    for (int i = 0; i < s; ++i) {
      double& now = x[support_[i]];
      now = first < 0 ? target_[i] : std::max(0.0, now + length * (target_[i] - now));
    }
    std::fill(useless_.begin(), useless_.end(), false);
    if (first < 0) return true;
    x[support_[first]] = 0;
    const std::vector<int> kept(support_.begin() + first + 1, support_.end());
    support_.resize(first);
    for (const int i : kept)
      if (!enter(i, linear)) x[i] = 0;
    return support_.empty();
  }

  const Matrix& matrix_;
  int n_;
  std::vector<int> support_;
  Matrix factor_;
  Vec inverse_, forward_, target_, slope_;
  std::vector<char> useless_;  // unknowns that may not enter
};

}  // namespace
}  // namespace diffmtl::cpu
