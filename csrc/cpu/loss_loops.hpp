// The loops over a prediction and what it is compared with, compiled for the instruction set of the including file.
#pragma once
#include "vector.hpp"

namespace diffmtl::cpu {
namespace {

// e^2, and half its slope.
template <class Compute>
struct Squared {
  explicit Squared(double) {}
  Vector<Compute> value(Vector<Compute> error) const { return error * error; }
  Vector<Compute> slope(Vector<Compute> error) const { return error; }
};

// e^2 / 2 where |e| <= delta, delta (|e| - delta / 2) beyond. A NaN fails every comparison and must stay one.
template <class Compute>
struct Huber {
  explicit Huber(double threshold) : delta(Vector<Compute>{} + static_cast<Compute>(threshold)) {}

  Vector<Compute> value(Vector<Compute> error) const {
    const Vector<Compute> size = error < 0 ? -error : error;
    return size <= delta ? Compute(0.5) * size * size : delta * (size - Compute(0.5) * delta);
  }
  Vector<Compute> slope(Vector<Compute> error) const {
    return error > delta ? delta : error < -delta ? -delta : error;
  }

  Vector<Compute> delta;
};

template <template <class> class Loss, class A, class B>
DIFFMTL_SHARED double loss_sum(const void* pred_data, const void* target_data, double delta, Int n) {
  using Compute = ComputeOf<A, B>;
  constexpr int kUnroll = 4, kWidth = kLanes<Compute>;
  const A* pred = static_cast<const A*>(pred_data);
  const B* target = static_cast<const B*>(target_data);
  if constexpr (!kDirect<A, B>) {
    Compute a[kBlock], b[kBlock];
    return loss_sum<Loss, Compute, Compute>(converted(pred, n, a), converted(target, n, b), delta, n);
  }
  const Loss<Compute> loss(delta);
  Vector<Compute> sums[kUnroll] = {};
  Int i = 0;
  for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth)
    for (int u = 0; u < kUnroll; ++u)
      sums[u] += loss.value(load<Compute>(pred + i + u * kWidth) - load<Compute>(target + i + u * kWidth));
  // Behind the end both are zero, and so is their loss.
  for (; i < n; i += kWidth) sums[0] += loss.value(load_first<Compute>(pred + i, n - i) - load_first<Compute>(target + i, n - i));
  return sum_lanes<Compute>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <template <class> class Loss, class A, class B>
DIFFMTL_SHARED void loss_slope(const void* pred_data, const void* target_data, double delta, double scale, void* by_pred,
                               void* by_target, Int n) {
  using Compute = ComputeOf<A, B>;
  const A* pred = static_cast<const A*>(pred_data);
  const B* target = static_cast<const B*>(target_data);
  A* out = static_cast<A*>(by_pred);
  B* mirrored = static_cast<B*>(by_target);
  if constexpr (!kDirect<A, B>) {
    Compute a[kBlock], b[kBlock];
    loss_slope<Loss, Compute, Compute>(converted(pred, n, a), converted(target, n, b), delta, scale, a,
                                       mirrored ? b : nullptr, n);
    convert_back(a, n, out);
    if (mirrored) convert_back(b, n, mirrored);
    return;
  }
  const Loss<Compute> loss(delta);
  const Compute factor = static_cast<Compute>(scale);
  Int i = 0;
  for (; i + kLanes<Compute> <= n; i += kLanes<Compute>) {
    const Vector<Compute> slope = loss.slope(load<Compute>(pred + i) - load<Compute>(target + i)) * factor;
    store<Compute>(out + i, slope);
    if (mirrored) store<Compute>(mirrored + i, -slope);
  }
  if (i == n) return;
  const Vector<Compute> slope = loss.slope(load_first<Compute>(pred + i, n - i) - load_first<Compute>(target + i, n - i)) * factor;
  store_first<Compute>(out + i, slope, n - i);
  if (mirrored) store_first<Compute>(mirrored + i, -slope, n - i);
}

template <class A, class B, class Out>
DIFFMTL_SHARED void mix(const void* a_data, double a_share, const void* b_data, double b_share, void* out_data, Int n) {
  using Compute = ComputeOf<A, Out>;
  const A* a = static_cast<const A*>(a_data);
  const B* b = static_cast<const B*>(b_data);
  Out* out = static_cast<Out*>(out_data);
  if constexpr (!(kDirect<A, B> && kDirect<A, Out>)) {
    Compute x[kBlock], y[kBlock];
    mix<Compute, Compute, Compute>(converted(a, n, x), a_share, converted(b, n, y), b_share, x, n);
    convert_back(x, n, out);
    return;
  }
  const Compute share = static_cast<Compute>(a_share), other = static_cast<Compute>(b_share);
  // Rounded as in the definition, with every instruction set.
  const auto mixed = [&](Vector<Compute> x, Vector<Compute> y) { return rounded(share * x) + rounded(other * y); };
  Int i = 0;
  for (; i + kLanes<Compute> <= n; i += kLanes<Compute>)
    store<Compute>(out + i, mixed(load<Compute>(a + i), load<Compute>(b + i)));
  if (i < n) store_first<Compute>(out + i, mixed(load_first<Compute>(a + i, n - i), load_first<Compute>(b + i, n - i)), n - i);
}

}  // namespace
}  // namespace diffmtl::cpu
