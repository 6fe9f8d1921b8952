// The CPU side of normalisations: division into groups, Python boundary.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "bindings.hpp"
#include "cpu_numbers.hpp"
#include "cpu_threads.hpp"

namespace py = pybind11;

namespace diffmtl {
namespace cpu {
namespace {

// Elements that one task works on at least.
constexpr Int kTaskSize = 1 << 15;

// grad, x and by_x: [samples, channels, size] without gaps; mean and rstd: [samples, groups]; weight: [channels];
// by_weight and by_bias: float64 [samples, channels].
void group_norm_backward(const Handle& grad, const Handle& x, const Handle& mean, const Handle& rstd,
                         const std::optional<Handle>& weight, Int samples, Int channels, Int size, Int groups, const Handle& by_x,
                         std::uintptr_t by_weight, std::uintptr_t by_bias, int threads) {
  const Numbers slopes(grad), values(x), out(by_x), means(mean), rstds(rstd);
  std::vector<double> weights(static_cast<std::size_t>(channels), 1.0);
  if (weight)
    for (Int c = 0; c < channels; ++c) weights[c] = Numbers(*weight)[c];
  const Int width = channels / groups, elements = width * size, total = samples * groups;
  const Int per_task = std::max<Int>(1, kTaskSize / std::max<Int>(1, elements));
  const auto kernel = kernels().group_norm[values.dtype];
  threads = useful_threads(threads, 3 * total * elements * static_cast<Int>(kBytes[values.dtype]));
  parallel_for(ceil_div(total, per_task), threads, [&](Int task, int) {
    for (Int i = task * per_task; i < std::min(total, (task + 1) * per_task); ++i) {
      const Int first = i * width;
      kernel({advance(slopes.data, slopes.dtype, i * elements), advance(values.data, values.dtype, i * elements), means.at(i),
              rstds.at(i), weights.data() + i % groups * width, width, size,
              advance(const_cast<void*>(out.data), out.dtype, i * elements), reinterpret_cast<double*>(by_weight) + first,
              reinterpret_cast<double*>(by_bias) + first});
    }
  });
}

}  // namespace
}  // namespace cpu

void register_cpu_norms(py::module_& module) {
  module.def("cpu_group_norm_backward", &cpu::group_norm_backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace diffmtl
