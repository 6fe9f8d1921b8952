// The ops over a Jacobian, on memory that Python has checked.
#pragma once
#include <vector>

#include "tensors.hpp"

namespace diffmtl::cpu {

// Where the combination of a member's rows goes: (address, DType, whether to add to what is there).
using Destination = std::tuple<std::uintptr_t, int, bool>;

// The products of at most kMaxRows rows with each other, [count, count]; and of any number of rows. Every member's are
// formed in its own type, and in `least`, kFloat32 or kFloat64, at least.
void gram(const std::vector<Member>& members, int count, int least, std::uintptr_t out, int out_dtype, int threads);
void gram_panels(const std::vector<Member>& members, Int count, int least, std::uintptr_t out, int out_dtype, int threads);

// The weighted sums of at most kMaxRows rows. Returns the squared norm of all that was written.
double combine(const std::vector<Destination>& destinations, const std::vector<Member>& members, int count,
               const Handle& weights, int threads);

}  // namespace diffmtl::cpu
