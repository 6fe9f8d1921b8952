// Checks every argument, then chooses the solver.
#include "choose_solver.hpp"

#include <sstream>
#include <stdexcept>

#include "costs.hpp"
#include "dense_programme.hpp"
#include "penalised.hpp"
#include "windowed_programme.hpp"

namespace diffmtl {
namespace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message.precision(17);
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// A query that was checked.
struct Request {
  Int n, first_k, last_k;
  Limits limits;
  std::string solver;
  int threads;
};

Request check_request(Int n, const Query& query) {
  const auto& [first_k, last_k, min_size, max_size, solver, threads, interrupted] = query;
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

template <class Interval>
double total(const std::vector<Int>& boundaries, const Interval& interval) {
  Sum sum;
  for (std::size_t j = 0; j + 1 < boundaries.size(); ++j) sum.add(interval(boundaries[j], boundaries[j + 1]));
  return sum.value();
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
std::vector<Solution> cluster_values(const double* x, Int n, const std::string& name, const Query& query) {
  const Request request = check_request(n, query);
  check_monotone(x, n, name);
  if (!std::isfinite(Cost::bound(x, n)))
    refuse(name, ": expected a range whose cost is a finite number, found ", x[0], " to ", x[n - 1]);
  std::vector<Solution> solutions;
  Task task(request.threads, query.interrupted);
  solve_values<Cost>(x, request, task, solutions);
  return solutions;
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

void check_dense(const Request& request) {
  if (request.solver != "auto" && request.solver != "dense")
    refuse("solver: expected auto or dense for a cost without the quadrangle inequality, found ", request.solver);
}

template <class Element>
std::vector<Solution> cluster_rows(const Element* a, Int n, const Query& query) {
  const Request request = check_request(n, query);
  check_dense(request);
  std::vector<Solution> solutions;
  Task task(request.threads, query.interrupted);
  Int bad = -1;
  const double magnitude = largest_magnitude(a, n, task, bad);
  if (bad >= 0) refuse("tas: expected finite values, found ", a[bad], " at index (", bad / n, ", ", bad % n, ")");
  if (!std::isfinite(magnitude * static_cast<double>(n)))
    refuse("tas: expected entries whose sum is a finite number, found one of magnitude ", magnitude);
  AffinityRows<Element> rows(a, n, magnitude);
  solve_dense(rows, n, request.first_k, request.last_k, request.limits, task, [&](Int, const std::vector<Int>& boundaries) {
    const auto interval = [&](Int l, Int e) { return AffinityRows<Element>::exact(a, n, l, e); };
    solutions.push_back({boundaries, total(boundaries, interval)});
  });
  return solutions;
}

// A cost a user's function or matrix got wrong, for the interval l .. r.
struct BadCost {
  Int l, r;
  bool raised;
  double value;
};

std::vector<Solution> cluster_user(const UserRows::FillRow& cost_row, Int n, bool monge, const Query& query) {
  const Request request = check_request(n, query);
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
    Task task(request.threads, query.interrupted);
    if (monge && request.solver != "dense") {
      UserScanner scanner(fill_row, task);
      solve_path(scanner, request.n, request.first_k, request.last_k, request.limits, task, keep);
    } else {
      UserRows rows(fill_row, request.limits);
      solve_dense(rows, request.n, request.first_k, request.last_k, request.limits, task, keep);
    }
  } catch (const BadCost& bad) {
    if (bad.raised) refuse("cost: raised an exception in the call cost(", bad.l, ", ", bad.r, ")");
    refuse("cost: expected ", monge ? "finite values" : "numbers", ", found ", bad.value, " for the interval (", bad.l,
           ", ", bad.r, ")");
  }
  return solutions;
}

}  // namespace

std::vector<Solution> cluster_absolute(const double* values, Int n, const std::string& name, const Query& query) {
  return cluster_values<AbsoluteCost>(values, n, name, query);
}

std::vector<Solution> cluster_squared(const double* values, Int n, const std::string& name, const Query& query) {
  return cluster_values<SquaredCost>(values, n, name, query);
}

std::vector<Solution> cluster_affinity(const float* matrix, Int n, const Query& query) {
  return cluster_rows(matrix, n, query);
}

std::vector<Solution> cluster_affinity(const double* matrix, Int n, const Query& query) {
  return cluster_rows(matrix, n, query);
}

std::vector<Solution> cluster_matrix(const double* matrix, Int n, bool monge, const Query& query) {
  const auto fill_row = [matrix, n](Int e, Int first, Int last, double* row) {
    for (Int l = first; l <= last; ++l) row[l] = matrix[l * n + e - 1];
  };
  return cluster_user(fill_row, n, monge, query);
}

std::vector<Solution> cluster_callback(std::uintptr_t address, Int n, bool monge, const Query& query) {
  if (!address) refuse("address: expected a function, found 0");
  const auto function = reinterpret_cast<Int (*)(Int, Int, Int, double*)>(address);
  const auto fill_row = [function](Int e, Int first, Int last, double* row) {
    if (const Int failed = function(e - 1, first, last, row + first)) throw BadCost{failed - 1, e - 1, true, 0.0};
  };
  return cluster_user(fill_row, n, monge, query);
}

}  // namespace diffmtl
