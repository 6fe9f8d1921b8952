// The clustering solvers as Python calls them.
//
// Memory is aligned and of the stated size; everything else is checked: std::invalid_argument says what was expected
// and what was found. Arguments' names in messages are those of the Python functions.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "task.hpp"

namespace diffmtl {

// What to solve, and how: every number of intervals from first_k to last_k.
struct Query {
  Int first_k, last_k, min_size, max_size;
  std::string solver;
  Int threads;
  std::function<bool()> interrupted;  // asked now and then on the calling thread; the solve then throws Interrupted
};

// Boundaries and cost of one number of intervals.
struct Solution {
  std::vector<Int> boundaries;
  double cost;
};

// A monotone sequence of n values, called `name` in messages.
std::vector<Solution> cluster_absolute(const double* values, Int n, const std::string& name, const Query& query);
std::vector<Solution> cluster_squared(const double* values, Int n, const std::string& name, const Query& query);

// An affinity matrix, [n, n].
std::vector<Solution> cluster_affinity(const float* matrix, Int n, const Query& query);
std::vector<Solution> cluster_affinity(const double* matrix, Int n, const Query& query);

// A matrix of costs, [n, n]. monge: the quadrangle inequality may be relied upon.
std::vector<Solution> cluster_matrix(const double* matrix, Int n, bool monge, const Query& query);

// address: of int64 f(r, l_first, l_last, double* out), which writes cost(l, r) for the l between to out and returns
// 0, or 1 + the l at which the cost raised an exception. Called on several threads.
std::vector<Solution> cluster_callback(std::uintptr_t address, Int n, bool monge, const Query& query);

}  // namespace diffmtl
