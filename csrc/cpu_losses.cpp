// The CPU side of the ops over a batch of samples: division into pieces, two-stage sums, Python boundary.
//
// Where a sample is divided depends on its size alone, and what the pieces return is added in their order: the
// number of threads changes no bit of a result.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "cpu_numbers.hpp"
#include "cpu_threads.hpp"

namespace py = pybind11;

namespace diffmtl {
namespace cpu {
namespace {

// ---- Squared errors ------------------------------------------------------------------------------------------------

// Prediction and target of a batch; the elements of a sample lie next to each other.
struct Pair {
  Pair(const Handle& pred_handle, const Handle& target_handle, Int batch_size, Int sample_size)
      : pred(pred_handle), target(target_handle), batch(batch_size), size(sample_size) {}

  DType dtype() const { return accumulation_dtype(pred.dtype, target.dtype); }
  Int bytes() const { return batch * size * static_cast<Int>(kBytes[pred.dtype] + kBytes[target.dtype]); }
  const void* pred_at(Int sample, Int element) const { return advance(pred.data, pred.dtype, sample * pred.stride + element); }
  const void* target_at(Int sample, Int element) const {
    return advance(target.data, target.dtype, sample * target.stride + element);
  }

  Numbers pred, target;
  Int batch, size;
};

// Elements of a sample that are summed in one go.
constexpr Int kPiece = 1 << 15;

// body(piece, sample, first element, elements) for every piece of every sample: large samples have several, small
// samples share a task.
template <class Body>
void for_pieces(const Pair& pair, int threads, const Body& body) {
  if (pair.batch == 0 || pair.size == 0) return;
  const Int per_sample = ceil_div(pair.size, kPiece), total = pair.batch * per_sample;
  const Int per_task = std::max<Int>(1, kPiece / pair.size);
  parallel_for(ceil_div(total, per_task), useful_threads(threads, pair.bytes()), [&](Int task, int) {
    const Int end = std::min(total, (task + 1) * per_task);
    for (Int piece = task * per_task; piece < end; ++piece) {
      const Int sample = piece / per_sample, begin = piece % per_sample * kPiece;
      body(piece, sample, begin, std::min(kPiece, pair.size - begin));
    }
  });
}

// The weighted mean squared error of every sample.
std::vector<double> sample_losses(const Pair& pair, const std::optional<Handle>& weight, int threads) {
  const auto squared_distance = kernels().squared_distance[pair.pred.dtype][pair.target.dtype];
  const Int per_sample = ceil_div(pair.size, kPiece);
  std::vector<double> partial(pair.batch * per_sample), losses(pair.batch);
  for_pieces(pair, threads, [&](Int piece, Int sample, Int begin, Int n) {
    partial[piece] = squared_distance(pair.pred_at(sample, begin), pair.target_at(sample, begin), n);
  });
  for (Int sample = 0; sample < pair.batch; ++sample) {
    double sum = 0;
    for (Int piece = 0; piece < per_sample; ++piece) sum += partial[sample * per_sample + piece];
    losses[sample] = sum / static_cast<double>(pair.size) * (weight ? Numbers(*weight)[sample] : 1.0);
  }
  return losses;
}

void sample_mse(const Handle& pred, const Handle& target, Int batch, Int size, const std::optional<Handle>& weight,
                std::uintptr_t out, int threads) {
  const Pair pair(pred, target, batch, size);
  const std::vector<double> losses = sample_losses(pair, weight, threads);
  for (Int sample = 0; sample < batch; ++sample) write_number(out, pair.dtype(), sample, losses[sample]);
}

void sample_mse_backward(const Handle& scale, const Handle& pred, const Handle& target, Int batch, Int size,
                         std::uintptr_t out, int threads) {
  const Pair pair(pred, target, batch, size);
  const Numbers scales(scale);
  const auto scaled_difference = kernels().scaled_difference[pair.pred.dtype][pair.target.dtype];
  void* const grad = reinterpret_cast<void*>(out);
  for_pieces(pair, threads, [&](Int, Int sample, Int begin, Int n) {
    scaled_difference(pair.pred_at(sample, begin), pair.target_at(sample, begin),
                      scales[sample] * (2.0 / static_cast<double>(size)),
                      advance(grad, pair.pred.dtype, sample * size + begin), n);
  });
}

// ---- Cluster means -------------------------------------------------------------------------------------------------

// The cluster of every sample. Indices are checked: under compilation nobody did before.
struct Clusters {
  Clusters(std::uintptr_t address, Int entry_stride, Int batch_size, Int count)
      : data(reinterpret_cast<const Int*>(address)), stride(entry_stride), batch(batch_size), sizes(count) {
    for (Int sample = 0; sample < batch; ++sample) {
      const Int k = (*this)[sample];
      if (k < 0 || k >= count)
        throw py::value_error("cluster: expected indices in 0.." + std::to_string(count - 1) + ", found " + std::to_string(k));
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

void write_numbers(const std::vector<double>& numbers, DType dtype, std::uintptr_t out) {
  for (std::size_t i = 0; i < numbers.size(); ++i) write_number(out, dtype, static_cast<Int>(i), numbers[i]);
}

void cluster_mse(const Handle& pred, const Handle& target, Int batch, Int size, std::uintptr_t cluster,
                 Int cluster_stride, Int k, const std::optional<Handle>& weight, std::uintptr_t out, std::uintptr_t counts, int threads) {
  const Pair pair(pred, target, batch, size);
  const Clusters clusters(cluster, cluster_stride, batch, k);
  write_numbers(cluster_means(sample_losses(pair, weight, threads), clusters), pair.dtype(), out);
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

// The scalar, its slope by the squared error of every sample, and its gradient by every log-variance.
void uncertainty_loss(const Handle& pred, const Handle& target, Int batch, Int size, std::uintptr_t cluster,
                      Int cluster_stride, const Handle& log_var, Int k, const std::optional<Handle>& weight,
                      std::uintptr_t out, std::uintptr_t slope, std::uintptr_t log_var_grad, int threads) {
  const Pair pair(pred, target, batch, size);
  const Clusters clusters(cluster, cluster_stride, batch, k);
  const std::vector<double> means = cluster_means(sample_losses(pair, weight, threads), clusters);
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
  write_number(out, pair.dtype(), 0, loss);
  write_numbers(gradients, u.dtype, log_var_grad);
  for (Int sample = 0; sample < batch; ++sample)
    write_number(slope, pair.dtype(), sample, shares[clusters[sample]] * (weight ? Numbers(*weight)[sample] : 1.0));
}

}  // namespace
}  // namespace cpu

void register_cpu_losses(py::module_& module) {
  using namespace cpu;
  const py::call_guard<py::gil_scoped_release> unlocked;
  module.def("cpu_sample_mse", &sample_mse, unlocked);
  module.def("cpu_sample_mse_backward", &sample_mse_backward, unlocked);
  module.def("cpu_cluster_mse", &cluster_mse, unlocked);
  module.def("cpu_cluster_mean", &cluster_mean, unlocked);
  module.def("cpu_cluster_mean_backward", &cluster_mean_backward, unlocked);
  module.def("cpu_uncertainty_loss", &uncertainty_loss, unlocked);
}

}  // namespace diffmtl
