// The one Python module of the C++ side. Each area registers its own functions.
#include "bindings.hpp"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled parts of diffmtl_fast: interval clustering solvers and the CPU kernels of the ops.";
  diffmtl::register_clustering(module);
  diffmtl::register_cpu_clusters(module);
  diffmtl::register_cpu_convolutions(module);
  diffmtl::register_cpu_ops(module);
  diffmtl::register_cpu_losses(module);
  diffmtl::register_cpu_norms(module);
  diffmtl::register_cpu_panels(module);
  diffmtl::register_cpu_weights(module);
}
