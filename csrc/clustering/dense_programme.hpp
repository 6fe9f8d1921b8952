// The O(k n²) dynamic programme, for costs without the quadrangle inequality. Every cost is evaluated once for all
// k: rows of costs are made for a tile of end positions at a time, then minimised over all starts before the tile
// at once, on all threads.
#pragma once
#include <limits>

#include "simd.hpp"
#include "windowed_programme.hpp"

namespace diffmtl {

// Gradient affinity: −Σ_t A[c, t] over the interval, c its middle element. In 64-bit fixed point, exact sums; the
// matrix is read once and not copied. Not Monge: the rows of A are unrelated.
template <class Element>
class AffinityRows {
 public:
  using Scalar = Int;
  static constexpr Int kInfinity = Int{1} << 62;

  // magnitude: the largest |A[c, t]|.
  AffinityRows(const Element* matrix, Int n, double magnitude) : matrix_(matrix), n_(n), sum_(n, 0) {
    const int shift = magnitude > 0 ? 60 - bit_width(n) - std::ilogb(magnitude) - 1 : 0;
    half_scale_ = std::ldexp(1.0, shift / 2), rest_scale_ = std::ldexp(1.0, shift - shift / 2);
  }

  // rows[e - first][l] = cost of [l, e) for first <= e <= last; called for consecutive tiles.
  void fill(Int first, Int last, Int* rows, Int stride, Task& task) {
    constexpr Int kBlock = 64;
    const Int from = first / 2, count = last - from;  // centres of intervals that end in the tile
    task.parallel_for((count + kBlock - 1) / kBlock, [&](Int block) {
      task.poll(kBlock * (last - first + 1));
      for (Int c = from + block * kBlock; c < std::min(from + (block + 1) * kBlock, last); ++c) {
        // sum_[c]: over the largest interval centred on c that ends where the last one did. It grows both ways.
        for (Int e = std::max(first, c + 1); e <= std::min(last, 2 * c + 1); ++e) {
          const Int odd = 2 * c + 1 - e, even = odd - 1;
          Int* row = rows + (e - first) * stride;
          row[odd] = sum_[c] += entry(c, e - 1);
          if (even >= 0) row[even] = sum_[c] += entry(c, even);
        }
      }
    });
  }

  static double exact(const Element* matrix, Int n, Int l, Int e) {
    const Element* row = matrix + ((l + e) / 2) * n;
    Sum sum;
    for (Int t = l; t < e; ++t) sum.add(-static_cast<double>(row[t]));
    return sum.value();
  }

 private:
  Int entry(Int c, Int t) const {
    return -to_fixed(static_cast<double>(matrix_[c * n_ + t]), half_scale_, rest_scale_);
  }

  const Element* matrix_;
  Int n_;
  std::vector<Int> sum_;
  double half_scale_, rest_scale_;
};

// A user's cost: fill_row(e, first, last, row) writes the cost of [l, e) to row[l], or throws. Asked for intervals
// within the limits alone.
class UserRows {
 public:
  using Scalar = double;
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  using FillRow = std::function<void(Int e, Int first, Int last, double* row)>;

  UserRows(FillRow fill_row, Limits limits) : fill_row_(std::move(fill_row)), limits_(limits) {}

  void fill(Int first, Int last, double* rows, Int stride, Task& task) {
    task.parallel_for(last - first + 1, [&](Int i) {
      task.poll(first + i);
      const Int e = first + i, from = std::max<Int>(0, e - limits_.max), upto = e - limits_.min;
      if (from <= upto) fill_row_(e, from, upto, rows + i * stride);
    });
  }

