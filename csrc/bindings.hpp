#pragma once
#include <pybind11/pybind11.h>

namespace diffmtl {
void register_clustering(pybind11::module_& module);
void register_cpu_clusters(pybind11::module_& module);
void register_cpu_convolutions(pybind11::module_& module);
void register_cpu_ops(pybind11::module_& module);
void register_cpu_losses(pybind11::module_& module);
void register_cpu_norms(pybind11::module_& module);
void register_cpu_panels(pybind11::module_& module);
void register_cpu_weights(pybind11::module_& module);
}  // namespace diffmtl
