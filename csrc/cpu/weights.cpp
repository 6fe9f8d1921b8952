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

Matrix read_matrix(const Handle& rows, int n, bool transposed) {
  const Numbers numbers(rows);
  Matrix matrix(n);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) (transposed ? matrix[j][i] : matrix[i][j]) = numbers.at(i * numbers.stride + j);
  return matrix;
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
  // In rows of the transpose, so that <g_l, g_j> for all l lies together.
  const Matrix gram = read_matrix(gramian, k, true);
  const Int* order = reinterpret_cast<const Int*>(order_data);
  const bool* present = reinterpret_cast<const bool*>(present_data);
  Vec weights(k), products(k);
  for (int i = 0; i < k; ++i, order += k - 1) {
    // products[j] = <g_i', g_j> is kept up to date; the coefficients of g_i' go straight into the weights.
    products.assign(gram[i], gram[i] + k);
    if (present[i]) weights[i] += 1;
    for (int step = 0; step < k - 1; ++step) {
      const Int j = order[step];
      if (j < 0 || j >= k)
        throw std::invalid_argument("order: expected indices in 0.." + std::to_string(k - 1) + ", found " + std::to_string(j));
      const double* partner = gram[static_cast<int>(j)];
      if (!(products[j] < 0 && partner[j] > 0)) continue;
      const double share = products[j] / partner[j];
      add_scaled(products.data(), -share, partner, k);
      if (present[i]) weights[j] -= share;
    }
  }
  const DType dtype = static_cast<DType>(std::get<1>(gramian));
  for (int i = 0; i < k; ++i) write_number(out, dtype, i, present[i] ? weights[i] : 0.0);
}

// ---- Nash ----------------------------------------------------------------------------------------------------------

namespace {

// The bounds of the iteration; the values are those of the plain definition.
struct Limits {
  int newton_steps, line_search_steps;
  double converged;  // Newton decrement: the objective is within its square of the minimum
};

// Puts x with A x = b into b, by symmetric elimination on the upper triangle. NaN where A is not positive definite.
void solve_positive_definite(Matrix& a, Vec& b) {
  const int n = a.size;
  for (int j = 0; j < n; ++j) {
    if (!(a[j][j] > 0)) {
      b.assign(n, std::numeric_limits<double>::quiet_NaN());
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

// The length of the step that minimises the objective along it, inside beta > 0, by Newton's method in one unknown.
double line_search(double slope, double curvature, const Vec& ratio, double decrement, int steps) {
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
    double tried = length - first / second;
    // Halve the way to a bound that the step would cross. At the minimum 0/0 leaves the length as it is.
    if (tried <= 0) tried = length / 2;
    if (tried >= limit) tried = (length + limit) / 2;
    if (std::isfinite(tried)) length = tried;
  }
  return length;
}

// Minimises 1/2 beta^T M beta - sum log beta over beta > 0.
Vec minimise_barrier(const Matrix& matrix, const Limits& limits) {
  const int n = matrix.size;
  double curvature = 0;
  for (const double entry : matrix.entries) curvature += entry;
  // The minimum along the ray of equal beta. Written so that a NaN stays one.
  if (curvature < std::numeric_limits<double>::min()) curvature = std::numeric_limits<double>::min();
  Vec beta(n, std::sqrt(n / curvature)), step(n), ratio(n);
  for (int iteration = 0; iteration < limits.newton_steps; ++iteration) {
    const Vec image = product(matrix, beta);
    Matrix hessian = matrix;
    Vec gradient(n);
    for (int i = 0; i < n; ++i) {
      gradient[i] = image[i] - 1 / beta[i];
      step[i] = -gradient[i];
      hessian[i][i] += 1 / (beta[i] * beta[i]);
    }
    solve_positive_definite(hessian, step);
    const double decrement = std::sqrt(std::max(0.0, -dot(gradient, step)));
    if (!(decrement > limits.converged)) break;
    for (int i = 0; i < n; ++i) ratio[i] = step[i] / beta[i];
    const double slope = dot(image, step);
    const double curvature_along = dot(step, product(matrix, step));
    const double length = line_search(slope, curvature_along, ratio, decrement, limits.line_search_steps);
    for (int i = 0; i < n; ++i) beta[i] += length * step[i];
  }
  return beta;
}

}  // namespace

void nash_weights(const Handle& gramian, int k, double epsilon, std::uintptr_t present_data, int newton_steps,
                  int line_search_steps, double converged, std::uintptr_t out) {
  const Matrix gram = read_matrix(gramian, k, false);
  const bool* present = reinterpret_cast<const bool*>(present_data);
  std::vector<int> active;
  bool finite = true;
  for (int i = 0; i < k; ++i) {
    if (!present[i]) continue;
    finite = finite && std::isfinite(gram[i][i]);
    if (gram[i][i] > 0) active.push_back(i);
  }
  Vec weights(k, finite ? 0.0 : std::numeric_limits<double>::quiet_NaN());
  if (finite && !active.empty()) {
    const int n = static_cast<int>(active.size());
    Matrix cosines(n);
    double squares = 0;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) {
        const double entry = gram[active[i]][active[j]];
        squares += entry * entry;
        cosines[i][j] = i == j ? 1 + k * epsilon
                               : entry * (1 / std::sqrt(gram[active[i]][active[i]])) * (1 / std::sqrt(gram[active[j]][active[j]]));
      }
    const Vec beta = minimise_barrier(cosines, {newton_steps, line_search_steps, converged});
    // The published method divides G by its Frobenius norm first; in the unknowns that is this factor.
    const double scale = std::sqrt(std::sqrt(squares));
    for (int i = 0; i < n; ++i) weights[active[i]] = beta[i] / std::sqrt(gram[active[i]][active[i]]) * scale;
  }
  for (int i = 0; i < k; ++i) write_number(out, static_cast<DType>(std::get<1>(gramian)), i, weights[i]);
}

}  // namespace diffmtl::cpu
