// Memory that results and intermediate ones are written to.
#pragma once
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.hpp"

namespace diffmtl::cpu {

// What scratch memory is made of, so that it begins at a cache line.
struct alignas(64) Line {
  char bytes[64];
};

// Fresh memory is cleared by the system at the first write, page by page: with small pages that takes as long as
// computing what is written. A hint only; it changes nothing where the pages are there already.
inline void prefer_huge_pages(void* p, Int bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = 1 << 21;
  if (bytes < Int{16 * kHugePage}) return;
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(p);
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes)) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace diffmtl::cpu
