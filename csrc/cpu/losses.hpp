// The losses of samples and of their clusters, on memory that Python has checked.
//
// pred and target: [samples, size]; cluster: int64 [samples]; weight: [samples]. A target is one tensor, or mixed from
// two by the shares of every sample; noise may be a seed (kSeed). Sums are written in float32, or float64 where an input
// is float64.
#pragma once
#include <optional>
#include <vector>

#include "tensors.hpp"

namespace diffmtl::cpu {

// delta: of the Huber loss; none: the squared error. out: [samples].
void sample_loss(const Handle& pred, const Handle& first, const std::optional<Handle>& second,
                 const std::optional<Handle>& first_share, const std::optional<Handle>& second_share,
                 const std::optional<double>& delta, Int samples, Int size, const std::optional<Handle>& weight,
                 std::uintptr_t out, int threads);

// grads: where the gradient by the prediction goes, and optionally that by a target that is not mixed, its negative.
void sample_loss_backward(const Handle& scale, const Handle& pred, const Handle& first, const std::optional<Handle>& second,
                          const std::optional<Handle>& first_share, const std::optional<Handle>& second_share,
                          const std::optional<double>& delta, Int samples, Int size,
                          const std::vector<std::uintptr_t>& grads, int threads);

// out: [k]; counts: int64 [k], the samples of every cluster.
void cluster_mse(const Handle& pred, const Handle& target, Int samples, Int size, std::uintptr_t cluster,
                 Int cluster_stride, Int k, const std::optional<Handle>& weight, std::uintptr_t out, std::uintptr_t counts,
                 int threads);

// values: [batch]; out: [k].
void cluster_mean(const Handle& values, Int batch, std::uintptr_t cluster, Int cluster_stride, Int k, std::uintptr_t out);

// grad: [k]; out: [batch] in its type.
void cluster_mean_backward(const Handle& grad, Int k, std::uintptr_t cluster, Int cluster_stride, Int batch,
                           std::uintptr_t out);

// The scalar, its slope by the squared error of every sample, and its gradient by every log-variance, [k].
void uncertainty_loss(const Handle& pred, const Handle& target, Int samples, Int size, std::uintptr_t cluster,
                      Int cluster_stride, const Handle& log_var, Int k, const std::optional<Handle>& weight,
                      std::uintptr_t out, std::uintptr_t slope, std::uintptr_t log_var_grad, int threads);

}  // namespace diffmtl::cpu
