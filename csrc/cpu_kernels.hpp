// The streaming kernels of the CPU ops and how one set of them is chosen.
//
// cpu_loops.hpp is compiled once for every instruction set, each time into a table of this type. A kernel runs on
// one thread over one chunk of memory; cpu_ops.cpp and cpu_losses.cpp divide tensors into chunks and add up what those
// return.
#pragma once
#include <cstddef>
#include <cstdint>

namespace diffmtl::cpu {

using Int = std::int64_t;

// The codes that diffmtl_fast/ops/_cpu.py sends.
enum DType { kFloat32, kFloat64, kBFloat16, kFloat16, kDTypes };

constexpr std::size_t kBytes[kDTypes] = {4, 8, 2, 2};

constexpr int kMaxRows = 64;
// Terms are added up in the computing precision (float32, or float64 where an input is) within a block only.
constexpr Int kBlock = 1024;

// K rows of a Jacobian or of a part of its columns; elements of a row lie next to each other.
struct Rows {
  const void* data;
  Int stride;  // in elements
  Int columns;
  int count;
};

struct Kernels {
  const char* name;
  // sums[i * count + j] += <row i, row j> for i <= j. scratch: gram_scratch(count) bytes, aligned to 64.
  void (*gram[kDTypes])(const Rows& rows, double* sums, void* scratch);
  // out = (accumulate ? out : 0) + weights * rows, by the types of the rows and of the output. Returns |out|^2.
  double (*combine[kDTypes][kDTypes])(const Rows& rows, const double* weights, bool accumulate, void* out);
  // The sum of (a - b)^2 over n elements.
  double (*squared_distance[kDTypes][kDTypes])(const void* a, const void* b, Int n);
  // out = (a - b) * scale, in the type of a.
  void (*scaled_difference[kDTypes][kDTypes])(const void* a, const void* b, double scale, void* out, Int n);
};

constexpr std::size_t gram_scratch(int rows) { return sizeof(double) * kBlock * static_cast<std::size_t>(rows); }

// Null where the table was not compiled for this architecture.
const Kernels* plain_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The table in use.
const Kernels& kernels();

}  // namespace diffmtl::cpu
