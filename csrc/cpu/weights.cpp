// PCGrad's, GradVac's and Nash's weights from a Gramian, in float64: as in the plain definitions in diffmtl_fast/ops.
#include "weights.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "gramians.hpp"

namespace diffmtl::cpu {
namespace {

int checked_index(Int j, int k) {
  if (j < 0 || j >= k)
    throw std::invalid_argument("order: expected indices in 0.." + std::to_string(k - 1) + ", found " + std::to_string(j));
  return static_cast<int>(j);
}

}  // namespace

// ---- PCGrad --------------------------------------------------------------------------------------------------------

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
      const int j = checked_index(order[step], k);
      const double share = products[j];
      if (!(share < 0)) continue;
      add_scaled(products.data(), -share, unit.cosines[j], k);
      weights[j] -= share * unit.norms[i] / unit.norms[j];
    }
  }
  const DType dtype = static_cast<DType>(std::get<1>(gramian));
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (int i = 0; i < k; ++i) write_number(out, dtype, i, !unit.finite ? nan : present[i] ? weights[i] : 0.0);
}

// ---- GradVac -------------------------------------------------------------------------------------------------------

void gradvac_weights(const Handle& gramian, int k, std::uintptr_t order_data, std::uintptr_t present_data,
                     std::uintptr_t targets_data, double beta, double largest, std::uintptr_t out) {
  const Int* order = reinterpret_cast<const Int*>(order_data);
  double* targets = reinterpret_cast<double*>(targets_data);
  const UnitGramian unit = read_unit_gramian(gramian, k, reinterpret_cast<const bool*>(present_data));
  Vec weights(k, unit.finite ? 0.0 : std::numeric_limits<double>::quiet_NaN());
  std::vector<char> counts(k);
  for (const int i : unit.active) counts[i] = unit.finite;
  for (int i = 0; i < k; ++i, order += k - 1) {
    if (!counts[i]) continue;
    // g_i' / |g_i| in the unit vectors, and its products with them.
    Vec coefficients(k), products(unit.cosines[i], unit.cosines[i] + k);
    coefficients[i] = 1;
    for (int step = 0; step < k - 1; ++step) {
      const int j = checked_index(order[step], k);
      if (!counts[j]) continue;
      const double length = std::sqrt(std::max(0.0, dot(products, coefficients)));
      const double cosine = length > 0 ? std::clamp(products[j] / length, -1.0, 1.0) : 0.0;
      double& target = targets[i * k + j];
      if (cosine < target) {
        const double pull = length * (target * std::sqrt(1 - cosine * cosine) / std::sqrt(1 - target * target) - cosine);
        coefficients[j] += pull;
        add_scaled(products.data(), pull, unit.cosines[j], k);
      }
      target = std::min(target + beta * (cosine - target), largest);
    }
    for (const int j : unit.active) weights[j] += unit.norms[i] * coefficients[j] / unit.norms[j];
  }
  for (int i = 0; i < k; ++i) write_number(out, static_cast<DType>(std::get<1>(gramian)), i, weights[i]);
}

// ---- Nash ----------------------------------------------------------------------------------------------------------

namespace {

// The bounds of the iteration; the values are those of the plain definition.
struct Limits {
  int newton_steps, line_search_steps;
  double converged;  // Newton decrement before the last step
};

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
  write_active_weights(gramian, k, present_data, out, [&](const ActiveGramian& active) {
    Vec weights = minimise_barrier(active.cosines, delta, {newton_steps, line_search_steps, converged});
    // The published method divides G by its Frobenius norm first; in the unknowns that is a factor of its root.
    const double root = std::sqrt(frobenius_norm(active.gramian()));
    for (std::size_t i = 0; i < weights.size(); ++i) weights[i] *= root / active.norms[i];
    return weights;
  });
}

}  // namespace diffmtl::cpu