 private:
  FillRow fill_row_;
  Limits limits_;
};

// value[i] + row[i], the loops of the programme, for both kinds of number.
struct DenseLoops {
  DIFFMTL_CLONES static Int minimum(const Int* value, const Int* row, Int n, Int infinity) {
    return diffmtl::minimum(n, infinity, [=](Int i) { return value[i] + row[i]; });
  }
  DIFFMTL_CLONES static double minimum(const double* value, const double* row, Int n, double infinity) {
    return diffmtl::minimum(n, infinity, [=](Int i) { return value[i] + row[i]; });
  }
  DIFFMTL_CLONES static Int next(const Int* value, const Int* row, Int n, Int bound) {
    return first_within(0, n, bound, [=](Int i) { return value[i] + row[i]; });
  }
  DIFFMTL_CLONES static Int next(const double* value, const double* row, Int n, double bound) {
    return first_within(0, n, bound, [=](Int i) { return value[i] + row[i]; });
  }
};

// Optimal boundaries of k intervals for each k in first .. last: use(k, boundaries), boundaries empty where every
// partition costs infinity. Ties as in solve_windows.
template <class Rows, class Use>
void solve_dense(Rows& rows, Int n, Int first_k, Int last_k, Limits limits, Task& task, const Use& use) {
  using Scalar = typename Rows::Scalar;
  constexpr Int kTile = 32;
  struct Layer {
    std::vector<Scalar> value;
    std::vector<Int> squares;
    std::vector<std::int32_t> argument;
  };
  std::vector<Layer> layers(last_k + 1);
  for (Layer& layer : layers) {
    layer.value.assign(n + 1, Rows::kInfinity), layer.squares.assign(n + 1, 0), layer.argument.assign(n + 1, -1);
  }
  layers[0].value[0] = 0;

  const Int stride = n + 1;
  std::vector<Scalar> tile(kTile * stride);
  // Improves layer j at e by the starts first .. last.
  const auto improve = [&](Int j, Int e, const Scalar* row, Int first, Int last) {
    first = std::max({first, (j - 1) * limits.min, e - limits.max}), last = std::min({last, e - limits.min});
    if (j == 1) last = std::min<Int>(last, 0);
    if (first > last) return;
    const Layer& before = layers[j - 1];
    Layer& layer = layers[j];
    const Int count = last - first + 1;
    const Scalar* value = before.value.data() + first;
    const Scalar best = DenseLoops::minimum(value, row + first, count, Rows::kInfinity);
    if (!(best < Rows::kInfinity / 2) || best > layer.value[e]) return;
    for (Int i = 0; i < count; ++i) {
      i += DenseLoops::next(value + i, row + first + i, count - i, best);
      if (i >= count) break;
      const Int squares = before.squares[first + i] + (e - first - i) * (e - first - i);
      if (best < layer.value[e] || squares < layer.squares[e]) {
        layer.value[e] = best, layer.squares[e] = squares;
        layer.argument[e] = static_cast<std::int32_t>(first + i);
      }
    }
  };
  for (Int begin = 1; begin <= n; begin += kTile) {
    const Int end = std::min(begin + kTile - 1, n), height = end - begin + 1;
    rows.fill(begin, end, tile.data(), stride, task);
    task.parallel_for(height * last_k, [&](Int i) {
      const Int e = begin + i % height, j = 1 + i / height;
      if (e < j * limits.min || e > j * limits.max) return;
      task.poll(begin);
      improve(j, e, &tile[(e - begin) * stride], 0, begin - 1);
    });
    for (Int e = begin; e <= end; ++e)
      for (Int j = 1; j <= last_k; ++j) improve(j, e, &tile[(e - begin) * stride], begin, e - 1);
  }
  for (Int k = first_k; k <= last_k; ++k) {
    std::vector<Int> boundaries;
    if (layers[k].argument[n] >= 0) {
      boundaries.assign(k + 1, n);
      for (Int j = k; j > 0; --j) boundaries[j - 1] = layers[j].argument[boundaries[j]];
    }
    use(k, boundaries);
  }
}

// A user's cost with the quadrangle inequality, for solve_windows: sums of doubles, equal ones by squared sizes.
class UserScanner {
 public:
  struct Value {
    double cost = 0;
    Int squares = 0;
  };

  UserScanner(UserRows::FillRow fill_row, Task& task) : fill_row_(std::move(fill_row)), task_(task) {}

  void set(const Value* values, Window) { values_ = values; }

  Minimum<Value> operator()(Int e, Int first, Int last) const {
    constexpr Int kChunk = 256;
    task_.poll(last - first + 4);
    double row[kChunk];
    Minimum<Value> best{{UserRows::kInfinity, 0}, first};
    for (Int from = first; from <= last; from += kChunk) {
      const Int upto = std::min(from + kChunk - 1, last);
      fill_row_(e, from, upto, row - from);
      for (Int l = from; l <= upto; ++l) {
        const Value value{values_[l].cost + row[l - from], values_[l].squares + (e - l) * (e - l)};
        if (value.cost < best.value.cost || (value.cost == best.value.cost && value.squares < best.value.squares))
          best = {value, l};
      }
    }
    return best;
  }

 private:
  UserRows::FillRow fill_row_;
  Task& task_;
  const Value* values_ = nullptr;
};

}  // namespace diffmtl
