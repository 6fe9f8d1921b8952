// The Python module. Nothing else includes pybind11, which takes the compiler longer than most of what it binds.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>

#include "clustering/choose_solver.hpp"
#include "cpu/convolution.hpp"
#include "cpu/instruction_sets.hpp"
#include "cpu/jacobian.hpp"
#include "cpu/layers.hpp"
#include "cpu/losses.hpp"
#include "cpu/noise.hpp"
#include "cpu/weights.hpp"

namespace py = pybind11;

namespace diffmtl {
namespace {

// ---- Clustering ----------------------------------------------------------------------------------------------------

template <class Element>
using Array = py::array_t<Element, py::array::c_style>;

// numpy arrays may lie anywhere, in a memory-mapped file for example.
void check_aligned(const py::array& array, const std::string& name) {
  if (reinterpret_cast<std::uintptr_t>(array.data()) % static_cast<std::uintptr_t>(array.itemsize()))
    throw py::value_error(name + ": expected aligned memory");
}

Int length(const py::array& values, const std::string& name) {
  if (values.ndim() != 1) throw py::value_error(name + ": expected one dimension, found " + std::to_string(values.ndim()));
  check_aligned(values, name);
  return values.shape(0);
}

Int square_side(const py::array& matrix, const std::string& name) {
  if (matrix.ndim() != 2 || matrix.shape(0) != matrix.shape(1)) {
    std::ostringstream shape;
    for (py::ssize_t i = 0; i < matrix.ndim(); ++i) shape << (i ? ", " : "") << matrix.shape(i);
    throw py::value_error(name + ": expected a square matrix, found shape [" + shape.str() + "]");
  }
  check_aligned(matrix, name);
  return matrix.shape(0);
}

// What solve(query) finds without the GIL, as (boundaries, cost) of every number of intervals. The handlers of signals
// run with it.
template <class Solve>
py::list run(Query query, const Solve& solve) {
  query.interrupted = [] {
    py::gil_scoped_acquire locked;
    return PyErr_CheckSignals() != 0;
  };
  std::vector<Solution> solutions;
  try {
    py::gil_scoped_release unlocked;
    solutions = solve(query);
  } catch (const Interrupted&) {
    throw py::error_already_set();  // what the signal's handler raised
  }
  py::list list;
  for (const auto& [boundaries, cost] : solutions)
    list.append(py::make_tuple(py::array_t<Int>(static_cast<py::ssize_t>(boundaries.size()), boundaries.data()), cost));
  return list;
}

template <auto kSolve>
py::list values(const Array<double>& x, Int first_k, Int last_k, Int min_size, Int max_size, const std::string& solver,
                Int threads, const std::string& name) {
  const Int n = length(x, name);
  return run({first_k, last_k, min_size, max_size, solver, threads, {}},
             [&](const Query& query) { return kSolve(x.data(), n, name, query); });
}

template <class Element>
py::list affinity(const Array<Element>& tas, Int first_k, Int last_k, Int min_size, Int max_size, const std::string& solver,
                  Int threads) {
  const Int n = square_side(tas, "tas");
  return run({first_k, last_k, min_size, max_size, solver, threads, {}},
             [&](const Query& query) { return cluster_affinity(tas.data(), n, query); });
}

py::list matrix(const Array<double>& cost, Int first_k, Int last_k, Int min_size, Int max_size, const std::string& solver,
                Int threads, bool monge) {
  const Int n = square_side(cost, "cost");
  return run({first_k, last_k, min_size, max_size, solver, threads, {}},
             [&](const Query& query) { return cluster_matrix(cost.data(), n, monge, query); });
}

py::list callback(std::uintptr_t address, Int n, Int first_k, Int last_k, Int min_size, Int max_size,
                  const std::string& solver, Int threads, bool monge) {
  return run({first_k, last_k, min_size, max_size, solver, threads, {}},
             [&](const Query& query) { return cluster_callback(address, n, monge, query); });
}

void bind_clustering(py::module_& module) {
  const auto bind = [&](const char* name, auto function, const char* data, auto... rest) {
    module.def(name, function, py::arg(data).noconvert(), py::arg("first_k"), py::arg("last_k"), py::arg("min_size"),
               py::arg("max_size"), py::arg("solver"), py::arg("threads"), py::arg(rest)...);
  };
  bind("cluster_absolute", &values<cluster_absolute>, "values", "name");
  bind("cluster_squared", &values<cluster_squared>, "values", "name");
  bind("cluster_affinity", &affinity<float>, "matrix");
  bind("cluster_affinity", &affinity<double>, "matrix");
  bind("cluster_matrix", &matrix, "matrix", "monge");
  module.def("cluster_callback", &callback, py::arg("address"), py::arg("num_timesteps"), py::arg("first_k"),
             py::arg("last_k"), py::arg("min_size"), py::arg("max_size"), py::arg("solver"), py::arg("threads"),
             py::arg("monge"));
}

// ---- The ops on the CPU --------------------------------------------------------------------------------------------

void bind_cpu(py::module_& module) {
  using namespace cpu;
  select_kernels(std::nullopt);
  module.attr("CPU_MAX_ROWS") = kMaxRows;
  module.attr("CPU_SEED") = static_cast<int>(kSeed);
  module.def("cpu_kernels", &kernel_names, "Instruction sets that this processor can run, the best one last.");
  module.def("cpu_select_kernels", &select_kernels, py::arg("name"), "Use this instruction set; None: the best one.");
  module.def("cpu_pcgrad_weights", &pcgrad_weights);
  module.def("cpu_gradvac_weights", &gradvac_weights);
  module.def("cpu_nash_weights", &nash_weights);
  module.attr("CPU_GRAMIAN_METHODS") = gramian_methods();
  module.def("cpu_gramian_weights", &gramian_weights);

  const auto bind = [&](const char* name, auto function) {
    module.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  bind("cpu_gram", &gram);
  bind("cpu_gram_panels", &gram_panels);
  bind("cpu_combine", &combine);
  bind("cpu_sample_loss", &sample_loss);
  bind("cpu_sample_loss_backward", &sample_loss_backward);
  bind("cpu_cluster_mse", &cluster_mse);
  bind("cpu_cluster_mean", &cluster_mean);
  bind("cpu_cluster_mean_backward", &cluster_mean_backward);
  bind("cpu_uncertainty_loss", &uncertainty_loss);
  bind("cpu_add_noise", &add_noise);
  bind("cpu_philox_normal", &philox_normal);
  bind("cpu_box_muller", &box_muller);
  bind("cpu_cluster_wgrad", &cluster_wgrad);
  bind("cpu_cluster_sum", &cluster_sum);
  bind("cpu_cluster_conv_wgrad", &cluster_conv_wgrad);
  bind("cpu_group_norm_backward", &group_norm_backward);
  bind("cpu_cluster_norm_backward", &cluster_norm_backward);
}

}  // namespace
}  // namespace diffmtl

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled parts of diffmtl_fast: interval clustering solvers and the CPU kernels of the ops.";
  diffmtl::bind_clustering(module);
  diffmtl::bind_cpu(module);
}
