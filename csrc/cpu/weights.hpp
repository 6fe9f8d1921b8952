// Weights from a Gramian, [k, k], on memory that Python has checked. present: bool [k]; out: [k] in the Gramian's type.
#pragma once
#include "tensors.hpp"

namespace diffmtl::cpu {

// order: int64 [k, k - 1].
void pcgrad_weights(const Handle& gramian, int k, std::uintptr_t order, std::uintptr_t present, std::uintptr_t out);

// delta: for Gramians of this type.
void nash_weights(const Handle& gramian, int k, double delta, std::uintptr_t present, int newton_steps,
                  int line_search_steps, double converged, std::uintptr_t out);

}  // namespace diffmtl::cpu
