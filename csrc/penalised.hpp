// Lagrangian search: a price per interval instead of their number, in O(n) memory whatever k.
#pragma once
#include "windows.hpp"

namespace diffmtl {

// Boundaries that minimise Σ cost + price · number of intervals; the leftmost among equals. Empty if there are none.
//
// Online: position e may end an interval that starts at any l before it. By the quadrangle inequality a later
// start, once better than an earlier one, stays better, so a queue of starts with the position from which each
// is best suffices; that position is found by galloping. O(n) amortised queue operations.
template <class Cost>
class PenalisedSolver {
 public:
  PenalisedSolver(const Cost& cost, Limits limits, Task& task)
      : cost_(cost), limits_(limits), task_(task), value_(cost.size() + 1), start_(cost.size() + 1),
        queue_(cost.size() + 1) {}

  std::vector<Int> operator()(Wide price) {
    const Int n = cost_.size();
    Int head = 0, tail = 0;  // queue_[head .. tail - 1]
    value_[0] = 0, start_[0] = -1;
    for (Int e = 1; e <= n; ++e) {
      if ((e & 1023) == 0) task_.poll(1 << 14);
      if (const Int l = e - limits_.min; l >= 0 && (l == 0 || start_[l] >= 0)) {
        Int from = e;
        while (tail > head) {
          const Entry& back = queue_[tail - 1];
          const Int at = std::max<Int>(back.from, e);
          if (better(l, back.l, at)) {
            from = at, --tail;
            continue;
          }
          from = takeover(l, back.l, at);
          break;
        }
        if (from <= n) queue_[tail++] = {static_cast<std::int32_t>(l), static_cast<std::int32_t>(from)};
      }
      while (head + 1 < tail && queue_[head + 1].from <= e) ++head;
      // The next start takes over where one gets too long, so only the last can be.
      if (head < tail && e - queue_[head].l > limits_.max) ++head;
      if (head == tail) {
        start_[e] = -1;
        continue;
      }
      const Int l = queue_[head].l;
      value_[e] = value_[l] + cost_(l, e) + price, start_[e] = static_cast<std::int32_t>(l);
    }
    std::vector<Int> boundaries;
    if (start_[n] < 0) return boundaries;
    for (Int e = n; e > 0; e = start_[e]) boundaries.push_back(e);
    boundaries.push_back(0);
    std::reverse(boundaries.begin(), boundaries.end());
    return boundaries;
  }

 private:
  struct Entry {
    std::int32_t l, from;
  };

  // Whether an interval ending at e had better start at `later` than at `earlier`.
  bool better(Int later, Int earlier, Int e) const {
    return e - earlier > limits_.max || value_[later] + cost_(later, e) < value_[earlier] + cost_(earlier, e);
  }

  // First position after `at`, where it is not yet, from which `later` is better; n + 1 if there is none.
  Int takeover(Int later, Int earlier, Int at) const {
    const Int end = cost_.size() + 1;
    Int low = at, step = 1;
    while (low + step < end && !better(later, earlier, low + step)) low += step, step *= 2;
    Int high = std::min(low + step, end);
    while (high - low > 1) {
      const Int middle = low + (high - low) / 2;
      (better(later, earlier, middle) ? high : low) = middle;
    }
    return high;
  }

