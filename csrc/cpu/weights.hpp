// Weights from a Gramian, [k, k], on memory that Python has checked. present: bool [k], null for all; out: [k] in the
// Gramian's type.
#pragma once
#include <string>
#include <vector>

#include "tensors.hpp"

namespace diffmtl::cpu {

// order: int64 [k, k - 1].
void pcgrad_weights(const Handle& gramian, int k, std::uintptr_t order, std::uintptr_t present, std::uintptr_t out);

// targets: float64 [k, k], moved in place. largest: of a target.
void gradvac_weights(const Handle& gramian, int k, std::uintptr_t order, std::uintptr_t present, std::uintptr_t targets,
                     double beta, double largest, std::uintptr_t out);

// delta: for Gramians of this type.
void nash_weights(const Handle& gramian, int k, double delta, std::uintptr_t present, int newton_steps,
                  int line_search_steps, double converged, std::uintptr_t out);

// The methods of gramian_weights by the names of their classes.
std::vector<std::string> gramian_methods();

// unit: of the rounding of the Gramian's type.
void gramian_weights(const Handle& gramian, int k, std::uintptr_t present, const std::string& method, double unit,
                     const std::vector<double>& settings, std::uintptr_t out);

}  // namespace diffmtl::cpu
