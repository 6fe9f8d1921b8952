// Lagrangian search: a price per interval instead of their number, in O(n) memory whatever k.
#pragma once
#include <cmath>

#include "windowed_programme.hpp"

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
  // Somewhat past the guess, and further each round, so that k gets between two known optima soon.
  const auto past = [&](Int larger, Int smaller) {
    return std::pow(ratio(larger, smaller), 3) * (1 + 0.01 * std::ldexp(1.0, 2 * round));
  };
  const auto scaled = [](Wide price, double factor) {
    return static_cast<Wide>(std::min(to_double(price) * factor, std::ldexp(1.0, 125)));
  };
  if (!few.known()) return many.price > 0 ? scaled(many.price, past(many.k(), k)) + 2 : many.price / 4 + 3;
  if (!many.known()) return few.price > 3 ? scaled(few.price, 1 / past(k, few.k())) - 2 : 4 * few.price - 15;
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

// Two optimal partitions, one of at most k and one of at least k intervals, or one of exactly k.
struct Bracket {
  Priced few, many;
  bool exact(Int k) const { return (few.known() && few.k() == k) || (many.known() && many.k() == k); }
  // The price can be told no more precisely: every number of intervals between is optimal at the even price.
  bool closed() const { return few.known() && many.known() && few.price - many.price <= 2; }
  // k is so near to one of them that the windows it leaves are narrow.
  bool near(Int k) const { return (few.known() && k - few.k() <= 2) || (many.known() && many.k() - k <= 2); }
};

// Searches for the price of k intervals, starting at `price`.
template <class Cost>
Bracket search_price(const Cost& cost, Int k, Limits limits, Wide price, Task& task) {
  constexpr int kPatience = 6;
  // Prices beyond these change nothing, or would overflow the sum over so many intervals.
  const Int n = cost.size(), fewest = (n + limits.max - 1) / limits.max, most = n / limits.min;
  const Wide whole = 4 * cost(0, n);
  const Wide highest = std::min(whole, (Wide{1} << 125) / (fewest + 1)) | 1;
  const Wide lowest = -(std::min(whole, (Wide{1} << 125) / (most + 1)) | 1);
  PenalisedSolver<Cost> solve(cost, limits, task);
  Bracket found;
  for (int round = 0; !found.exact(k) && !found.closed() && !(round >= kPatience && found.near(k)); ++round) {
    if (found.few.known() && found.many.known())
      price = std::clamp<Wide>(price, found.many.price + 2, found.few.price - 2);
    price = std::clamp(price, lowest, highest) | 1;
    std::vector<Int> boundaries = solve(price);
    Priced& side = static_cast<Int>(boundaries.size()) - 1 <= k ? found.few : found.many;
    if (side.known() && side.price == price) break;  // at the limit: k is the fewest or the most there can be
    side = {price, std::move(boundaries)};
    price = next_price(found.few, found.many, k, round);
  }
  return found;
}

// A price that yields about k intervals, from every so-many-th value: the cost of an interval then is as many
// times smaller.
template <class Cost>
Wide guess_price(const Cost& cost, const double* x, Int k, Task& task) {
  constexpr Int kPerInterval = 16, kFewest = 128;
  const Int n = cost.size(), stride = n < (1 << 13) ? 4 : 16, coarse_n = n / stride;
  const Wide rough = cost(0, n) / k / (k + 1);  // the cost falls like 1 / k when the sequence is even
  if (coarse_n < std::max(kPerInterval * k, kFewest)) return rough;
  std::vector<double> every(coarse_n);
  for (Int i = 0; i < coarse_n; ++i) every[i] = x[i * stride + stride / 2];
  const Cost coarse(every.data(), coarse_n);
  const Bracket found = search_price(coarse, k, {1, coarse_n}, guess_price(coarse, every.data(), k, task), task);
  const Priced& priced = found.few.known() && (!found.many.known() || found.few.k() == k) ? found.few : found.many;
  if (priced.price <= 0) return rough;
  const double price = std::ldexp(to_double(priced.price) * static_cast<double>(stride), cost.unit() - coarse.unit());
  return price < to_double(cost(0, n)) ? static_cast<Wide>(price) : rough;
}

// The optimum of k intervals of x, exactly.
//
// The optimal cost is convex in k and costs are even integers, so at an odd price the optimal number of intervals
// is unique. A search over prices finds k itself or its neighbours. Neighbours interleave with the optimum and
// leave windows of n positions in all per unit of distance, which solve_windows settles. Far neighbours at adjacent
// odd prices have every number between them optimal at the even price, and splicing does.
template <class Cost>
std::vector<Int> solve_penalised(const Cost& cost, const double* x, Int k, Limits limits, Task& task) {
  const Bracket found = search_price(cost, k, limits, guess_price(cost, x, k, task), task);
  for (const Priced* side : {&found.few, &found.many})
    if (side->known() && side->k() == k) return side->boundaries;
  if (found.closed() && !found.near(k)) return splice(found.few.boundaries, found.many.boundaries, k);
  ExactScanner<Cost> scanner(cost, task);
  const std::vector<Int>&few = found.few.boundaries, &many = found.many.boundaries;
  return solve_windows(scanner, windows_between(cost.size(), k, limits, {&few, &many}), limits, task);
}

// The optima of first .. last intervals, each within the windows the one before leaves it: O(n log n) time for
// each, O(n) memory. use(k, boundaries) gets them in turn.
template <class Scanner, class Use>
void solve_path(Scanner& scanner, Int n, Int first, Int last, Limits limits, Task& task, const Use& use) {
  std::vector<Int> boundaries;
  for (Int k = first; k <= last; ++k) {
    const std::vector<Window> windows =
        k == first ? all_positions(n, k, limits) : windows_between(n, k, limits, {&boundaries});
    boundaries = solve_windows(scanner, windows, limits, task);
    use(k, boundaries);
  }
}

}  // namespace diffmtl
