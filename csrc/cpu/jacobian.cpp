// The ops over a Jacobian: division into chunks or panels, and two-stage sums.
//
// Where a tensor is divided depends on its shape alone, and what the chunks return is added in their order: the
// number of threads changes no bit of a result.
#include "jacobian.hpp"

#include <algorithm>
#include <memory>

#include "memory.hpp"
#include "numbers.hpp"
#include "threads.hpp"

namespace diffmtl::cpu {
namespace {

// ---- Few rows ------------------------------------------------------------------------------------------------------

// A range of columns of one member.
struct Piece {
  std::size_t member;
  Int begin, columns;
};

// The members' columns divided into tasks of about equal size: large members are cut up, small ones share a task.
class Tasks {
 public:
  Tasks(const std::vector<Member>& members, int count, int threads) {
    Int columns = 0;
    for (const auto& [data, dtype, stride, n] : members) {
      columns += n;
      bytes_ += count * n * static_cast<Int>(kBytes[dtype]);
    }
    threads_ = useful_threads(threads, bytes_);
    const Int step = task_columns(columns);
    Int room = 0;
    for (std::size_t member = 0; member < members.size(); ++member)
      for (Int begin = 0, end = std::get<3>(members[member]); begin < end; begin += step) {
        const Int n = std::min(step, end - begin);
        if (n > room) {
          first_.push_back(pieces_.size());
          room = step;
        }
        room -= n;
        pieces_.push_back({member, begin, n});
      }
    first_.push_back(pieces_.size());
  }

  Int size() const { return static_cast<Int>(first_.size()) - 1; }
  int threads() const { return threads_; }
  Int bytes() const { return bytes_; }

  // body(piece, task, thread) for the pieces of every task, those of one task in their order.
  template <class Body>
  void run(const Body& body) const {
    parallel_for(size(), threads_, [&](Int task, int thread) {
      for (std::size_t i = first_[task]; i < first_[task + 1]; ++i) body(pieces_[i], task, thread);
    });
  }

 private:
  // Enough to make the sum over tasks cheap, tasks enough for many threads.
  static Int task_columns(Int columns) {
    constexpr Int kLeast = 16, kTasks = 256;  // in blocks; tasks
    return kBlock * std::max(kLeast, ceil_div(columns, kTasks * kBlock));
  }

  std::vector<Piece> pieces_;
  std::vector<std::size_t> first_;  // of each task, and the end
  Int bytes_ = 0;
  int threads_;
};

Rows rows_of(const Member& member, const Piece& piece, int count) {
  const auto& [data, dtype, stride, columns] = member;
  return {advance(reinterpret_cast<const void*>(data), static_cast<DType>(dtype), piece.begin), stride, piece.columns, count};
}

}  // namespace

void gram(const std::vector<Member>& members, int count, int least, std::uintptr_t out, int out_dtype, int threads) {
  const Tasks tasks(members, count, threads);
  const std::size_t lines = gram_scratch(count) / sizeof(Line);
  const std::unique_ptr<Line[]> scratch(new Line[lines * tasks.threads()]);
  const Int products = Int{count} * count;
  std::vector<double> partial(products * tasks.size()), total(products);
  tasks.run([&](const Piece& piece, Int task, int thread) {
    const Member& member = members[piece.member];
    kernels().gram[least][std::get<1>(member)](rows_of(member, piece, count), partial.data() + task * products,
                                               scratch.get() + lines * thread);
  });
  for (Int task = 0; task < tasks.size(); ++task)
    for (Int i = 0; i < products; ++i) total[i] += partial[task * products + i];
  for (int i = 0; i < count; ++i)
    for (int j = i; j < count; ++j) {
      write_number(out, static_cast<DType>(out_dtype), Int{i} * count + j, total[i * count + j]);
      write_number(out, static_cast<DType>(out_dtype), Int{j} * count + i, total[i * count + j]);
    }
}

double combine(const std::vector<Destination>& destinations, const std::vector<Member>& members, int count,
               const Handle& weights, int threads) {
  const Numbers numbers(weights);
  double w[kMaxRows];
  for (int i = 0; i < count; ++i) w[i] = numbers[i];
  for (std::size_t i = 0; i < destinations.size(); ++i) {
    const auto& [data, dtype, accumulate] = destinations[i];
    if (!accumulate)
      prefer_huge_pages(reinterpret_cast<void*>(data), std::get<3>(members[i]) * static_cast<Int>(kBytes[dtype]));
  }
  const Tasks tasks(members, count, threads);
  // Beside this much that is read, what is written will have left the caches when it is needed.
  constexpr Int kCaches = 1 << 25;
  const Write replace = tasks.bytes() > kCaches ? kStream : kReplace;
  std::vector<double> partial(tasks.size());
  tasks.run([&](const Piece& piece, Int task, int) {
    const Member& member = members[piece.member];
    const auto& [data, dtype, accumulate] = destinations[piece.member];
    void* const out = advance(reinterpret_cast<void*>(data), static_cast<DType>(dtype), piece.begin);
    partial[task] += kernels().combine[std::get<1>(member)][dtype](rows_of(member, piece, count), w,
                                                                      accumulate ? kAdd : replace, out);
  });
  double square = 0;
  for (const double part : partial) square += part;
  return square;
}

namespace {

// ---- Many rows -----------------------------------------------------------------------------------------------------
// More than fit into registers side by side. Some columns of all rows at a time are packed into panels; some rows of one
// panel with another one are then a task. An element of the result is summed by one thread at a time, in the order of the
// columns.

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

}  // namespace

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

}  // namespace diffmtl::cpu
