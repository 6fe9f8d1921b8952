// Python boundary of the clustering solvers: checks every argument, then computes without the GIL.
#include <pybind11/numpy.h>

#include <sstream>
#include <string>

#include "bindings.hpp"
#include "costs.hpp"
#include "dense.hpp"
#include "windows.hpp"

namespace py = pybind11;

namespace diffmtl {
namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message.precision(17);
  (message << ... << parts);
  throw py::value_error(message.str());
}

Limits check_sizes(Int n, Int k, Int min_size, Int max_size) {
  if (n < 1 || n > kMaxTimesteps) refuse("expected between 1 and ", kMaxTimesteps, " timesteps, found ", n);
  if (k < 1 || k > n) refuse("k: expected 1 <= k <= T = ", n, ", found ", k);
  if (min_size < 1) refuse("min_size: expected at least 1, found ", min_size);
  if (max_size < min_size) refuse("max_size: expected at least min_size = ", min_size, ", found ", max_size);
  const Limits limits{std::min(min_size, n + 1), std::min(max_size, n)};
  if (limits.min > n / k) refuse("min_size: ", k, " intervals of at least ", min_size, " need more than T = ", n, " timesteps");
  if (limits.max < (n + k - 1) / k) refuse("max_size: ", k, " intervals of at most ", max_size, " cannot cover T = ", n, " timesteps");
  return limits;
}

void check_monotone(const double* x, Int n, const std::string& name) {
  for (Int i = 0; i < n; ++i)
    if (!std::isfinite(x[i])) refuse(name, ": expected finite values, found ", x[i], " at index ", i);
  Int first = 1;
  while (first < n && x[first] == x[0]) ++first;
  const bool falling = first < n && x[first] < x[0];
  for (Int i = first; i < n; ++i)
    if (falling ? x[i] > x[i - 1] : x[i] < x[i - 1])
      refuse(name, ": expected a monotone sequence, found ", x[i - 1], " then ", x[i], " at index ", i, " of a ",
             falling ? "falling" : "rising", " one");
}

py::tuple result(const std::vector<Int>& boundaries, double cost) {
  return py::make_tuple(py::array_t<Int>(static_cast<py::ssize_t>(boundaries.size()), boundaries.data()), cost);
}

template <class Cost>
py::tuple cluster_values(const Doubles& values, Int k, Int min_size, Int max_size, const std::string& name) {
  if (values.ndim() != 1) refuse(name, ": expected one dimension, found ", values.ndim());
  const Int n = values.shape(0);
  const double* x = values.data();
  const Limits limits = check_sizes(n, k, min_size, max_size);
  check_monotone(x, n, name);
  std::vector<Int> boundaries;
  Sum total;
  {
    py::gil_scoped_release unlocked;
    const Cost cost(x, n);
    boundaries = solve_windows(cost, all_positions(n, k, limits), limits);
    for (Int j = 0; j < k; ++j) total.add(Cost::exact(x, boundaries[j], boundaries[j + 1]));
  }
  return result(boundaries, total.value());
}

py::tuple cluster_affinity(const Doubles& matrix, Int k, Int min_size, Int max_size) {
  if (matrix.ndim() != 2 || matrix.shape(0) != matrix.shape(1)) refuse("affinity: expected a square matrix");
  const Int n = matrix.shape(0);
  const double* a = matrix.data();
  const Limits limits = check_sizes(n, k, min_size, max_size);
  for (Int i = 0; i < n * n; ++i)
    if (!std::isfinite(a[i])) refuse("affinity: expected finite values, found ", a[i], " at index (", i / n, ", ", i % n, ")");
  std::vector<Int> boundaries;
  Sum total;
  {
    py::gil_scoped_release unlocked;
    boundaries = solve_affinity(AffinityCost(a, n), k, limits);
    for (Int j = 0; j < k; ++j) total.add(AffinityCost::exact(a, n, boundaries[j], boundaries[j + 1]));
  }
  return result(boundaries, total.value());
}

}  // namespace

void register_clustering(py::module_& module) {
  module.def("cluster_absolute", &cluster_values<AbsoluteCost>, py::arg("values"), py::arg("k"), py::arg("min_size"),
             py::arg("max_size"), py::arg("name"));
  module.def("cluster_squared", &cluster_values<SquaredCost>, py::arg("values"), py::arg("k"), py::arg("min_size"),
             py::arg("max_size"), py::arg("name"));
  module.def("cluster_affinity", &cluster_affinity, py::arg("matrix"), py::arg("k"), py::arg("min_size"), py::arg("max_size"));
}

}  // namespace diffmtl
