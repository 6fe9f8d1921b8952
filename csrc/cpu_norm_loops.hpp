// The loops of a normalisation's backward, compiled for the instruction set of the including file.
#pragma once
#include "cpu_vector.hpp"

namespace diffmtl::cpu {
namespace {

// The sums over n elements of the gradient, and of it times what x is above the mean.
template <class Compute, class T>
inline void moments(const T* grad, const T* x, Compute mean, Int n, double& sum, double& product) {
  constexpr int kUnroll = 4, kWidth = kLanes<Compute>;
  sum = product = 0;
  for (Int begin = 0; begin < n; begin += kBlock, grad += kBlock, x += kBlock) {
    const Int size = smaller(kBlock, n - begin);
    Vector<Compute> sums[kUnroll] = {}, products[kUnroll] = {};
    Int i = 0;
    for (; i + kUnroll * kWidth <= size; i += kUnroll * kWidth)
      for (int u = 0; u < kUnroll; ++u) {
        const Vector<Compute> slope = load<Compute>(grad + i + u * kWidth);
        sums[u] += slope;
        products[u] += slope * (load<Compute>(x + i + u * kWidth) - mean);
      }
    for (; i < size; i += kWidth) {
      const Vector<Compute> slope = load_first<Compute>(grad + i, size - i);  // zero behind the end
      sums[0] += slope;
      products[0] += slope * (load_first<Compute>(x + i, size - i) - mean);
    }
    sum += sum_lanes<Compute>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    product += sum_lanes<Compute>((products[0] + products[1]) + (products[2] + products[3]));
  }
}

// out = by_grad * grad + by_x * x + constant
template <class Compute, class T>
inline void mix_affine(const T* grad, Compute by_grad, const T* x, Compute by_x, Compute constant, T* out, Int n) {
  Int i = 0;
  for (; i + kLanes<Compute> <= n; i += kLanes<Compute>)
    store<Compute>(out + i, by_grad * load<Compute>(grad + i) + (by_x * load<Compute>(x + i) + constant));
  if (i < n)
    store_first<Compute>(out + i, by_grad * load_first<Compute>(grad + i, n - i) + (by_x * load_first<Compute>(x + i, n - i) + constant),
                         n - i);
}

// With the normal form z = (x - mean) rstd: dx = rstd (w g - mean(w g) - z mean(w g z)), means over the group. The
// group is read again from a near cache.
template <class T>
void group_norm(const NormGroup& group) {
  using Compute = ComputeOf<T>;
  const T* grad = static_cast<const T*>(group.grad);
  const T* x = static_cast<const T*>(group.x);
  T* out = static_cast<T*>(group.by_x);
  const Int size = group.size;
  double slope = 0, along = 0;
  for (Int c = 0; c < group.channels; ++c) {
    double sum, product;
    moments(grad + c * size, x + c * size, static_cast<Compute>(group.mean), size, sum, product);
    product *= group.rstd;
    group.by_weight[c] = product;
    group.by_bias[c] = sum;
    slope += group.weight[c] * sum;
    along += group.weight[c] * product;
  }
  const double share = group.rstd / static_cast<double>(group.channels * size);
  const double by_x = -along * group.rstd * share, constant = -slope * share - by_x * group.mean;
  for (Int c = 0; c < group.channels; ++c)
    mix_affine(grad + c * size, static_cast<Compute>(group.weight[c] * group.rstd), x + c * size, static_cast<Compute>(by_x),
               static_cast<Compute>(constant), out + c * size, size);
}

}  // namespace
}  // namespace diffmtl::cpu
