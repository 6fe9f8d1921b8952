// The table of kernels, compiled for the instruction set of the including file.
#pragma once
#include "convolution_loops.hpp"
#include "jacobian_loops.hpp"
#include "layer_loops.hpp"
#include "loss_loops.hpp"
#include "noise_loops.hpp"

namespace diffmtl::cpu {
namespace {

// One entry for every element type, in the order of DType; for the last template argument, and for the last two.
#define DIFFMTL_PER_DTYPE(kernel) {kernel<float>, kernel<double>, kernel<BFloat16>, kernel<Float16>}
#define DIFFMTL_PER_LAST(kernel, ...) \
  {kernel<__VA_ARGS__, float>, kernel<__VA_ARGS__, double>, kernel<__VA_ARGS__, BFloat16>, kernel<__VA_ARGS__, Float16>}
#define DIFFMTL_PER_LAST_TWO(kernel, ...)                                                    \
  {DIFFMTL_PER_LAST(kernel, __VA_ARGS__, float), DIFFMTL_PER_LAST(kernel, __VA_ARGS__, double), \
   DIFFMTL_PER_LAST(kernel, __VA_ARGS__, BFloat16), DIFFMTL_PER_LAST(kernel, __VA_ARGS__, Float16)}
#define DIFFMTL_PER_PAIR(kernel)                                                                   \
  {DIFFMTL_PER_LAST(kernel, float), DIFFMTL_PER_LAST(kernel, double), DIFFMTL_PER_LAST(kernel, BFloat16), \
   DIFFMTL_PER_LAST(kernel, Float16)}
#define DIFFMTL_PER_LOSS(kernel) {DIFFMTL_PER_LAST_TWO(kernel, Squared), DIFFMTL_PER_LAST_TWO(kernel, Huber)}

// What add_noise and denoising_loss ask for, or null.
template <class A, class B, class Out>
constexpr auto find_mix() {
  MixKernel kernel = nullptr;
  if constexpr (std::is_same_v<Out, A> || (std::is_same_v<Out, ComputeOf<A, Out>> &&
                                           (std::is_same_v<B, A> || std::is_same_v<B, float>)))
    kernel = mix<A, B, Out>;
  return kernel;
}
template <class A, class B, class Out>
constexpr auto kMix = find_mix<A, B, Out>();

constexpr Kernels make_kernels(const char* name) {
  return {name,
          {DIFFMTL_PER_LAST(gram, float), DIFFMTL_PER_LAST(gram, double)},
          {kPanelRows<float>, kPanelRows<double>},
          {kLeftRows<float>, kLeftRows<double>},
          {DIFFMTL_PER_LAST(pack_panel, float), DIFFMTL_PER_LAST(pack_panel, double)},
          {multiply_panels<float>, multiply_panels<double>},
          DIFFMTL_PER_PAIR(combine),
          DIFFMTL_PER_LOSS(loss_sum),
          DIFFMTL_PER_LOSS(loss_slope),
          {DIFFMTL_PER_LAST_TWO(kMix, float), DIFFMTL_PER_LAST_TWO(kMix, double), DIFFMTL_PER_LAST_TWO(kMix, BFloat16),
           DIFFMTL_PER_LAST_TWO(kMix, Float16)},
          DIFFMTL_PER_PAIR(wgrad),
          DIFFMTL_PER_PAIR(sum_rows),
          DIFFMTL_PER_DTYPE(group_norm),
          DIFFMTL_PER_DTYPE(norm_rows),
          DIFFMTL_PER_DTYPE(conv_strip),
          {conv_products<float>, conv_products<double>},
          {conv_weights<float>, conv_weights<double>},
          normals,
          box_muller_of_words};
}

}  // namespace
}  // namespace diffmtl::cpu
