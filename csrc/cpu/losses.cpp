// The losses of samples and of their clusters: two-stage sums over blocks, and what is left to do for every sample.
//
// What the blocks return is added in their order: the number of threads changes no bit of a result.
#include "losses.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "memory.hpp"
#include "samples.hpp"

namespace diffmtl::cpu {
namespace {

void write_numbers(const std::vector<double>& numbers, DType dtype, std::uintptr_t out) {
  for (std::size_t i = 0; i < numbers.size(); ++i) write_number(out, dtype, static_cast<Int>(i), numbers[i]);
}

// ---- Losses --------------------------------------------------------------------------------------------------------

// What a prediction is compared with: elements as they are, or mixed from two by the shares of their sample.
class Target {
 public:
  Target(const Handle& first, const std::optional<Handle>& second, const std::optional<Handle>& first_share,
         const std::optional<Handle>& second_share, DType pred)
      : first_(first), dtype_(first_.dtype()) {
    if (!second) return;
    const Elements other(*second);
    dtype_ = accumulation_dtype(pred, dtype_);
    const auto kernel = kernels().mix[first_.dtype()][other.dtype()][dtype_];
    if (!kernel) refuse_dtypes("target", "tensors of one dtype or a seed to mix", first_.dtype(), other.dtype());
    mix_.emplace(Mix{kernel, other, Numbers(first_share.value()), Numbers(second_share.value())});
  }

  DType dtype() const { return dtype_; }
  Int bytes() const { return first_.bytes() + (mix_ ? mix_->second.bytes() : 0); }

  const void* at(Int sample, Int begin, Int n, Scratch& scratch) const {
    const void* first = first_.at(sample, begin, n, scratch.first);
    if (!mix_) return first;
    const void* second = mix_->second.at(sample, begin, n, scratch.second);
    mix_->kernel(first, mix_->first_share[sample], second, mix_->second_share[sample], scratch.mixed, n);
    return scratch.mixed;
  }

 private:
  struct Mix {
    MixKernel kernel;
    Elements second;
    Numbers first_share, second_share;
  };

  Elements first_;
  std::optional<Mix> mix_;
  DType dtype_;
};

// Prediction and target of a batch, and the loss between them: squared error, or Huber's where there is a delta.
struct Error {
  Error(const Handle& pred_handle, const Handle& first, const std::optional<Handle>& second = {},
        const std::optional<Handle>& first_share = {}, const std::optional<Handle>& second_share = {},
        const std::optional<double>& huber_delta = {})
      : pred(pred_handle),
        target(first, second, first_share, second_share, pred.dtype),
        loss(huber_delta ? kHuberLoss : kSquaredLoss),
        delta(huber_delta.value_or(0)) {}

  DType dtype() const { return accumulation_dtype(pred.dtype, target.dtype()); }
  Int bytes() const { return bytes_of(pred.dtype) + target.bytes(); }

  Numbers pred;
  Target target;
  Loss loss;
  double delta;
};

// The weighted mean loss of every sample.
std::vector<double> sample_losses(const Error& error, const Batch& batch, const std::optional<Handle>& weight, int threads) {
  const auto loss_sum = kernels().loss_sum[error.loss][error.pred.dtype][error.target.dtype()];
  const Int per_sample = ceil_div(batch.size, kBlock);
  std::vector<double> partial(batch.samples * per_sample), losses(batch.samples);
  for_blocks(batch, error.bytes(), threads, [&](Int block, Int sample, Int begin, Int n) {
    Scratch scratch;
    partial[block] = loss_sum(element(error.pred, sample, begin), error.target.at(sample, begin, n, scratch), error.delta, n);
  });
  for (Int sample = 0; sample < batch.samples; ++sample) {
    double sum = 0;
    for (Int block = 0; block < per_sample; ++block) sum += partial[sample * per_sample + block];
    losses[sample] = sum / static_cast<double>(batch.size) * (weight ? Numbers(*weight)[sample] : 1.0);
  }
  return losses;
}

}  // namespace

void sample_loss(const Handle& pred, const Handle& first, const std::optional<Handle>& second,
                 const std::optional<Handle>& first_share, const std::optional<Handle>& second_share,
                 const std::optional<double>& delta, Int samples, Int size, const std::optional<Handle>& weight,
                 std::uintptr_t out, int threads) {
  const Error error(pred, first, second, first_share, second_share, delta);
  write_numbers(sample_losses(error, {samples, size}, weight, threads), error.dtype(), out);
}

void sample_loss_backward(const Handle& scale, const Handle& pred, const Handle& first, const std::optional<Handle>& second,
                          const std::optional<Handle>& first_share, const std::optional<Handle>& second_share,
                          const std::optional<double>& delta, Int samples, Int size,
                          const std::vector<std::uintptr_t>& grads, int threads) {
  const Error error(pred, first, second, first_share, second_share, delta);
  const DType pred_dtype = error.pred.dtype, target_dtype = error.target.dtype();
  const auto loss_slope = kernels().loss_slope[error.loss][pred_dtype][target_dtype];
  const Numbers scales(scale);
  // A quotient of floats formed in float64 rounds to what a division in float32 gives.
  const double slope = delta ? 1 : 2, divisor = static_cast<double>(size);
  const bool both = grads.size() > 1;
  void* const by_pred = reinterpret_cast<void*>(grads[0]);
  void* const by_target = both ? reinterpret_cast<void*>(grads[1]) : nullptr;
  const Int bytes = error.bytes() + bytes_of(pred_dtype) + (both ? bytes_of(target_dtype) : 0);
  prefer_huge_pages(by_pred, samples * size * bytes_of(pred_dtype));
  if (both) prefer_huge_pages(by_target, samples * size * bytes_of(target_dtype));
  for_blocks({samples, size}, bytes, threads, [&](Int, Int sample, Int begin, Int n) {
    Scratch scratch;
    const Int at = sample * size + begin;
    loss_slope(element(error.pred, sample, begin), error.target.at(sample, begin, n, scratch), error.delta,
               slope * (scales[sample] / divisor), advance(by_pred, pred_dtype, at),
               both ? advance(by_target, target_dtype, at) : nullptr, n);
  });
}

// ---- Cluster means -------------------------------------------------------------------------------------------------

namespace {

// The cluster of every sample. Indices are checked here, where reading them costs nothing.
struct Clusters {
  Clusters(std::uintptr_t address, Int entry_stride, Int batch_size, Int count)
      : data(reinterpret_cast<const Int*>(address)), stride(entry_stride), batch(batch_size), sizes(count) {
    for (Int sample = 0; sample < batch; ++sample) {
      const Int k = (*this)[sample];
      if (k < 0 || k >= count)
        throw std::invalid_argument("cluster: expected indices in 0.." + std::to_string(count - 1) + ", found " + std::to_string(k));
      ++sizes[k];
    }
  }

