// Tensors as Python passes them.
#pragma once
#include <cstdint>
#include <tuple>

#include "kernels.hpp"

namespace diffmtl::cpu {

// (address, DType, elements from one entry of the first dimension to the next)
using Handle = std::tuple<std::uintptr_t, int, Int>;

// A Jacobian is a list of members, each K rows over the columns of one parameter: (address, DType, elements from one
// row to the next, columns).
using Member = std::tuple<std::uintptr_t, int, Int, Int>;

}  // namespace diffmtl::cpu
