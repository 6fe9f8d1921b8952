// The ops over layers, on memory that Python has checked.
#pragma once
#include <optional>
#include <vector>

#include "tensors.hpp"

namespace diffmtl::cpu {

// grad: [rows, outputs]; x: [rows, inputs], of the same type; out: [clusters, outputs, inputs]. offsets: of the clusters'
// first rows, and the end; clusters of more than `longest` rows are left out.
void cluster_wgrad(const Handle& grad, const Handle& x, const std::vector<Int>& offsets, Int longest, Int outputs, Int inputs,
                   const Handle& out, bool add, int threads);

// values: [rows, columns]; out: [clusters, columns]. offsets: of the clusters' first rows, and the end.
void cluster_sum(const Handle& values, const std::vector<Int>& offsets, Int columns, const Handle& out, bool add, int threads);

// grad, x and by_x: [samples, channels, size] without gaps, of one type; mean and rstd: [samples, groups]; weight:
// [channels]; by_weight and by_bias: float64 [samples, channels].
void group_norm_backward(const Handle& grad, const Handle& x, const Handle& mean, const Handle& rstd,
                         const std::optional<Handle>& weight, Int samples, Int channels, Int size, Int groups,
                         const Handle& by_x, std::uintptr_t by_weight, std::uintptr_t by_bias, int threads);

// The same of [channels, ...] normalised over groups of channels (with one group and size 1: over rows), summed over the
// samples of every cluster. mean: null where x is not moved. offsets: of the clusters' first samples, and the end.
// by_weight and by_bias: [clusters, channels], or null; add: to what is there.
void cluster_norm_backward(const Handle& grad, const Handle& x, const std::optional<Handle>& mean, const Handle& rstd,
                           const std::optional<Handle>& weight, const std::vector<Int>& offsets, Int channels, Int size,
                           Int groups, const Handle& by_x, const std::optional<Handle>& by_weight, bool add_to_weight,
                           const std::optional<Handle>& by_bias, bool add_to_bias, int threads);

}  // namespace diffmtl::cpu
