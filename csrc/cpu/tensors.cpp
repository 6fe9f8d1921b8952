#include "tensors.hpp"

#include <stdexcept>
#include <string>

namespace diffmtl::cpu {

void refuse_dtypes(const char* what, const char* expected, DType a, DType b) {
  const std::string names[kDTypes] = {"float32", "float64", "bfloat16", "float16"};
  throw std::invalid_argument(std::string(what) + ": expected " + expected + ", found " + names[a] + " and " + names[b]);
}

}  // namespace diffmtl::cpu
