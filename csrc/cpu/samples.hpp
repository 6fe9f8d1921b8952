// A batch of samples: division into blocks, and elements that are read or generated block by block.
//
// Where a sample is divided depends on its size alone: the number of threads changes no bit of a result.
#pragma once
#include <algorithm>

#include "numbers.hpp"
#include "threads.hpp"

namespace diffmtl::cpu {
namespace {

// The samples of a batch; in each tensor the elements of a sample lie next to each other.
struct Batch {
  Int samples, size;
};

// Elements that one task works on at least; a kernel is called for one block of a sample.
constexpr Int kTaskSize = 1 << 15;

// body(block, sample, first element, elements) for every block of every sample: large samples are divided, small ones
// share a task. bytes: what an element costs, in bytes read or written.
template <class Body>
void for_blocks(const Batch& batch, Int bytes, int threads, const Body& body) {
  if (batch.samples == 0 || batch.size == 0) return;
  const Int per_sample = ceil_div(batch.size, kBlock), total = batch.samples * per_sample;
  const Int per_task = std::max<Int>(1, kTaskSize / std::min(batch.size, kBlock));
  threads = useful_threads(threads, batch.samples * batch.size * bytes);
  parallel_for(ceil_div(total, per_task), threads, [&](Int task, int) {
    const Int end = std::min(total, (task + 1) * per_task);
    for (Int block = task * per_task; block < end; ++block) {
      const Int sample = block / per_sample, begin = block % per_sample * kBlock;
      body(block, sample, begin, std::min(kBlock, batch.size - begin));
    }
  });
}

inline const void* element(const Numbers& tensor, Int sample, Int begin) {
  return advance(tensor.data, tensor.dtype, sample * tensor.stride + begin);
}

inline Int bytes_of(DType dtype) { return static_cast<Int>(kBytes[dtype]); }

// The elements of a tensor, or the noise that a seed stands for.
class Elements {
 public:
  explicit Elements(const Handle& handle) : numbers_(handle), generated_(numbers_.dtype == kSeed) {
    if (generated_) seed_ = *static_cast<const std::uint64_t*>(numbers_.data);
  }

  DType dtype() const { return generated_ ? kFloat32 : numbers_.dtype; }
  // Generating an element takes about as long as reading this much.
  Int bytes() const { return generated_ ? 16 : bytes_of(numbers_.dtype); }

  // n elements of a sample; noise is written to `scratch` first.
  const void* at(Int sample, Int begin, Int n, float* scratch) const {
    if (!generated_) return element(numbers_, sample, begin);
    kernels().normals(seed_, sample, begin, n, scratch);
    return scratch;
  }

 private:
  Numbers numbers_;
  bool generated_;
  std::uint64_t seed_ = 0;
};

// Memory for what is formed block by block, small enough to stay in the first cache.
struct Scratch {
  alignas(64) float first[kBlock], second[kBlock];
  alignas(64) double mixed[kBlock];  // or floats
};

}  // namespace
}  // namespace diffmtl::cpu