  const Cost& cost_;
  Limits limits_;
  Task& task_;
  std::vector<Wide> value_;
  std::vector<std::int32_t> start_;  // -1: no interval may end here
  std::vector<Entry> queue_;
};

// An optimal partition and the price at which it was found.
struct Priced {
  Wide price = 0;
  std::vector<Int> boundaries;
  bool known() const { return !boundaries.empty(); }
  Int k() const { return static_cast<Int>(boundaries.size()) - 1; }
};

// The price to try next, given an optimum of at most k intervals (few) and one of at least k (many), either of
// which may be unknown. The cost falls about like 1 / k or 1 / k², so the logarithm of the price is about linear
// in that of k; every third step halves instead, which bounds their number.
inline Wide next_price(const Priced& few, const Priced& many, Int k, int round) {
  const auto ratio = [](Int a, Int b) { return static_cast<double>(a) / static_cast<double>(b); };
  const auto factor = [&](Int larger, Int smaller) {
    const double steps = ratio(larger, smaller);
    return static_cast<Wide>(std::clamp(steps * steps * (round + 1.0), 2.0, 1e9));
  };
  if (!few.known()) return many.price > 0 ? many.price * factor(many.k(), k) : many.price / 4 + 3;
  if (!many.known()) return few.price > 3 ? few.price / factor(k, few.k()) : 4 * few.price - 15;
  const bool positive = many.price > 0;
  if (positive && round % 3 != 2) {
    const double low = std::log(to_double(many.price)), high = std::log(to_double(few.price));
    const double share = std::log(ratio(many.k(), k)) / std::log(ratio(many.k(), few.k()));
    return static_cast<Wide>(std::exp(low + (high - low) * std::clamp(share, 0.01, 0.99)));
  }
  if (positive && few.price / 4 > many.price)
    return static_cast<Wide>(std::sqrt(to_double(many.price)) * std::sqrt(to_double(few.price)));
  return many.price + (few.price - many.price) / 2;
}

// k intervals out of optima of fewer and of more at the same price: the second's intervals up to a crossing, the
// first's after it. By the quadrangle inequality both combinations that swap there are optimal again.
inline std::vector<Int> splice(const std::vector<Int>& few, const std::vector<Int>& many, Int k) {
  const Int shift = k - (static_cast<Int>(few.size()) - 1);
  Int j = 0;
  while (few[j + 1] < many[j + 1 + shift]) ++j;
  std::vector<Int> boundaries(many.begin(), many.begin() + j + shift + 1);
  boundaries.insert(boundaries.end(), few.begin() + j + 1, few.end());
  return boundaries;
}

// The optimum of k intervals, exactly.
//
// The optimal cost is convex in k and costs are even integers, so at an odd price the optimal number of intervals
// is unique. A search over prices finds optima of nearly k intervals; they interleave with the one sought and
// leave windows of n positions in all per unit of distance, which solve_windows settles. If the two odd prices
// next to each other leave k far from both, every number between is optimal at the even price, and splicing does.
template <class Cost>
std::vector<Int> solve_penalised(const Cost& cost, Int k, Limits limits, Task& task) {
  constexpr Int kNear = 2;
  const Int n = cost.size(), fewest = (n + limits.max - 1) / limits.max;
  const Wide whole = cost(0, n), limit = std::min<Wide>(4 * whole, (Wide{1} << 125) / (fewest + 1)) | 1;
  const auto near = [k](const Priced& found) { return found.known() && std::abs(found.k() - k) <= kNear; };
  Priced few, many;
  {
    PenalisedSolver<Cost> solve(cost, limits, task);
    Wide price = whole / k / (k + 1);
    for (int round = 0; !near(few) && !near(many); ++round) {
      if (few.known() && many.known()) {
        if (few.price - many.price <= 2) return splice(few.boundaries, many.boundaries, k);
        price = std::clamp<Wide>(price, many.price + 2, few.price - 2);
      }
      price = std::clamp<Wide>(price, -limit, limit) | 1;
      std::vector<Int> boundaries = solve(price);
      Priced& side = static_cast<Int>(boundaries.size()) - 1 <= k ? few : many;
      if (side.known() && side.price == price) break;  // at the limit: k is the fewest or the most there can be
      side = {price, std::move(boundaries)};
      price = next_price(few, many, k, round);
    }
  }
  std::vector<Window> windows = all_positions(n, k, limits);
  for (const Priced& found : {few, many}) {
    if (!found.known()) continue;
    if (found.k() == k) return found.boundaries;
    interleave(windows, found.boundaries);
  }
  tighten(windows, limits);
  ExactScanner<Cost> scanner(cost, task);
  return solve_windows(scanner, windows, limits, task);
}

// The optima of first .. last intervals, each within the windows the one before leaves it: O(n log n) time for
// each, O(n) memory. use(k, boundaries) gets them in turn.
template <class Cost, class Use>
void solve_path(const Cost& cost, Int first, Int last, Limits limits, Task& task, const Use& use) {
  const Int n = cost.size();
  ExactScanner<Cost> scanner(cost, task);
  std::vector<Int> boundaries;
  for (Int k = first; k <= last; ++k) {
    std::vector<Window> windows = all_positions(n, k, limits);
    if (k > first) interleave(windows, boundaries), tighten(windows, limits);
    boundaries = solve_windows(scanner, windows, limits, task);
    use(k, boundaries);
  }
}

}  // namespace diffmtl
