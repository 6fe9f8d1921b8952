// Loops on several threads.
#pragma once
#include <algorithm>
#include <functional>

#include "kernels.hpp"

namespace diffmtl::cpu {

// body(task, thread) for every task in 0 .. tasks - 1, in any order, on at most `threads` threads. The body must not
// throw. thread: which of them, 0 .. threads - 1, for scratch memory.
void parallel_for(Int tasks, int threads, const std::function<void(Int task, int thread)>& body);

// Waking a thread costs some microseconds, in which another one reads about this much.
constexpr Int kBytesPerThread = 1 << 17;

inline int useful_threads(int threads, Int bytes) {
  return static_cast<int>(std::min<Int>(threads, bytes / kBytesPerThread + 1));
}

// Blocks of a result for every thread, so that they finish together.
constexpr Int kBlocksPerThread = 4;

// The least multiple of `unit` that divides `size` into at least `parts`, if that leaves `least` in a part.
inline Int part_size(Int size, Int parts, Int unit, Int least) {
  const auto divide = [](Int a, Int b) { return (a + b - 1) / b; };
  return std::max(least, divide(divide(size, std::max<Int>(1, parts)), unit) * unit);
}

}  // namespace diffmtl::cpu
