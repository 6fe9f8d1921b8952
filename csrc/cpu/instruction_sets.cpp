// The choice of a table of kernels, from what the processor can run.
#include "instruction_sets.hpp"

#include <atomic>
#include <stdexcept>

#include "kernels.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace diffmtl::cpu {
namespace {

#if defined(__x86_64__)
// Asked of the processor itself: not every compiler's __builtin_cpu_supports knows this name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// What CMakeLists.txt compiles avx2.cpp for, and what it adds for avx512.cpp.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

// The best one last.
std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> tables{plain_kernels()};
  if (avx2_kernels() && has_avx2()) tables.push_back(avx2_kernels());
  if (avx512_kernels() && has_avx512()) tables.push_back(avx512_kernels());
  return tables;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& kernels() { return *active; }

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernels* table : supported_kernels()) names.emplace_back(table->name);
  return names;
}

std::string select_kernels(const std::optional<std::string>& name) {
  std::string names;
  for (const Kernels* table : supported_kernels()) {
    names += (names.empty() ? "" : ", ") + std::string(table->name);
    if (!name || *name == table->name) active = table;
    if (name && *name == table->name) return *name;
  }
  if (name)
    throw std::invalid_argument("DIFFMTL_CPU_KERNELS: expected one of " + names + " on this processor, found " + *name);
  return kernels().name;
}

}  // namespace diffmtl::cpu
