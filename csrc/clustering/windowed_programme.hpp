// The dynamic programme restricted to a window of positions for every boundary. Every solver for costs with the
// quadrangle inequality ends here; they differ in how they find the windows.
#pragma once
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "task.hpp"
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

// Shrinks the windows of boundaries 0 .. k until every position has an admissible neighbour on both sides. False if
// no partition lies within them.
inline bool tighten(std::vector<Window>& windows, Limits limits) {
  for (std::size_t j = 1; j < windows.size(); ++j) {
    windows[j].first = std::max(windows[j].first, windows[j - 1].first + limits.min);
    windows[j].last = std::min(windows[j].last, windows[j - 1].last + limits.max);
  }
  for (std::size_t j = windows.size() - 1; j-- > 0;) {
    windows[j].first = std::max(windows[j].first, windows[j + 1].first - limits.max);
    windows[j].last = std::min(windows[j].last, windows[j + 1].last - limits.min);
  }
  return std::all_of(windows.begin(), windows.end(), [](Window window) { return window.first <= window.last; });
}

inline std::vector<Window> all_positions(Int n, Int k, Limits limits) {
  std::vector<Window> windows(k + 1, Window{0, n});
  windows.front() = {0, 0}, windows.back() = {n, n};
  if (!tighten(windows, limits)) throw std::invalid_argument("the sizes allow no partition");
  return windows;
}

// Narrows the windows of k boundaries to those an optimum for another number of intervals leaves open. False if no
// partition lies within them, which rounding of the cost might bring about.
//
// The optima of a cost with the quadrangle inequality interleave: of k and of k + 1 intervals, the leftmost among
// equals, b(k+1)_j <= b(k)_j <= b(k+1)_{j+1}, because swapping two intervals that break this order costs nothing.
inline bool interleave(std::vector<Window>& windows, const std::vector<Int>& other, Limits limits) {
  const Int k = static_cast<Int>(windows.size()) - 1, more = static_cast<Int>(other.size()) - 1 - k;
  for (Int j = 0; j <= k; ++j) {
    const Int left = more >= 0 ? j : std::max<Int>(j + more, 0);
    const Int right = more >= 0 ? j + more : std::min<Int>(j, k + more);
    windows[j].first = std::max(windows[j].first, other[left]);
    windows[j].last = std::min(windows[j].last, other[right]);
  }
  return tighten(windows, limits);
}

// The windows that optima for other numbers of intervals (empty: unknown) leave k boundaries. One that leaves none is
// left out: the windows only get wider. Throws rather than take the memory of all positions for many boundaries.
inline std::vector<Window> windows_between(Int n, Int k, Limits limits,
                                           std::initializer_list<const std::vector<Int>*> others) {
  constexpr Int kFewPositions = Int{1} << 27, kFewBoundaries = 32;
  std::vector<Window> windows = all_positions(n, k, limits);
  for (const std::vector<Int>* other : others) {
    std::vector<Window> narrower = windows;
    if (!other->empty() && interleave(narrower, *other, limits)) windows = std::move(narrower);
  }
  Int positions = 0;
  for (const Window& window : windows) positions += window.size();
  if (positions > std::max(kFewPositions, kFewBoundaries * n))
    throw std::runtime_error("the search for k = " + std::to_string(k) + " of T = " + std::to_string(n) +
                             " found no neighbouring optimum, because the cost is rounded too coarsely; solver "
                             "'divide' takes memory O(k T) instead");
  return windows;
}

// Minimum over a row of a matrix; see monotone_minima.
template <class Value>
struct Minimum {
  Value value;
  Int argument;
};

// Leftmost minimum of every row of a matrix whose leftmost minima move right, by divide and conquer.
//
// band(row) is the Window of columns the row has; its ends do not decrease with the row.
// scan(row, first, last) is the leftmost Minimum over these columns.
template <class Value, class Band, class Scan>
void monotone_minima(Window rows, Window columns, const Band& band, const Scan& scan, Value* minima,
                     std::int32_t* arguments) {
  while (rows.first <= rows.last) {
    const Int row = rows.first + (rows.last - rows.first) / 2;
    const Window here = band(row);
    const Minimum<Value> best = scan(row, std::max(columns.first, here.first), std::min(columns.last, here.last));
    minima[row] = best.value, arguments[row] = static_cast<std::int32_t>(best.argument);
    monotone_minima({rows.first, row - 1}, {columns.first, best.argument}, band, scan, minima, arguments);
    rows.first = row + 1, columns.first = best.argument;
  }
}

