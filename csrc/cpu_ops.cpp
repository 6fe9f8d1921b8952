// The CPU side of the ops over a Jacobian: division into chunks, two-stage sums, Python boundary.
//
// Where a tensor is divided depends on its shape alone, and what the chunks return is added in their order: the
// number of threads changes no bit of a result.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.hpp"
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

// ---- Division of the work ------------------------------------------------------------------------------------------

// Fresh memory is cleared by the system at the first write, page by page: with small pages that takes as long as
// computing what is written. A hint only; it changes nothing where the pages are there already.
void prefer_huge_pages(void* p, Int bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = 1 << 21;
  if (bytes < Int{16 * kHugePage}) return;
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(p);
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes)) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

// Columns per chunk: enough to make the sum over chunks cheap, chunks enough for many threads.
Int chunk_columns(Int columns) {
  constexpr Int kLeast = 16, kChunks = 256;  // in blocks; chunks
  return kBlock * std::max(kLeast, ceil_div(columns, kChunks * kBlock));
}

std::vector<Rows> split_columns(const Rows& rows, DType dtype) {
  std::vector<Rows> chunks;
  const Int step = chunk_columns(rows.columns);
  for (Int c = 0; c < rows.columns; c += step)
    chunks.push_back({advance(rows.data, dtype, c), rows.stride, std::min(step, rows.columns - c), rows.count});
  return chunks;
}

// ---- gram and combine ----------------------------------------------------------------------------------------------

Rows rows_of(const Handle& jacobian, int count, Int columns) {
  return {reinterpret_cast<const void*>(std::get<0>(jacobian)), std::get<2>(jacobian), columns, count};
}

void gram(const Handle& jacobian, int count, Int columns, std::uintptr_t out, int threads) {
  const DType dtype = static_cast<DType>(std::get<1>(jacobian));
  const std::vector<Rows> chunks = split_columns(rows_of(jacobian, count, columns), dtype);
  const Int products = Int{count} * count, tasks = static_cast<Int>(chunks.size());
  threads = useful_threads(threads, count * columns * static_cast<Int>(kBytes[dtype]));

  struct alignas(64) Line {
    char bytes[64];
  };
  const std::size_t lines = gram_scratch(count) / sizeof(Line);
  const std::unique_ptr<Line[]> scratch(new Line[lines * threads]);
  std::vector<double> partial(products * tasks), total(products);
  parallel_for(tasks, threads, [&](Int task, int thread) {
    kernels().gram[dtype](chunks[task], partial.data() + task * products, scratch.get() + lines * thread);
  });
  for (Int task = 0; task < tasks; ++task)
    for (Int i = 0; i < products; ++i) total[i] += partial[task * products + i];

  const DType out_dtype = accumulation_dtype(dtype, dtype);
  for (int i = 0; i < count; ++i)
    for (int j = i; j < count; ++j) {
      write_number(out, out_dtype, Int{i} * count + j, total[i * count + j]);
      write_number(out, out_dtype, Int{j} * count + i, total[i * count + j]);
    }
}

void combine(const Handle& jacobian, int count, Int columns, const Handle& weights, std::uintptr_t out, int threads) {
  const DType dtype = static_cast<DType>(std::get<1>(jacobian));
  const std::vector<Rows> chunks = split_columns(rows_of(jacobian, count, columns), dtype);
  const Numbers numbers(weights);
  double w[kMaxRows];
  for (int i = 0; i < count; ++i) w[i] = numbers[i];
  void* const destination = reinterpret_cast<void*>(out);
  prefer_huge_pages(destination, columns * static_cast<Int>(kBytes[dtype]));
  const Int step = chunk_columns(columns);
  parallel_for(static_cast<Int>(chunks.size()), useful_threads(threads, count * columns * static_cast<Int>(kBytes[dtype])),
               [&](Int task, int) { kernels().combine[dtype](chunks[task], w, advance(destination, dtype, task * step)); });
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
