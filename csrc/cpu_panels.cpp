// The Gramian of more rows than fit into registers side by side: division into panels, Python boundary.
//
// Some columns of all rows at a time are packed into panels; some rows of one panel with another one are then a task. An
// element of the result is summed by one thread at a time, in the order of the columns: the number of threads changes
// no bit of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "cpu_memory.hpp"
#include "cpu_numbers.hpp"
#include "cpu_threads.hpp"

namespace py = pybind11;

namespace diffmtl {
namespace cpu {
namespace {

// Columns of a panel that are multiplied at a time: two such panels fit into the second-level cache, and sums of so many
// products in float32 lose little (about 1e-6 of the rows' lengths where all products are positive and alike).
constexpr Int kPacked = 256;
// Elements that are packed before they are multiplied: enough to keep the threads busy for longer than it takes to call
// them, and few enough for the last cache.
constexpr Int kElements = 1 << 20;

class PanelGramian {
 public:
  PanelGramian(Int count, DType compute, int threads)
      : count_(count),
        compute_(compute),
        threads_(threads),
        rows_(kernels().panel_rows[compute]),
        panels_(ceil_div(count, rows_)),
        pieces_(std::max<Int>(1, kElements / (panels_ * rows_ * kPacked))),
        lines_per_panel_(rows_ * kPacked * static_cast<Int>(kBytes[compute]) / static_cast<Int>(sizeof(Line))),
        packed_(new Line[pieces_ * panels_ * lines_per_panel_]) {
    // What has the same right panel follows each other: it stays in the cache.
    for (Int right = 0; right < panels_; ++right)
      for (Int left = 0; left <= right; ++left) {
        for (Int first = 0; first < std::min(rows_, count - left * rows_); first += kernels().left_rows[compute])
          tasks_.push_back({static_cast<Int>(pairs_.size()), first});
        pairs_.push_back({left, right});
      }
    sums_.resize(pairs_.size() * rows_ * rows_);
  }

  // Adds the products of a member's columns.
  void add(const Member& member) {
    const auto [address, code, stride, columns] = member;
    const void* data = reinterpret_cast<const void*>(address);
    const DType dtype = static_cast<DType>(code);
    for (Int begin = 0; begin < columns;) {
      const Int n = std::min(columns - begin, pieces_ * kPacked - filled_);
      append(advance(data, dtype, begin), dtype, stride, n);
      begin += n;
      if (filled_ == pieces_ * kPacked) multiply();
    }
  }

  // Writes the symmetric matrix of everything that was added, or adds it to what is there.
  void write(std::uintptr_t out, DType dtype, bool add) {
    multiply();
    const Numbers before({out, dtype, 1});
    parallel_for(static_cast<Int>(pairs_.size()), threads_, [&](Int pair, int) {
      const auto [left, right] = pairs_[pair];
      const double* sums = sums_of(pair);
      for (Int i = left * rows_; i < std::min(count_, (left + 1) * rows_); ++i)
        for (Int j = std::max(i, right * rows_); j < std::min(count_, (right + 1) * rows_); ++j) {
          const double product = sums[i % rows_ * rows_ + j % rows_] + (add ? before[i * count_ + j] : 0);
          write_number(out, dtype, i * count_ + j, product);
          write_number(out, dtype, j * count_ + i, product);
        }
    });
  }

 private:
  struct Pair {
    Int left, right;
  };
  struct Task {
    Int pair, first;  // row of the left panel
  };

  void* panel(Int piece, Int index) const { return packed_.get() + (piece * panels_ + index) * lines_per_panel_; }
  double* sums_of(Int pair) { return sums_.data() + pair * rows_ * rows_; }

  // Packs columns behind those that are there.
  void append(const void* data, DType dtype, Int stride, Int columns) {
    const auto kernel = kernels().pack_panel[compute_][dtype];
    const Int from = filled_, to = filled_ + columns, piece = from / kPacked;
    const int threads = useful_threads(threads_, count_ * columns * static_cast<Int>(kBytes[dtype]));
    parallel_for((ceil_div(to, kPacked) - piece) * panels_, threads, [&](Int task, int) {
      const Int index = task % panels_, first = index * rows_, here = piece + task / panels_;
      const Int begin = std::max(from, here * kPacked), end = std::min(to, (here + 1) * kPacked);
      kernel({advance(data, dtype, first * stride + begin - from), stride, end - begin,
              static_cast<int>(std::min(rows_, count_ - first))},
             advance(panel(here, index), compute_, begin % kPacked * rows_));
    });
    filled_ = to;
  }

  void multiply() {
    const auto kernel = kernels().multiply_panels[compute_];
    parallel_for(static_cast<Int>(tasks_.size()), threads_, [&](Int task, int) {
      const auto [pair, first] = tasks_[task];
      const auto [left, right] = pairs_[pair];
      for (Int piece = 0; piece * kPacked < filled_; ++piece)
        kernel(panel(piece, left), first, panel(piece, right), std::min(kPacked, filled_ - piece * kPacked), sums_of(pair));
    });
    filled_ = 0;
  }

  const Int count_;
  const DType compute_;
  const int threads_;
  const Int rows_, panels_, pieces_, lines_per_panel_;
  const std::unique_ptr<Line[]> packed_;  // [pieces][panels][kPacked][rows]
  std::vector<Pair> pairs_;
  std::vector<Task> tasks_;
  std::vector<double> sums_;  // [pairs][rows of the left panel][of the right one]
  Int filled_ = 0;            // columns
};

void gram_panels(const std::vector<Member>& members, Int count, int least, std::uintptr_t out, int out_dtype, int threads) {
  bool written = false;
  // Every part is accumulated in its own type, and `least` at least.
  for (const DType compute : {kFloat32, kFloat64}) {
    std::vector<Member> parts;
    for (const Member& member : members)
      if (accumulation_dtype(static_cast<DType>(std::get<1>(member)), static_cast<DType>(least)) == compute) parts.push_back(member);
    if (parts.empty()) continue;
    PanelGramian gramian(count, compute, threads);
    for (const Member& part : parts) gramian.add(part);
    gramian.write(out, static_cast<DType>(out_dtype), written);
    written = true;
  }
}

}  // namespace
}  // namespace cpu

void register_cpu_panels(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  module.def("cpu_gram_panels", &cpu::gram_panels, unlocked);
}

}  // namespace diffmtl
