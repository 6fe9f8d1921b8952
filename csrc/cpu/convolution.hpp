// Weight gradients of convolutions, on memory that Python has checked.
#pragma once
#include <array>
#include <vector>

#include "tensors.hpp"

namespace diffmtl::cpu {

using Sizes = std::array<Int, 3>;
// (address, DType, sizes and strides of [samples, channels, depth, height, width])
using Images = std::tuple<std::uintptr_t, int, std::array<Int, 5>, std::array<Int, 5>>;
// (kernel, stride, padding, dilation)
using Geometry = std::tuple<Sizes, Sizes, Sizes, Sizes>;

// out: [clusters, outputs, inputs / groups * kernel] in float32, or float64 where the images are. bounds: of the clusters'
// first samples, and the end.
void cluster_conv_wgrad(Images grad, Images x, const std::vector<Int>& bounds, Int groups, const Geometry& geometry,
                        const Handle& out, bool add, int threads);

}  // namespace diffmtl::cpu
