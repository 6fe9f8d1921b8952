// Tensors as Python passes them, and the refusal of types that do not go together.
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

// Throws std::invalid_argument: "<what>: expected <expected>, found <a> and <b>".
[[noreturn]] void refuse_dtypes(const char* what, const char* expected, DType a, DType b);

// Kernels read both by the type of one.
inline void check_one_dtype(const char* what, DType a, DType b) {
  if (a != b) refuse_dtypes(what, "one dtype", a, b);
}

}  // namespace diffmtl::cpu
