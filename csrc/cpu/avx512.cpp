// The CPU kernels for AVX-512; CMakeLists.txt compiles this file for it, on x86-64 only.
#include "kernels.hpp"

#if defined(__AVX512F__)
#include "kernel_table.hpp"

namespace diffmtl::cpu {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512");
  return &kernels;
}

}  // namespace diffmtl::cpu
#else
namespace diffmtl::cpu {

const Kernels* avx512_kernels() { return nullptr; }

}  // namespace diffmtl::cpu
#endif
