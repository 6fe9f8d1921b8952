// Single numbers read from and written to tensors.
#pragma once
#include "element_types.hpp"
#include "tensors.hpp"

namespace diffmtl::cpu {
namespace {

// The numbers of a tensor: of a vector by their index, of a matrix by their distance from the first one.
struct Numbers {
  explicit Numbers(const Handle& handle)
      : data(reinterpret_cast<const void*>(std::get<0>(handle))),
        dtype(static_cast<DType>(std::get<1>(handle))),
        stride(std::get<2>(handle)) {}

  double operator[](Int i) const { return at(i * stride); }

  double at(Int offset) const {
    switch (dtype) {
      case kFloat64: return static_cast<const double*>(data)[offset];
      case kBFloat16: return to_number(static_cast<const BFloat16*>(data)[offset]);
      case kFloat16: return to_number(static_cast<const Float16*>(data)[offset]);
      default: return static_cast<const float*>(data)[offset];
    }
  }

  const void* data;
  DType dtype;
  Int stride;
};

inline void write_number(std::uintptr_t data, DType dtype, Int i, double value) {
  void* p = reinterpret_cast<void*>(data);
  switch (dtype) {
    case kFloat64: static_cast<double*>(p)[i] = value; break;
    case kBFloat16: static_cast<BFloat16*>(p)[i] = from_number<BFloat16>(value); break;
    case kFloat16: static_cast<Float16*>(p)[i] = from_number<Float16>(value); break;
    default: static_cast<float*>(p)[i] = static_cast<float>(value);
  }
}

inline Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }

inline const void* advance(const void* p, DType dtype, Int elements) {
  return static_cast<const char*>(p) + elements * static_cast<Int>(kBytes[dtype]);
}
inline void* advance(void* p, DType dtype, Int elements) {
  return static_cast<char*>(p) + elements * static_cast<Int>(kBytes[dtype]);
}

// The type that sums over these are formed and returned in.
inline DType accumulation_dtype(DType a, DType b) { return a == kFloat64 || b == kFloat64 ? kFloat64 : kFloat32; }

}  // namespace
}  // namespace diffmtl::cpu
