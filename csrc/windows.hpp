// The dynamic programme restricted to a window of positions for every boundary. Every exact solver for costs
// with the quadrangle inequality ends here; they differ in how they find the windows.
#pragma once
#include <stdexcept>

#include "wide.hpp"

namespace diffmtl {

// Positions first .. last, both included.
struct Window {
  Int first, last;
  Int size() const { return last - first + 1; }
};

// Sizes an interval may have. The limited cost (infinite outside) keeps the quadrangle inequality: the sizes on
// its left, (a, c) and (b, d), lie between those on its right, (b, c) and (a, d).
struct Limits {
  Int min, max;
};

// Windows of boundaries 0 .. k, shrunk until every position has an admissible neighbour on both sides.
inline void tighten(std::vector<Window>& windows, Limits limits) {
  for (std::size_t j = 1; j < windows.size(); ++j) {
    windows[j].first = std::max(windows[j].first, windows[j - 1].first + limits.min);
    windows[j].last = std::min(windows[j].last, windows[j - 1].last + limits.max);
  }
  for (std::size_t j = windows.size() - 1; j-- > 0;) {
    windows[j].first = std::max(windows[j].first, windows[j + 1].first - limits.max);
    windows[j].last = std::min(windows[j].last, windows[j + 1].last - limits.min);
  }
  for (const Window& window : windows)
    if (window.first > window.last) throw std::logic_error("no partition within the windows");
}

inline std::vector<Window> all_positions(Int n, Int k, Limits limits) {
  std::vector<Window> windows(k + 1, Window{0, n});
  windows.front() = {0, 0}, windows.back() = {n, n};
  tighten(windows, limits);
  return windows;
}

// Leftmost minimum of every row of a matrix whose leftmost minima move right, by divide and conquer.
//
// band(row) is the Window of columns the row has; first and last of it do not decrease with the row.
template <class Value, class Band, class Evaluate>
void monotone_minima(Window rows, Window columns, const Band& band, const Evaluate& evaluate, Value* minima,
                     std::int32_t* arguments) {
  while (rows.first <= rows.last) {
    const Int row = rows.first + (rows.last - rows.first) / 2;
    const Window here = band(row);
    const Int first = std::max(columns.first, here.first), last = std::min(columns.last, here.last);
    Value best = evaluate(row, first);
    Int argument = first;
    for (Int column = first + 1; column <= last; ++column) {
      const Value value = evaluate(row, column);
      if (value < best) best = value, argument = column;
    }
    minima[row] = best, arguments[row] = static_cast<std::int32_t>(argument);
    monotone_minima({rows.first, row - 1}, {columns.first, argument}, band, evaluate, minima, arguments);
    rows.first = row + 1, columns.first = argument;
  }
}

// The optimal boundaries within (tight) windows; among equals the smallest last boundary, then the smallest
// before it, and so on. Time O(Σ |window| log |window|), memory O(Σ |window|).
template <class Cost>
std::vector<Int> solve_windows(const Cost& cost, const std::vector<Window>& windows, Limits limits) {
  using Value = decltype(cost(0, 1));
  const Int k = static_cast<Int>(windows.size()) - 1;
  std::vector<std::vector<std::int32_t>> arguments(k + 1);
  std::vector<Value> before(1), here;
  before[0] = Value{};
  for (Int j = 1; j <= k; ++j) {
    const Window rows = windows[j], columns = windows[j - 1];
    here.resize(rows.size());
    arguments[j].resize(rows.size());
    const auto band = [&](Int e) { return Window{e - limits.max, e - limits.min}; };
    const auto evaluate = [&, previous = before.data() - columns.first](Int e, Int l) { return previous[l] + cost(l, e); };
    monotone_minima(rows, columns, band, evaluate, here.data() - rows.first, arguments[j].data() - rows.first);
    std::swap(before, here);
  }
  std::vector<Int> boundaries(k + 1);
  boundaries[k] = windows[k].first;
  for (Int j = k; j > 0; --j) boundaries[j - 1] = arguments[j][boundaries[j] - windows[j].first];
  return boundaries;
}

}  // namespace diffmtl