// The same on all threads of the task: a few rows first, level by level, then the blocks between them.
template <class Value, class Band, class Scan>
void monotone_minima(Window rows, Window columns, const Band& band, const Scan& scan, Value* minima,
                     std::int32_t* arguments, Task& task) {
  constexpr Int kWorthThreads = 1 << 13;
  if (task.threads() == 1 || rows.size() < kWorthThreads)
    return monotone_minima(rows, columns, band, scan, minima, arguments);
  Int blocks = 8;
  while (blocks < 8 * task.threads()) blocks *= 2;
  const auto edge = [&](Int b) { return rows.first + rows.size() * b / blocks; };
  // Block b is [edge(b), edge(b + 1)); the rows edge(1), edge(2), ... are solved ahead.
  const auto from = [&](Int b) { return b == 0 ? columns.first : Int{arguments[edge(b)]}; };
  const auto upto = [&](Int b) { return b == blocks ? columns.last : Int{arguments[edge(b)]}; };
  for (Int step = blocks / 2; step > 0; step /= 2)
    task.parallel_for(blocks / (2 * step), [&](Int i) {
      const Int b = (2 * i + 1) * step, row = edge(b);
      monotone_minima({row, row}, {from(b - step), upto(b + step)}, band, scan, minima, arguments);
    });
  task.parallel_for(blocks, [&](Int b) {
    const Int first = edge(b) + (b > 0), last = edge(b + 1) - 1;
    monotone_minima({first, last}, {from(b), upto(b + 1)}, band, scan, minima, arguments);
  });
}

// values[l] + cost(l, e) of a built-in cost, minimised exactly: a filter on doubles leaves few candidates.
template <class Cost>
class ExactScanner {
 public:
  using Value = Wide;
  ExactScanner(const Cost& cost, Task& task) : cost_(cost), filter_(cost), task_(task) {}

  void set(const Wide* values, Window columns) {
    values_ = values;
    filter_.set(values, columns.first, columns.last);
  }

  Minimum<Wide> operator()(Int e, Int first, Int last) const {
    constexpr Int kWorthFilter = 12;
    task_.poll(last - first + 4);
    Minimum<Wide> best{values_[first] + cost_(first, e), first};
    if (last - first < kWorthFilter) {
      for (Int l = first + 1; l <= last; ++l) improve(best, e, l);
      return best;
    }
    const double bound = filter_.minimum(e, first, last) + filter_.margin();
    for (Int l = filter_.next(e, first, last, bound); l <= last; l = filter_.next(e, l + 1, last, bound)) {
      improve(best, e, l);
      if (l == last) break;
    }
    return best;
  }

 private:
  void improve(Minimum<Wide>& best, Int e, Int l) const {
    const Wide value = values_[l] + cost_(l, e);
    if (value < best.value) best = {value, l};
  }
  const Cost& cost_;
  typename Cost::Filter filter_;
  Task& task_;
  const Wide* values_ = nullptr;
};

// The optimal boundaries within tight windows; among equals the smallest last boundary, then the smallest before
// it, and so on. Memory O(Σ |window|); time O(Σ |window| log |window|) if monotone, else O(Σ |window|²).
template <class Scanner>
std::vector<Int> solve_windows(Scanner& scanner, const std::vector<Window>& windows, Limits limits, Task& task,
                               bool monotone = true) {
  using Value = typename Scanner::Value;
  const Int k = static_cast<Int>(windows.size()) - 1;
  std::vector<std::vector<std::int32_t>> arguments(k + 1);
  std::vector<Value> before(1, Value{}), here;
  for (Int j = 1; j <= k; ++j) {
    const Window rows = windows[j], columns = windows[j - 1];
    here.resize(rows.size()), arguments[j].resize(rows.size());
    scanner.set(before.data() - columns.first, columns);
    Value* minima = here.data() - rows.first;
    std::int32_t* argument = arguments[j].data() - rows.first;
    const auto band = [&](Int e) {
      return Window{std::max(columns.first, e - limits.max), std::min(columns.last, e - limits.min)};
    };
    if (monotone)
      monotone_minima(rows, columns, band, scanner, minima, argument, task);
    else
      task.parallel_for(rows.size(), [&](Int i) {
        const Int e = rows.first + i;
        const Minimum<Value> best = scanner(e, band(e).first, band(e).last);
        minima[e] = best.value, argument[e] = static_cast<std::int32_t>(best.argument);
      });
    std::swap(before, here);
  }
  std::vector<Int> boundaries(k + 1);
  boundaries[k] = windows[k].first;
  for (Int j = k; j > 0; --j) boundaries[j - 1] = arguments[j][boundaries[j] - windows[j].first];
  return boundaries;
}

}  // namespace diffmtl
