// Weights from the Gramian alone, in float64: as in the plain definitions of the methods, in diffmtl_fast/weighting.
#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "eigen.hpp"
#include "nonnegative.hpp"
#include "weights.hpp"

namespace diffmtl::cpu {
namespace {

// What a method is given beside the cosines and norms of the n active clusters.
struct Given {
  double number;  // of present clusters
  double unit;    // of the rounding of the Gramian's type
  double ridge;   // above what rounding moves the eigenvalues of the cosines by
  const Vec& settings;
};

Matrix with_ridge(Matrix matrix, double ridge) {
  for (int i = 0; i < matrix.size; ++i) matrix[i][i] += ridge;
  return matrix;
}

Vec mgda(const ActiveGramian& active, const Given& given) {
  const int n = active.cosines.size;
  const double shortest = *std::min_element(active.norms.begin(), active.norms.end());
  Vec nearness(n), linear(n), x(n);
  for (int i = 0; i < n; ++i) nearness[i] = shortest / active.norms[i], linear[i] = -nearness[i];
  Matrix matrix = with_ridge(active.cosines, given.ridge);
  for (int i = 0; i < n; ++i) add_scaled(matrix[i], nearness[i], nearness.data(), n);
  NonnegativeQuadratic(matrix).minimise(linear.data(), x);
  const double total = dot(x, nearness);
  for (int i = 0; i < n; ++i) x[i] *= given.number * nearness[i] / total;
  return x;
}

Vec upgrad(const ActiveGramian& active, const Given& given) {
  const int n = active.cosines.size;
  const Matrix matrix = with_ridge(active.cosines, given.ridge);
  NonnegativeQuadratic quadratic(matrix);
  Vec weights(n), x(n);
  for (int i = 0; i < n; ++i) {
    std::fill(x.begin(), x.end(), 0.0);
    quadratic.minimise(matrix[i], x);
    add_scaled(weights.data(), active.norms[i], x.data(), n);
  }
  for (int i = 0; i < n; ++i) weights[i] = 1 + weights[i] / active.norms[i];
  return weights;
}

Vec dualproj(const ActiveGramian& active, const Given& given) {
  const Matrix matrix = with_ridge(active.cosines, given.ridge);
  Vec x(active.norms.size());
  NonnegativeQuadratic(matrix).minimise(product(matrix, active.norms).data(), x);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = 1 + x[i] / active.norms[i];
  return x;
}

Vec cagrad(const ActiveGramian& active, const Given& given) {
  constexpr int kNewtonSteps = 12;
  constexpr double kConverged = 1e-14, kRidge = 1e-10;
  const int n = active.cosines.size;
  const Vec& norms = active.norms;
  const Matrix matrix = with_ridge(active.cosines, std::max(given.ridge, kRidge));
  Vec along = product(matrix, norms), linear(n), u(n);  // along: <g_k, g_0> / |g_k|, g_0 the mean gradient
  for (double& entry : along) entry /= given.number;
  const double radius = given.settings[0] * std::sqrt(dot(norms, along) / given.number);
  // No worst improvement above this is in reach of the cluster that it is the least for.
  double worst = std::numeric_limits<double>::infinity();
  for (int i = 0; i < n; ++i) worst = std::min(worst, norms[i] * (along[i] + radius));
  NonnegativeQuadratic quadratic(matrix);
  for (int step = 0; step < kNewtonSteps; ++step) {
    double pull = 0;
    for (int i = 0; i < n; ++i) linear[i] = along[i] - worst / norms[i];
    quadratic.minimise(linear.data(), u);
    for (int i = 0; i < n; ++i) pull += u[i] / norms[i];
    const double distance = std::sqrt(std::max(0.0, dot(u, product(matrix, u))));
    if (!(distance > radius * (1 + kConverged))) break;
    worst -= (distance - radius) * distance / pull;
  }
  for (int i = 0; i < n; ++i) u[i] = 1 + given.number * u[i] / norms[i];
  return u;
}

Vec aligned_mtl(const ActiveGramian& active, const Given& given) {
  const Eigen eigen(active.gramian(), Vec(active.norms.size(), 1.0));
  const Vec& values = eigen.values();
  const double bound = given.ridge * *std::max_element(values.begin(), values.end());
  double least = std::numeric_limits<double>::infinity();
  for (const double value : values)
    if (value > bound) least = std::min(least, value);
  return eigen.apply([&](double value) { return value > bound ? std::sqrt(least / value) : 0.0; });
}

// C^+ 1, of cosines C.
Vec equal_projections(const Matrix& cosines, double ridge) {
  Matrix eliminated = cosines;
  Vec solution(static_cast<std::size_t>(cosines.size), 1.0);
  solve_positive_definite(eliminated, solution);
  // The least eigenvalue is 1 / trace C^-1 at least, the largest one trace C at most: where no eigenvalue counts as 0, this
  // takes a tenth of finding them.
  if (ridge * cosines.size * inverse_trace(eliminated) < 1) return solution;
  const Eigen eigen(cosines, Vec(solution.size(), 1.0));
  const double bound = ridge * *std::max_element(eigen.values().begin(), eigen.values().end());
  return eigen.apply([&](double value) { return value > bound ? 1 / value : 0.0; });
}

Vec imtl_g(const ActiveGramian& active, const Given& given) {
  Vec combination = equal_projections(active.cosines, given.ridge);
  double total = 0, absolute = 0;
  for (std::size_t i = 0; i < combination.size(); ++i) {
    combination[i] /= active.norms[i];
    total += combination[i], absolute += std::abs(combination[i]);
  }
  const double factor = std::abs(total) <= given.ridge * absolute ? 0 : given.number / total;
  for (double& entry : combination) entry *= factor;
  return combination;
}

Vec fairgrad(const ActiveGramian& active, const Given& given) {
  constexpr int kNewtonSteps = 60, kHalvings = 12;
  constexpr double kConverged = 1e-8, kInside = 0.95;
  const double power = 1 / given.settings[0];
  const int n = active.cosines.size;
  const Matrix matrix = with_ridge(active.cosines, std::sqrt(given.unit));
  // In beta = w |g|: C beta = pull beta^-power. Begins at the solution of C = 1, times the best factor.
  Vec pull(n), beta(n), step(n), tried(n);
  double work = 0;
  for (int i = 0; i < n; ++i) {
    pull[i] = std::pow(active.norms[i], power - 1);
    beta[i] = std::pow(pull[i], 1 / (1 + power));
    work += pull[i] * std::pow(beta[i], 1 - power);
  }
  const double start = std::pow(work / dot(beta, product(matrix, beta)), 1 / (1 + power));
  for (double& entry : beta) entry *= start;
  for (int iteration = 0; iteration < kNewtonSteps; ++iteration) {
    const Vec image = product(matrix, beta);
    Matrix hessian = matrix;
    for (int i = 0; i < n; ++i) {
      const double resistance = pull[i] * std::pow(beta[i], -power);
      hessian[i][i] += power * resistance / beta[i];
      step[i] = resistance - image[i];
    }
    solve_positive_definite(hessian, step);
    double bound = 1, flattest = std::numeric_limits<double>::infinity(), length = 0;
    bool converged = true;
    for (int i = 0; i < n; ++i) {
      if (step[i] < 0) bound = std::min(bound, -kInside * beta[i] / step[i]);
      converged = converged && std::abs(step[i]) <= kConverged * beta[i];
    }
    // The length at which the objective is flattest along the step: the values themselves are lost in rounding.
    const double along = dot(image, step), curvature = dot(step, product(matrix, step));
    for (int halving = 0; halving < kHalvings && !converged; ++halving, bound /= 2) {
      double slope = along + bound * curvature;
      for (int i = 0; i < n; ++i) slope -= pull[i] * std::pow(beta[i] + bound * step[i], -power) * step[i];
      if (std::abs(slope) < flattest) flattest = std::abs(slope), length = bound;
    }
    if (converged) length = bound;
    for (int i = 0; i < n; ++i) beta[i] += length * step[i];
    if (converged) break;
  }
  const double scale = std::pow(frobenius_norm(active.gramian()), 1 / (1 + power));
  for (int i = 0; i < n; ++i) beta[i] *= scale / active.norms[i];
  return beta;
}

Vec db_mtl(const ActiveGramian& active, const Given&) {
  Vec weights(active.norms.size());
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = 1 / active.norms[i];
  return weights;
}

struct Method {
  const char* name;
  std::size_t settings;
  Vec (*solve)(const ActiveGramian&, const Given&);
};

constexpr Method kMethods[] = {
    {"MGDA", 0, mgda},
    {"UPGrad", 0, upgrad},
    {"DualProj", 0, dualproj},
    {"CAGrad", 1, cagrad},
    {"AlignedMTL", 0, aligned_mtl},
    {"IMTLG", 0, imtl_g},
    {"FairGrad", 1, fairgrad},
    {"DBMTL", 0, db_mtl},
};

}  // namespace

std::vector<std::string> gramian_methods() {
  std::vector<std::string> names;
  for (const Method& method : kMethods) names.push_back(method.name);
  return names;
}

void gramian_weights(const Handle& gramian, int k, std::uintptr_t present, const std::string& name, double unit,
                     const std::vector<double>& settings, std::uintptr_t out) {
  double number = 0;
  for (int i = 0; i < k; ++i) number += !present || reinterpret_cast<const bool*>(present)[i];
  for (const Method& method : kMethods) {
    if (name != method.name) continue;
    if (settings.size() != method.settings)
      throw std::invalid_argument("settings: expected " + std::to_string(method.settings) + " for " + name + ", found " +
                                  std::to_string(settings.size()));
    return write_active_weights(gramian, k, present, out, [&](const ActiveGramian& active) {
      return method.solve(active, {number, unit, 4 * k * unit, settings});
    });
  }
  throw std::invalid_argument("method: no kernel for " + name);
}

}  // namespace diffmtl::cpu
