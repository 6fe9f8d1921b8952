// Weights from a Gramian, in float64: as in the plain definitions in diffmtl_fast/ops.
#include "weights.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
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

// What stands in the rows of absent clusters is not looked at.
UnitGramian read_unit_gramian(const Handle& gramian, int k, const bool* present) {
  const Numbers numbers(gramian);
  UnitGramian unit(k);
  Vec inverse(k);  // 0 for a cluster that is not active
  for (int i = 0; i < k; ++i) {
    unit.cosines[i][i] = 1;
    if (!present[i]) continue;
    const double square = numbers.at(i * numbers.stride + i);
    unit.finite = unit.finite && std::isfinite(square);
    if (!(square > 0)) continue;
    unit.active.push_back(i);
    unit.norms[i] = std::sqrt(square);
    inverse[i] = 1 / unit.norms[i];
  }
  for (int i = 0; i < k; ++i)
    for (int j = 0; j < k; ++j) {
      if (i == j || !present[i] || !present[j]) continue;
      const double entry = numbers.at(i * numbers.stride + j);
      unit.finite = unit.finite && std::isfinite(entry);
      // One norm after the other: their product could overflow.
      unit.cosines[i][j] = entry * inverse[i] * inverse[j];
    }
  return unit;
}

double dot(const Vec& a, const Vec& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// y += factor * x: compilers turn this into vector registers, and a sum they do not.
void add_scaled(double* y, double factor, const double* x, int n) {
  for (int i = 0; i < n; ++i) y[i] += factor * x[i];
}

Vec product(const Matrix& symmetric, const Vec& x) {
  Vec y(x.size());
  for (int i = 0; i < symmetric.size; ++i) add_scaled(y.data(), x[i], symmetric[i], symmetric.size);
  return y;
}

// ---- PCGrad --------------------------------------------------------------------------------------------------------

}  // namespace

void pcgrad_weights(const Handle& gramian, int k, std::uintptr_t order_data, std::uintptr_t present_data, std::uintptr_t out) {
  const Int* order = reinterpret_cast<const Int*>(order_data);
  const bool* present = reinterpret_cast<const bool*>(present_data);
  const UnitGramian unit = read_unit_gramian(gramian, k, present);
  Vec weights(k), products(k);
  for (int i = 0; i < k; ++i, order += k - 1) {
    // products[j] = <g_i', g_j> / (|g_i| |g_j|) is kept up to date; the coefficients of g_i' go straight into the weights.
    products.assign(unit.cosines[i], unit.cosines[i] + k);
    weights[i] += 1;
    for (int step = 0; step < k - 1; ++step) {
      const Int j = order[step];
      if (j < 0 || j >= k)
        throw std::invalid_argument("order: expected indices in 0.." + std::to_string(k - 1) + ", found " + std::to_string(j));
      const double share = products[j];
      if (!(share < 0)) continue;
      add_scaled(products.data(), -share, unit.cosines[static_cast<int>(j)], k);
      weights[j] -= share * unit.norms[i] / unit.norms[j];
    }
  }
  const DType dtype = static_cast<DType>(std::get<1>(gramian));
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (int i = 0; i < k; ++i) write_number(out, dtype, i, !unit.finite ? nan : present[i] ? weights[i] : 0.0);
}

// ---- Nash ----------------------------------------------------------------------------------------------------------

