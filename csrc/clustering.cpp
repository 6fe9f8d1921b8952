// Python boundary of the clustering solvers: checks every argument, then computes without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>

#include "bindings.hpp"
#include "costs.hpp"
#include "dense.hpp"
#include "penalised.hpp"
#include "windows.hpp"

namespace py = pybind11;

namespace diffmtl {
namespace {

template <class Element>
using Array = py::array_t<Element, py::array::c_style>;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message.precision(17);
  (message << ... << parts);
  throw py::value_error(message.str());
}

// numpy arrays may lie anywhere, in a memory-mapped file for example.
template <class Element>
const Element* aligned(const Array<Element>& array, const std::string& name) {
  if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(Element)) refuse(name, ": expected aligned memory");
  return array.data();
}

// What to solve: every number of intervals from first_k to last_k, sizes, how.
struct Request {
  Int n, first_k, last_k;
  Limits limits;
  std::string solver;
  int threads;
};

Request check_request(Int n, Int first_k, Int last_k, Int min_size, Int max_size, const std::string& solver,
                      Int threads) {
  if (n < 1 || n > kMaxTimesteps) refuse("expected between 1 and ", kMaxTimesteps, " timesteps, found ", n);
  if (first_k < 1 || first_k > n) refuse("k: expected 1 <= k <= T = ", n, ", found ", first_k);
  if (last_k < first_k || last_k > n) refuse("k_max: expected ", first_k, " <= k_max <= T = ", n, ", found ", last_k);
  if (min_size < 1) refuse("min_size: expected at least 1, found ", min_size);
  if (max_size < min_size) refuse("max_size: expected at least min_size = ", min_size, ", found ", max_size);
  const Limits limits{min_size, std::min(max_size, n)};
  if (min_size > n / last_k)
    refuse("min_size: ", last_k, " intervals of at least ", min_size, " need more than T = ", n, " timesteps");
  if (limits.max < (n + first_k - 1) / first_k)
    refuse("max_size: ", first_k, " intervals of at most ", max_size, " cannot cover T = ", n, " timesteps");
  if (threads < 1 || threads > 1024) refuse("threads: expected 1 to 1024, found ", threads);
  if (solver != "auto" && solver != "divide" && solver != "penalised" && solver != "dense")
    refuse("solver: expected auto, divide, penalised or dense, found ", solver);
  return {n, first_k, last_k, limits, solver, static_cast<int>(threads)};
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

// Boundaries and cost of one number of intervals.
struct Solution {
  std::vector<Int> boundaries;
  double cost;
};

// Runs solve(task) without the GIL, and the handlers of signals with it.
template <class Solve>
void run(int threads, const Solve& solve) {
  try {
    py::gil_scoped_release unlocked;
    Task task(threads, [] {
      py::gil_scoped_acquire locked;
      return PyErr_CheckSignals() != 0;
    });
    solve(task);
  } catch (const Interrupted&) {
    throw py::error_already_set();  // what the signal's handler raised
  }
}

template <class Interval>
double total(const std::vector<Int>& boundaries, const Interval& interval) {
  Sum sum;
  for (std::size_t j = 0; j + 1 < boundaries.size(); ++j) sum.add(interval(boundaries[j], boundaries[j + 1]));
  return sum.value();
}

py::list to_python(const std::vector<Solution>& solutions) {
  py::list list;
  for (const Solution& solution : solutions)
    list.append(py::make_tuple(py::array_t<Int>(static_cast<py::ssize_t>(solution.boundaries.size()),
                                                solution.boundaries.data()),
                               solution.cost));
  return list;
}

template <class Cost>
void solve_values(const double* x, const Request& request, Task& task, std::vector<Solution>& solutions) {
  // The search over prices costs about as much as divide and conquer for this many intervals, whatever k.
  constexpr Int kFew = 3;
  const auto keep = [&](Int, const std::vector<Int>& boundaries) {
    solutions.push_back({boundaries, total(boundaries, [x](Int l, Int e) { return Cost::exact(x, l, e); })});
  };
  const Cost cost(x, request.n);
  const Int k = request.first_k;
  if (request.solver == "dense") {
    ExactScanner<Cost> scanner(cost, task);
    for (Int j = k; j <= request.last_k; ++j)
      keep(j, solve_windows(scanner, all_positions(request.n, j, request.limits), request.limits, task, false));
  } else if (k < request.last_k) {
    ExactScanner<Cost> scanner(cost, task);
    solve_path(scanner, request.n, k, request.last_k, request.limits, task, keep);
  } else if (request.solver == "penalised" || (request.solver == "auto" && k > kFew)) {
    keep(k, solve_penalised(cost, x, k, request.limits, task));
  } else {
    ExactScanner<Cost> scanner(cost, task);
    keep(k, solve_windows(scanner, all_positions(request.n, k, request.limits), request.limits, task));
  }
}

template <class Cost>
py::list cluster_values(const Array<double>& values, Int first_k, Int last_k, Int min_size, Int max_size,
                        const std::string& solver, Int threads, const std::string& name) {
  if (values.ndim() != 1) refuse(name, ": expected one dimension, found ", values.ndim());
  const Request request = check_request(values.shape(0), first_k, last_k, min_size, max_size, solver, threads);
  const double* x = aligned(values, name);
  check_monotone(x, request.n, name);
  if (!std::isfinite(Cost::bound(x, request.n)))
    refuse(name, ": expected a range whose cost is a finite number, found ", x[0], " to ", x[request.n - 1]);
  std::vector<Solution> solutions;
  run(request.threads, [&](Task& task) { solve_values<Cost>(x, request, task, solutions); });
  return to_python(solutions);
}

template <class Element>
double largest_magnitude(const Element* matrix, Int n, Task& task, Int& bad) {
  std::vector<Element> largest(n, 0);
  std::vector<char> finite(n, 1);
  task.parallel_for(n, [&](Int i) {
    task.poll(n);
    Element here = 0, check = 0;
    for (Int j = 0; j < n; ++j) {
      const Element x = matrix[i * n + j];
      here = std::max(here, std::abs(x));
      check += x * 0;  // NaN if x is NaN or infinite
    }
    largest[i] = here, finite[i] = check == 0;
  });
  bad = -1;
  for (Int i = 0; i < n && bad < 0; ++i)
    for (Int j = 0; j < n && !finite[i] && bad < 0; ++j)
      if (!std::isfinite(matrix[i * n + j])) bad = i * n + j;
  return *std::max_element(largest.begin(), largest.end());
}

template <class Element>
Int square_side(const Array<Element>& matrix, const char* name) {
  if (matrix.ndim() != 2 || matrix.shape(0) != matrix.shape(1)) {
    std::ostringstream shape;
    for (py::ssize_t i = 0; i < matrix.ndim(); ++i) shape << (i ? ", " : "") << matrix.shape(i);
    refuse(name, ": expected a square matrix, found shape [", shape.str(), "]");
  }
  return matrix.shape(0);
}

void check_dense(const Request& request) {
  if (request.solver != "auto" && request.solver != "dense")
    refuse("solver: expected auto or dense for a cost without the quadrangle inequality, found ", request.solver);
}

template <class Element>
py::list cluster_affinity(const Array<Element>& matrix, Int first_k, Int last_k, Int min_size, Int max_size,
                          const std::string& solver, Int threads) {
  const Int n = square_side(matrix, "tas");
  const Request request = check_request(n, first_k, last_k, min_size, max_size, solver, threads);
  check_dense(request);
  const Element* a = aligned(matrix, "tas");
  std::vector<Solution> solutions;
  Int bad = -1;
  double magnitude = 0;
  run(request.threads, [&](Task& task) {
    magnitude = largest_magnitude(a, n, task, bad);
    if (bad >= 0 || !std::isfinite(magnitude * static_cast<double>(n))) return;
    AffinityRows<Element> rows(a, n, magnitude);
    solve_dense(rows, n, first_k, last_k, request.limits, task, [&](Int, const std::vector<Int>& boundaries) {
      const auto interval = [&](Int l, Int e) { return AffinityRows<Element>::exact(a, n, l, e); };
      solutions.push_back({boundaries, total(boundaries, interval)});
    });
  });
  if (bad >= 0) refuse("tas: expected finite values, found ", a[bad], " at index (", bad / n, ", ", bad % n, ")");
  if (solutions.empty())
    refuse("tas: expected entries whose sum is a finite number, found one of magnitude ", magnitude);
  return to_python(solutions);
}

// A cost a user's function or matrix got wrong, for the interval l .. r.
struct BadCost {
  Int l, r;
  bool raised;
  double value;
};

py::list cluster_user(const UserRows::FillRow& cost_row, const Request& request, bool monge) {
  if (!monge) check_dense(request);
  // Prices need a cost whose sums are exact.
  if (request.solver == "penalised")
    refuse("solver: expected auto, divide or dense for a function or matrix, found penalised");
  // Forbidding an interval by an infinite cost is fine where no inequality is relied upon.
  const UserRows::FillRow fill_row = [&](Int e, Int first, Int last, double* row) {
    cost_row(e, first, last, row);
    for (Int l = first; l <= last; ++l)
      if (!(row[l] > -UserRows::kInfinity && (row[l] < UserRows::kInfinity || !monge)))
        throw BadCost{l, e - 1, false, row[l]};
  };
  std::vector<Solution> solutions;
  const auto keep = [&](Int, const std::vector<Int>& boundaries) {
    const double cost = total(boundaries, [&](Int l, Int e) {
      double value;
      fill_row(e, l, l, &value - l);
      return value;
    });
    solutions.push_back({boundaries, cost});
  };
  try {
    run(request.threads, [&](Task& task) {
      if (monge && request.solver != "dense") {
        UserScanner scanner(fill_row, task);
        solve_path(scanner, request.n, request.first_k, request.last_k, request.limits, task, keep);
      } else {
        UserRows rows(fill_row, request.limits);
        solve_dense(rows, request.n, request.first_k, request.last_k, request.limits, task, keep);
      }
    });
  } catch (const BadCost& bad) {
    if (bad.raised) refuse("cost: raised an exception in the call cost(", bad.l, ", ", bad.r, ")");
    refuse("cost: expected ", monge ? "finite values" : "numbers", ", found ", bad.value, " for the interval (", bad.l,
           ", ", bad.r, ")");
  }
  return to_python(solutions);
}

py::list cluster_matrix(const Array<double>& matrix, Int first_k, Int last_k, Int min_size, Int max_size,
                        const std::string& solver, Int threads, bool monge) {
  const Int n = square_side(matrix, "cost");
  const Request request = check_request(n, first_k, last_k, min_size, max_size, solver, threads);
  const auto fill_row = [m = aligned(matrix, "cost"), n](Int e, Int first, Int last, double* row) {
    for (Int l = first; l <= last; ++l) row[l] = m[l * n + e - 1];
  };
  return cluster_user(fill_row, request, monge);
}

// address: of int64 f(r, l_first, l_last, double* out), which writes cost(l, r) for the l between to out and returns
// 0, or 1 + the l at which the cost raised an exception. Called without the GIL, on several threads.
py::list cluster_callback(std::uintptr_t address, Int n, Int first_k, Int last_k, Int min_size, Int max_size,
                          const std::string& solver, Int threads, bool monge) {
  const Request request = check_request(n, first_k, last_k, min_size, max_size, solver, threads);
  if (!address) refuse("address: expected a function, found 0");
  const auto function = reinterpret_cast<Int (*)(Int, Int, Int, double*)>(address);
  const auto fill_row = [function](Int e, Int first, Int last, double* row) {
    if (const Int failed = function(e - 1, first, last, row + first)) throw BadCost{failed - 1, e - 1, true, 0.0};
  };
  return cluster_user(fill_row, request, monge);
}

}  // namespace

