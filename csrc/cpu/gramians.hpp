// Small matrices in float64, and Gramians without their gradients' norms.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "numbers.hpp"

namespace diffmtl::cpu {
namespace {

using Vec = std::vector<double>;

// A square matrix in rows.
struct Matrix {
  explicit Matrix(int n) : size(n), entries(static_cast<std::size_t>(n) * n) {}
  double* operator[](int i) { return &entries[static_cast<std::size_t>(i) * size]; }
  const double* operator[](int i) const { return &entries[static_cast<std::size_t>(i) * size]; }

  int size;
  Vec entries;
};

// A Gramian without the gradients' norms: right for any norms that its type can hold.
struct UnitGramian {
  explicit UnitGramian(int n) : cosines(n), norms(n, 1.0) {}

  Matrix cosines;           // with a diagonal of ones; of a cluster that is not active the row of the identity
  Vec norms;                // 1 for a cluster that is not active
  std::vector<int> active;  // the present clusters whose gradient is not zero
  bool finite = true;       // whether the Gramian of the present clusters is
};

// present: bool [k], null for all. What stands in the rows of absent clusters is not looked at.
inline UnitGramian read_unit_gramian(const Handle& gramian, int k, const bool* present) {
  const Numbers numbers(gramian);
  UnitGramian unit(k);
  Vec inverse(k);  // 0 for a cluster that is not active
  for (int i = 0; i < k; ++i) {
    unit.cosines[i][i] = 1;
    if (present && !present[i]) continue;
    const double square = numbers.at(i * numbers.stride + i);
    unit.finite = unit.finite && std::isfinite(square);
    if (!(square > 0)) continue;
    unit.active.push_back(i);
    unit.norms[i] = std::sqrt(square);
    inverse[i] = 1 / unit.norms[i];
  }
  for (int i = 0; i < k; ++i)
    for (int j = 0; j < k; ++j) {
      if (i == j || (present && !(present[i] && present[j]))) continue;
      const double entry = numbers.at(i * numbers.stride + j);
      unit.finite = unit.finite && std::isfinite(entry);
      // One norm after the other: their product could overflow.
      unit.cosines[i][j] = entry * inverse[i] * inverse[j];
    }
  return unit;
}

inline double dot(const double* a, const double* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

inline double dot(const Vec& a, const Vec& b) { return dot(a.data(), b.data(), static_cast<int>(a.size())); }

// y += factor * x: compilers turn this into vector registers, and a sum they do not.
inline void add_scaled(double* y, double factor, const double* x, int n) {
  for (int i = 0; i < n; ++i) y[i] += factor * x[i];
}

inline Vec product(const Matrix& symmetric, const Vec& x) {
  Vec y(x.size());
  for (int i = 0; i < symmetric.size; ++i) add_scaled(y.data(), x[i], symmetric[i], symmetric.size);
  return y;
}

// Puts x with A x = b into b, by symmetric elimination on the upper triangle. 0 where A is not positive definite.
inline void solve_positive_definite(Matrix& a, Vec& b) {
  const int n = a.size;
  for (int j = 0; j < n; ++j) {
    if (!(a[j][j] > 0)) {
      b.assign(n, 0.0);
      return;
    }
    for (int i = j + 1; i < n; ++i) {
      const double factor = a[j][i] / a[j][j];
      add_scaled(a[i] + i, -factor, a[j] + i, n - i);
      b[i] -= factor * b[j];
    }
  }
  for (int i = n - 1; i >= 0; --i) {
    for (int j = i + 1; j < n; ++j) b[i] -= a[i][j] * b[j];
    b[i] /= a[i][i];
  }
}

// The trace of A^-1, after `solve_positive_definite` has eliminated A; infinite where A is not positive definite.
inline double inverse_trace(const Matrix& eliminated) {
  const int n = eliminated.size;
  Matrix rows(n);  // the elimination of the identity
  double trace = 0;
  for (int j = 0; j < n; ++j) {
    const double pivot = eliminated[j][j];
    if (!(pivot > 0)) return std::numeric_limits<double>::infinity();
    rows[j][j] = 1;
    trace += dot(rows[j], rows[j], j + 1) / pivot;
    for (int i = j + 1; i < n; ++i) add_scaled(rows[i], -eliminated[j][i] / pivot, rows[j], j + 1);
  }
  return trace;
}

// The active clusters alone.
struct ActiveGramian {
  explicit ActiveGramian(const UnitGramian& unit) : cosines(static_cast<int>(unit.active.size())), norms(unit.active.size()) {
    const int n = cosines.size;
    double largest = 0;
    for (const int i : unit.active) largest = std::max(largest, unit.norms[i]);
    for (int i = 0; i < n; ++i) {
      norms[i] = unit.norms[unit.active[i]] / largest;
      for (int j = 0; j < n; ++j) cosines[i][j] = unit.cosines[unit.active[i]][unit.active[j]];
    }
  }

  // The Gramian of gradients of these norms.
  Matrix gramian() const {
    Matrix found = cosines;
    for (int i = 0; i < found.size; ++i)
      for (int j = 0; j < found.size; ++j) found[i][j] *= norms[i] * norms[j];
    return found;
  }

  Matrix cosines;
  Vec norms;  // relative to the largest
};

inline double frobenius_norm(const Matrix& matrix) { return std::sqrt(dot(matrix.entries, matrix.entries)); }

// Weights of the active clusters, 0 of the others; all NaN where the Gramian is not finite.
template <class Solve>
void write_active_weights(const Handle& gramian, int k, std::uintptr_t present, std::uintptr_t out, const Solve& solve) {
  const UnitGramian unit = read_unit_gramian(gramian, k, reinterpret_cast<const bool*>(present));
  Vec weights(k, unit.finite ? 0.0 : std::numeric_limits<double>::quiet_NaN());
  if (unit.finite && !unit.active.empty()) {
    const Vec found = solve(ActiveGramian(unit));
    for (std::size_t i = 0; i < found.size(); ++i) weights[unit.active[i]] = found[i];
  }
  for (int i = 0; i < k; ++i) write_number(out, static_cast<DType>(std::get<1>(gramian)), i, weights[i]);
}

}  // namespace
}  // namespace diffmtl::cpu
