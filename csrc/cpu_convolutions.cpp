// The CPU side of convolutions' weight gradients: padded copies, division into tiles, Python boundary.
//
// Every element of a result is summed by one thread in an order of its own: how many threads there are changes no bit.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "cpu_memory.hpp"
#include "cpu_numbers.hpp"
#include "cpu_threads.hpp"

namespace py = pybind11;

namespace diffmtl {
namespace cpu {
namespace {

using Sizes = std::array<Int, 3>;
// (address, DType, sizes and strides of [samples, channels, depth, height, width])
using Images = std::tuple<std::uintptr_t, int, std::array<Int, 5>, std::array<Int, 5>>;
// (kernel, stride, padding, dilation)
using Geometry = std::tuple<Sizes, Sizes, Sizes, Sizes>;

// Outputs of a tile: its input is read from a near cache for all of them.
constexpr Int kTileOutputs = 12;
// The copies of some samples, which fill the caches no further than this.
constexpr Int kScratchBytes = 4 << 20;

Int product(const Sizes& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// Images of one tensor and the form of their copies.
struct Planes {
  Planes(const Images& images, const Sizes& padding, const Sizes& steps, const Sizes& spans, Int length)
      : data(reinterpret_cast<const void*>(std::get<0>(images))),
        dtype(static_cast<DType>(std::get<1>(images))),
        channels(std::get<2>(images)[1]),
        strides(std::get<3>(images)),
        padding(padding),
        steps(steps),
        spans(spans),
        length(length) {
    std::copy_n(std::get<2>(images).begin() + 2, 3, sizes.begin());
  }

  void copy(Int sample, Int channel, void* out) const {
    const void* from = advance(data, dtype, sample * strides[0] + channel * strides[1]);
    kernels().conv_plane[dtype](
        {from, sizes.data(), strides.data() + 2, padding.data(), steps.data(), spans.data(), length, out});
  }

  const void* data;
  DType dtype;
  Int channels;
  std::array<Int, 5> strides;
  Sizes sizes{}, padding, steps, spans;
  Int length;  // of a copy, in elements
};

// Samples of one cluster whose copies are made at a time.
struct Piece {
  Int cluster, begin, end;
  bool add;
  Int offset;  // samples before it in the scratch memory
};

// Runs of pieces whose copies fit into `room` samples.
std::vector<std::vector<Piece>> divide(const std::vector<Int>& bounds, Int room, bool add) {
  std::vector<std::vector<Piece>> runs(1);
  Int used = 0;
  for (std::size_t k = 0; k + 1 < bounds.size(); ++k) {
    Int begin = bounds[k];
    do {  // an empty cluster has a piece, too, which writes its zeros
      if (used == room) {
        runs.emplace_back();
        used = 0;
      }
      const Int end = std::min(bounds[k + 1], begin + room - used);
      runs.back().push_back({static_cast<Int>(k), begin, end, add || begin > bounds[k], used});
      used += end - begin;
      begin = end;
    } while (begin < bounds[k + 1]);
  }
  return runs;
}

// out: [clusters, outputs, inputs / groups * kernel] in float32, or float64 where the images are.
void cluster_conv_wgrad(const Images& grad_images, const Images& x_images, const std::vector<Int>& bounds, Int groups,
                        const Geometry& geometry, const Handle& out_handle, bool add, int threads) {
  const auto& [kernel, steps, padding, dilation] = geometry;
  const Numbers out(out_handle);
  const Int item = static_cast<Int>(kBytes[out.dtype]), lanes = kLongestRegister / item;
  const auto& x_sizes = std::get<2>(x_images);
  const auto& grad_sizes = std::get<2>(grad_images);
  Sizes spans;
  for (int d = 0; d < 3; ++d) spans[d] = ceil_div(x_sizes[d + 2] + 2 * padding[d], steps[d]);
  const Int reach = ((grad_sizes[2] - 1) * spans[1] + grad_sizes[3] - 1) * spans[2] + grad_sizes[4];
  const Int length = ceil_div(reach, lanes) * lanes;
  // A gradient's last register may end behind the input's last element.
  const Planes x(x_images, padding, steps, spans, ceil_div(product(steps) * product(spans), lanes) * lanes + lanes);
  const Planes grad(grad_images, {0, 0, 0}, {1, 1, 1}, spans, length);
  const Int group_inputs = x.channels / groups, group_outputs = grad.channels / groups;

  std::vector<Int> shifts;
  for (Int channel = 0; channel < group_inputs; ++channel)
    for (Int a = 0; a < kernel[0]; ++a)
      for (Int b = 0; b < kernel[1]; ++b)
        for (Int c = 0; c < kernel[2]; ++c) {
          const Sizes at{a * dilation[0], b * dilation[1], c * dilation[2]};
          const Int residue = (at[0] % steps[0] * steps[1] + at[1] % steps[1]) * steps[2] + at[2] % steps[2];
          const Int place = (at[0] / steps[0] * spans[1] + at[1] / steps[1]) * spans[2] + at[2] / steps[2];
          shifts.push_back(channel * x.length + residue * product(spans) + place);
        }
  const Int inputs = static_cast<Int>(shifts.size());

  const Int per_sample = (x.channels * x.length + grad.channels * grad.length) * item;
  const Int room = std::clamp<Int>(kScratchBytes / per_sample, 1, std::max<Int>(1, bounds.back()));
  const Int grad_bytes = grad.channels * grad.length * item, x_bytes = x.channels * x.length * item;
  const std::unique_ptr<Line[]> scratch(new Line[static_cast<std::size_t>(room * (grad_bytes + x_bytes)) / sizeof(Line) + 1]);
  char* const grads = scratch[0].bytes;
  char* const values = grads + room * grad_bytes;
  const Int blocks = ceil_div(group_outputs, kTileOutputs);
  const auto multiply = kernels().conv_tile[out.dtype];

  for (const std::vector<Piece>& run : divide(bounds, room, add)) {
    const Int first = run.front().begin, samples = run.back().end - first, planes = grad.channels + x.channels;
    parallel_for(samples * planes, useful_threads(threads, samples * per_sample), [&](Int task, int) {
      const Int sample = task / planes, plane = task % planes;
      if (plane < grad.channels) {
        grad.copy(first + sample, plane, grads + sample * grad_bytes + plane * grad.length * item);
      } else {
        const Int channel = plane - grad.channels;
        x.copy(first + sample, channel, values + sample * x_bytes + channel * x.length * item);
      }
    });
    // A product takes about the time of half a byte.
    const Int products = samples * grad.channels * inputs * length;
    const Int tiles = static_cast<Int>(run.size()) * groups * blocks;
    parallel_for(tiles, useful_threads(threads, products / 2), [&](Int task, int) {
      const Piece& piece = run[static_cast<std::size_t>(task / (groups * blocks))];
      const Int group = task / blocks % groups, begin = task % blocks * kTileOutputs;
      const Int output = group * group_outputs + begin;
      multiply({grads + piece.offset * grad_bytes + output * length * item, grad_bytes / item, length,
                values + piece.offset * x_bytes + group * group_inputs * x.length * item, x_bytes / item, shifts.data(),
                piece.end - piece.begin, std::min(kTileOutputs, group_outputs - begin), inputs, piece.add,
                advance(const_cast<void*>(out.data), out.dtype, piece.cluster * out.stride + output * inputs), inputs});
    });
  }
}

}  // namespace
}  // namespace cpu

void register_cpu_convolutions(py::module_& module) {
  module.def("cpu_cluster_conv_wgrad", &cpu::cluster_conv_wgrad, py::call_guard<py::gil_scoped_release>());
}

}  // namespace diffmtl