void register_clustering(py::module_& module) {
  const auto values = [&](const char* name, auto function) {
    module.def(name, function, py::arg("values").noconvert(), py::arg("first_k"), py::arg("last_k"),
               py::arg("min_size"), py::arg("max_size"), py::arg("solver"), py::arg("threads"), py::arg("name"));
  };
  values("cluster_absolute", &cluster_values<AbsoluteCost>);
  values("cluster_squared", &cluster_values<SquaredCost>);
  const auto affinity = [&](auto function) {
    module.def("cluster_affinity", function, py::arg("matrix").noconvert(), py::arg("first_k"), py::arg("last_k"),
               py::arg("min_size"), py::arg("max_size"), py::arg("solver"), py::arg("threads"));
  };
  affinity(&cluster_affinity<float>);
  affinity(&cluster_affinity<double>);
  module.def("cluster_matrix", &cluster_matrix, py::arg("matrix").noconvert(), py::arg("first_k"), py::arg("last_k"),
             py::arg("min_size"), py::arg("max_size"), py::arg("solver"), py::arg("threads"), py::arg("monge"));
  module.def("cluster_callback", &cluster_callback, py::arg("address"), py::arg("num_timesteps"), py::arg("first_k"),
             py::arg("last_k"), py::arg("min_size"), py::arg("max_size"), py::arg("solver"), py::arg("threads"),
             py::arg("monge"));
}

}  // namespace diffmtl
