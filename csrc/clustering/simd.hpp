// Loops compiled for several instruction sets, chosen when the extension loads. They only ever find candidates:
// what is returned to the user is computed in exact arithmetic, so it does not depend on the machine.
#pragma once
#include <limits>

#include "wide.hpp"

// Not in sanitizer builds: the choosing code would run before the sanitizer is ready.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(DIFFMTL_SANITIZE)
#define DIFFMTL_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define DIFFMTL_CLONES
#endif
#define DIFFMTL_INLINE inline __attribute__((always_inline))

namespace diffmtl {

// Smallest value(i), i in 0 .. n - 1. Independent partial minima, which compilers turn into vector registers.
template <class Scalar, class Value>
DIFFMTL_INLINE Scalar minimum(Int n, Scalar infinity, Value value) {
  constexpr Int kLanes = 32;
  Scalar lane[kLanes];
  for (Int j = 0; j < kLanes; ++j) lane[j] = infinity;
  Int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (Int j = 0; j < kLanes; ++j) {
      const Scalar here = value(i + j);
      lane[j] = here < lane[j] ? here : lane[j];
    }
  Scalar best = infinity;
  for (; i < n; ++i) best = value(i) < best ? value(i) : best;
  for (Int j = 0; j < kLanes; ++j) best = lane[j] < best ? lane[j] : best;
  return best;
}

// First i in from .. n - 1 with value(i) <= bound, or n.
template <class Scalar, class Value>
DIFFMTL_INLINE Int first_within(Int from, Int n, Scalar bound, Value value) {
  constexpr Int kLanes = 32;
  Int i = from;
  for (; i + kLanes <= n; i += kLanes) {
    int any = 0;
    for (Int j = 0; j < kLanes; ++j) any |= value(i + j) <= bound;
    if (any) break;
  }
  while (i < n && !(value(i) <= bound)) ++i;
  return i;
}

}  // namespace diffmtl