namespace {

// The bounds of the iteration; the values are those of the plain definition.
struct Limits {
  int newton_steps, line_search_steps;
  double converged;  // Newton decrement before the last step
};

// Puts x with A x = b into b, by symmetric elimination on the upper triangle. 0 where A is not positive definite.
void solve_positive_definite(Matrix& a, Vec& b) {
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

// max(0, delta |beta|^2 / n - 1) along a step: where it is positive, the ridge is.
struct Excess {
  double square, mixed, bend;  // delta / n times |beta|^2, <beta, step>, |step|^2

  double at(double length) const { return std::max(0.0, square + length * (2 * mixed + length * bend) - 1); }
};

// The length of the step that minimises the objective along it, inside beta > 0, by Newton's method in one unknown.
double line_search(double slope, double curvature, const Vec& ratio, const Excess& excess, double decrement, int steps) {
  const double n = static_cast<double>(ratio.size());
  double limit = std::numeric_limits<double>::infinity();
  for (const double r : ratio)
    if (r < 0) limit = std::min(limit, -1 / r);
  double length = 1 / (1 + decrement);  // always inside, and a sure decrease
  for (int i = 0; i < steps; ++i) {
    double first = slope + length * curvature, second = curvature;
    for (const double r : ratio) {
      const double slack = r / (1 + length * r);
      first -= slack, second += slack * slack;
    }
    if (const double over = excess.at(length); over > 0) {
      const double growth = excess.mixed + length * excess.bend;
      first += n * over * growth, second += n * (over * excess.bend + 2 * growth * growth);
    }
    double tried = length - first / second;
    // Halve the way to a bound that the step would cross. At the minimum 0/0 leaves the length as it is.
    if (tried <= 0) tried = length / 2;
    if (tried >= limit) tried = (length + limit) / 2;
    if (std::isfinite(tried)) length = tried;
  }
  return length;
}

// Minimises 1/2 beta^T M beta - sum log beta + n/4 max(0, delta |beta|^2 / n - 1)^2 over beta > 0.
Vec minimise_barrier(const Matrix& matrix, double delta, const Limits& limits) {
  const int n = matrix.size;
  const double share = delta / n;
  double curvature = 0;
  for (const double entry : matrix.entries) curvature += entry;
  // The minimum along the ray of equal beta, or where the ridge begins.
  Vec beta(n, std::sqrt(n / std::max(curvature, n * delta))), step(n), ratio(n);
  for (int iteration = 0; iteration < limits.newton_steps; ++iteration) {
    const Vec image = product(matrix, beta);
    Matrix hessian = matrix;
    Vec gradient(n);
    const double square = share * dot(beta, beta), ridge = delta * std::max(0.0, square - 1);
    for (int i = 0; i < n; ++i) {
      gradient[i] = image[i] + ridge * beta[i] - 1 / beta[i];
      step[i] = -gradient[i];
      hessian[i][i] += 1 / (beta[i] * beta[i]) + ridge;
      if (ridge > 0) add_scaled(hessian[i], 2 * delta * share * beta[i], beta.data(), n);
    }
    solve_positive_definite(hessian, step);
    const double descent = -dot(gradient, step);  // the decrement's square; not positive where only rounding is left
    if (!(descent > 0)) break;
    const double decrement = std::sqrt(descent);
    double length = 1;
    if (decrement > limits.converged) {
      for (int i = 0; i < n; ++i) ratio[i] = step[i] / beta[i];
      const Excess excess{square, share * dot(beta, step), share * dot(step, step)};
      length = line_search(dot(image, step), dot(step, product(matrix, step)), ratio, excess, decrement, limits.line_search_steps);
    }
    for (int i = 0; i < n; ++i) beta[i] += length * step[i];
    if (!(decrement > limits.converged)) break;
  }
  return beta;
}

}  // namespace

void nash_weights(const Handle& gramian, int k, double delta, std::uintptr_t present_data, int newton_steps,
                  int line_search_steps, double converged, std::uintptr_t out) {
  const UnitGramian unit = read_unit_gramian(gramian, k, reinterpret_cast<const bool*>(present_data));
  Vec weights(k, unit.finite ? 0.0 : std::numeric_limits<double>::quiet_NaN());
  if (unit.finite && !unit.active.empty()) {
    const int n = static_cast<int>(unit.active.size());
    double largest = 0, squares = 0;
    for (const int i : unit.active) largest = std::max(largest, unit.norms[i]);
    Matrix cosines(n);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) {
        const int a = unit.active[i], b = unit.active[j];
        cosines[i][j] = unit.cosines[a][b];
        const double entry = cosines[i][j] * (unit.norms[a] / largest) * (unit.norms[b] / largest);
        squares += entry * entry;
      }
    const Vec beta = minimise_barrier(cosines, delta, {newton_steps, line_search_steps, converged});
    // The published method divides G by its Frobenius norm first; in the unknowns that is a factor of its root.
    const double root = std::sqrt(std::sqrt(squares));
    for (int i = 0; i < n; ++i) weights[unit.active[i]] = beta[i] * root * (largest / unit.norms[unit.active[i]]);
  }
  for (int i = 0; i < k; ++i) write_number(out, static_cast<DType>(std::get<1>(gramian)), i, weights[i]);
}

}  // namespace diffmtl::cpu