  Int operator[](Int sample) const { return data[sample * stride]; }

  const Int* data;
  Int stride, batch;
  std::vector<Int> sizes;
};

// An absent cluster gets 0. Samples are added in order, each to its own cluster's sum: a NaN stays there.
template <class Values>
std::vector<double> cluster_means(const Values& values, const Clusters& clusters) {
  std::vector<double> means(clusters.sizes.size());
  for (Int sample = 0; sample < clusters.batch; ++sample) means[clusters[sample]] += values[sample];
  for (std::size_t k = 0; k < means.size(); ++k) means[k] /= static_cast<double>(std::max<Int>(1, clusters.sizes[k]));
  return means;
}

}  // namespace

void cluster_mse(const Handle& pred, const Handle& target, Int samples, Int size, std::uintptr_t cluster,
                 Int cluster_stride, Int k, const std::optional<Handle>& weight, std::uintptr_t out, std::uintptr_t counts, int threads) {
  const Error error(pred, target);
  const Clusters clusters(cluster, cluster_stride, samples, k);
  write_numbers(cluster_means(sample_losses(error, {samples, size}, weight, threads), clusters), error.dtype(), out);
  std::copy(clusters.sizes.begin(), clusters.sizes.end(), reinterpret_cast<Int*>(counts));
}

void cluster_mean(const Handle& values, Int batch, std::uintptr_t cluster, Int cluster_stride, Int k, std::uintptr_t out) {
  const Numbers numbers(values);
  const Clusters clusters(cluster, cluster_stride, batch, k);
  write_numbers(cluster_means(numbers, clusters), accumulation_dtype(numbers.dtype, numbers.dtype), out);
}

void cluster_mean_backward(const Handle& grad, Int k, std::uintptr_t cluster, Int cluster_stride, Int batch,
                           std::uintptr_t out) {
  const Numbers grads(grad);
  const Clusters clusters(cluster, cluster_stride, batch, k);
  for (Int sample = 0; sample < batch; ++sample) {
    const Int own = clusters[sample];
    write_number(out, grads.dtype, sample, grads[own] / static_cast<double>(clusters.sizes[own]));
  }
}

// ---- Uncertainty weighting -----------------------------------------------------------------------------------------

void uncertainty_loss(const Handle& pred, const Handle& target, Int samples, Int size, std::uintptr_t cluster,
                      Int cluster_stride, const Handle& log_var, Int k, const std::optional<Handle>& weight,
                      std::uintptr_t out, std::uintptr_t slope, std::uintptr_t log_var_grad, int threads) {
  const Error error(pred, target);
  const Clusters clusters(cluster, cluster_stride, samples, k);
  const std::vector<double> means = cluster_means(sample_losses(error, {samples, size}, weight, threads), clusters);
  const Numbers u(log_var);
  const auto present = static_cast<double>(k - std::count(clusters.sizes.begin(), clusters.sizes.end(), 0));

  std::vector<double> shares(k), gradients(k);
  double loss = 0;
  for (Int i = 0; i < k; ++i) {
    if (clusters.sizes[i] == 0) continue;
    const double share = 0.5 * std::exp(-u[i]) / present;
    loss += share * means[i] + 0.5 * u[i];
    gradients[i] = 0.5 - share * means[i];
    shares[i] = share / static_cast<double>(clusters.sizes[i]);
  }
  write_number(out, error.dtype(), 0, loss);
  write_numbers(gradients, u.dtype, log_var_grad);
  for (Int sample = 0; sample < samples; ++sample)
    write_number(slope, error.dtype(), sample, shares[clusters[sample]] * (weight ? Numbers(*weight)[sample] : 1.0));
}

}  // namespace diffmtl::cpu
