// Functions of a symmetric matrix, by its eigenvalues.
#pragma once
#include "gramians.hpp"

namespace diffmtl::cpu {
namespace {

// A = Q Z diag(values) Z^T Q^T: Q by Householder's reflections to a tridiagonal matrix, Z by the rotations of the implicit
// QR method, of matrices whose largest entries are near 1 (Golub and Van Loan, "Matrix Computations", sections 8.3.1 and 8.3.3). Neither is formed: vectors are
// taken through, which costs a square of n each.
class Eigen {
 public:
  Eigen(Matrix a, const Vec& b) : values_(a.size), image_(b), reflectors_(std::move(a)), factors_(values_.size()) {
    reduce();
    diagonalise();
  }

  const Vec& values() const { return values_; }

  // V diag(function) V^T b, for function(eigenvalue).
  template <class Function>
  Vec apply(const Function& function) const {
    Vec x = image_;
    const int n = static_cast<int>(x.size());
    for (int i = 0; i < n; ++i) x[i] *= function(values_[i]);
    for (auto r = rotations_.rbegin(); r != rotations_.rend(); ++r) rotate(x, {r->index, r->cosine, -r->sine});
    for (int j = n - 3; j >= 0; --j) reflect(x, j);
    return x;
  }

 private:
  struct Rotation {
    int index;  // of the first of two neighbours
    double cosine, sine;
  };

  static void rotate(Vec& x, const Rotation& r) {
    const double first = x[r.index], second = x[r.index + 1];
    x[r.index] = r.cosine * first + r.sine * second;
    x[r.index + 1] = r.cosine * second - r.sine * first;
  }

  // Row j of the matrix holds the vector v of I - factor v v^T behind its diagonal.
  void reflect(Vec& x, int j) const {
    const int begin = j + 1, n = static_cast<int>(x.size());
    const double* v = reflectors_[j] + begin;
    add_scaled(x.data() + begin, -factors_[j] * dot(v, x.data() + begin, n - begin), v, n - begin);
  }

  void reduce() {
    Matrix& a = reflectors_;
    const int n = a.size;
    Vec image(n);
    beside_.assign(n, 0.0);
    for (int j = 0; j < n; ++j) {
      values_[j] = a[j][j];
      const int begin = j + 1, size = n - begin;
      if (size == 0) break;
      double* v = a[j] + begin;
      const double length = std::sqrt(dot(v, v, size));
      if (size == 1 || !(length > 0)) {
        beside_[j] = v[0];  // 0 or the last one: nothing to reflect
        continue;
      }
      beside_[j] = v[0] > 0 ? -length : length;
      v[0] -= beside_[j];
      factors_[j] = 2 / dot(v, v, size);
      reflect(image_, j);
      std::fill(image.begin(), image.begin() + size, 0.0);
      for (int i = 0; i < size; ++i) add_scaled(image.data(), factors_[j] * v[i], a[begin + i] + begin, size);
      add_scaled(image.data(), -0.5 * factors_[j] * dot(image.data(), v, size), v, size);
      for (int i = 0; i < size; ++i) {
        double* row = a[begin + i] + begin;
        const double first = v[i], second = image[i];
        for (int k = 0; k < size; ++k) row[k] -= first * image[k] + second * v[k];
      }
    }
  }

  // The eigenvalues of the tridiagonal matrix; image_ is taken along.
  void diagonalise() {
    // kTiny: the squares of larger entries do not underflow, and an eigenvalue below it counts as 0.
    constexpr double kEpsilon = std::numeric_limits<double>::epsilon(), kTiny = 1e-100;
    constexpr int kStepsPerValue = 30;
    Vec& d = values_;
    Vec& e = beside_;
    int last = static_cast<int>(d.size()) - 1;
    for (int step = kStepsPerValue * (last + 1); last > 0 && step > 0; --step) {
      const auto small = [&](int i) {
        return std::abs(e[i]) <= kEpsilon * (std::abs(d[i]) + std::abs(d[i + 1])) + kTiny;
      };
      if (small(last - 1)) {
        --last;
        continue;
      }
      int first = last - 1;
      while (first > 0 && !small(first - 1)) --first;
      // Wilkinson's shift: the eigenvalue of the last two rows that is nearer to the last entry.
      const double half = (d[last - 1] - d[last]) / 2, b = e[last - 1];
      const double shift = d[last] - b * b / (half + std::copysign(std::sqrt(half * half + b * b), half));
      double x = d[first] - shift, z = e[first];
      for (int i = first; i < last; ++i) {
        const double r = std::sqrt(x * x + z * z), inverse = 1 / r, c = r > 0 ? x * inverse : 1, s = r > 0 ? z * inverse : 0;
        if (i > first) e[i - 1] = r;
        const double high = d[i], low = d[i + 1], mixed = 2 * c * s * e[i];
        d[i] = c * c * high + mixed + s * s * low;
        d[i + 1] = s * s * high - mixed + c * c * low;
        e[i] = c * s * (low - high) + (c * c - s * s) * e[i];
        x = e[i];
        if (i + 1 < last) z = s * e[i + 1], e[i + 1] *= c;
        rotations_.push_back({i, c, s});
        rotate(image_, rotations_.back());
      }
    }
  }

  Vec values_, beside_, image_;  // image_: V^T b
  Matrix reflectors_;
  Vec factors_;
  std::vector<Rotation> rotations_;
};

}  // namespace
}  // namespace diffmtl::cpu
