// The CPU side of the ops over a Jacobian: division into chunks, two-stage sums, Python boundary.
//
// Where a tensor is divided depends on its shape alone, and what the chunks return is added in their order: the
// number of threads changes no bit of a result.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "cpu_memory.hpp"
#include "cpu_numbers.hpp"
#include "cpu_threads.hpp"

namespace py = pybind11;

namespace diffmtl {
namespace cpu {
namespace {

// ---- The instruction set -------------------------------------------------------------------------------------------

// The tables that this processor can run, the best one last.
std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> tables{plain_kernels()};
#if defined(__x86_64__)
  if (avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(avx2_kernels());
  if (avx512_kernels() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    tables.push_back(avx512_kernels());
#endif
  return tables;
}

std::atomic<const Kernels*> active{nullptr};

std::string select_kernels(const std::optional<std::string>& name) {
  const std::vector<const Kernels*> tables = supported_kernels();
  std::string names;
  for (const Kernels* table : tables) {
    names += (names.empty() ? "" : ", ") + std::string(table->name);
    if (!name || *name == table->name) active = table;
    if (name && *name == table->name) return *name;
  }
  if (name) throw py::value_error("DIFFMTL_CPU_KERNELS: expected one of " + names + " on this processor, found " + *name);
  return kernels().name;
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernels* table : supported_kernels()) names.emplace_back(table->name);
  return names;
}

// ---- gram and combine ----------------------------------------------------------------------------------------------

// Where the combination of a member's rows goes: (address, DType, whether to add to what is there).
using Target = std::tuple<std::uintptr_t, int, bool>;

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

// Every member's products are formed in its own type, and in `least` at least.
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

// Returns the squared norm of all that was written.
double combine(const std::vector<Target>& targets, const std::vector<Member>& members, int count, const Handle& weights,
               int threads) {
  const Numbers numbers(weights);
  double w[kMaxRows];
  for (int i = 0; i < count; ++i) w[i] = numbers[i];
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const auto& [data, dtype, accumulate] = targets[i];
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
    const auto& [data, dtype, accumulate] = targets[piece.member];
    void* const out = advance(reinterpret_cast<void*>(data), static_cast<DType>(dtype), piece.begin);
    partial[task] += kernels().combine[std::get<1>(member)][dtype](rows_of(member, piece, count), w,
                                                                      accumulate ? kAdd : replace, out);
  });
  double square = 0;
  for (const double part : partial) square += part;
  return square;
}

}  // namespace

const Kernels& kernels() { return *active; }

}  // namespace cpu

void register_cpu_ops(py::module_& module) {
  using namespace cpu;
  select_kernels(std::nullopt);
  module.attr("CPU_MAX_ROWS") = kMaxRows;
  module.def("cpu_kernels", &kernel_names, "Instruction sets that this processor can run, the best one last.");
  module.def("cpu_select_kernels", &select_kernels, py::arg("name"), "Use this instruction set; None: the best one.");
  const py::call_guard<py::gil_scoped_release> unlocked;
  module.def("cpu_gram", &gram, unlocked);
  module.def("cpu_combine", &combine, unlocked);
}

}  // namespace diffmtl
