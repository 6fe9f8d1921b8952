// The CPU kernels for AVX2; CMakeLists.txt compiles this file for it, on x86-64 only.
#include "kernels.hpp"

#if defined(__AVX2__)
#include "kernel_table.hpp"

namespace diffmtl::cpu {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = make_kernels("avx2");
  return &kernels;
}

}  // namespace diffmtl::cpu
#else
namespace diffmtl::cpu {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace diffmtl::cpu
#endif
