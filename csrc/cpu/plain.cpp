// The CPU kernels for what every processor of the architecture has.
#include "kernel_table.hpp"

namespace diffmtl::cpu {

const Kernels* plain_kernels() {
  static constexpr Kernels kernels = make_kernels("plain");
  return &kernels;
}

}  // namespace diffmtl::cpu
