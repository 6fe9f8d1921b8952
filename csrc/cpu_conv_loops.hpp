// The loops of a convolution's weight gradients, compiled for the instruction set of the including file.
//
// The gradient of one weight is the inner product of two planes, the output's gradient and the input shifted by the
// weight's place in the kernel. With the padding's zeros in both, a shift by rows and columns is a shift in memory, and
// the products need no other copy of the input.
#pragma once
#include "cpu_vector.hpp"

namespace diffmtl::cpu {
namespace {

template <class Compute, class T>
DIFFMTL_INLINE_LOOP void gather(const T* from, Int stride, Int n, Compute* to) {
  for (Int i = 0; i < n; ++i) to[i] = static_cast<Compute>(to_number(from[i * stride]));
}

// Elements x of a row with (x + padding) % steps == residue, next to each other.
template <class Compute, class T>
inline void place_row(const ConvPlane& plane, const T* row, Compute* out, Int distance) {
  const Int size = plane.sizes[2], stride = plane.strides[2], step = plane.steps[2], padding = plane.padding[2];
  for (Int residue = 0; residue < step; ++residue, out += distance) {
    const Int first = ((residue - padding) % step + step) % step;
    if (first >= size) continue;
    Compute* to = out + (first + padding) / step;
    const Int n = (size - first + step - 1) / step;
    if (stride * step == 1) {  // a constant that lets it be done in registers
      gather(row + first, 1, n, to);
    } else {
      gather(row + first * stride, stride * step, n, to);
    }
  }
}

template <class T>
void conv_plane(const ConvPlane& plane) {
  using Compute = ComputeOf<T>;
  Compute* out = static_cast<Compute*>(plane.out);
  std::memset(out, 0, static_cast<std::size_t>(plane.length) * sizeof(Compute));
  const Int *spans = plane.spans, *steps = plane.steps;
  const Int distance = spans[0] * spans[1] * spans[2];  // from one residue to the next
  for (Int z = 0; z < plane.sizes[0]; ++z)
    for (Int y = 0; y < plane.sizes[1]; ++y) {
      const Int at_z = z + plane.padding[0], at_y = y + plane.padding[1];
      const Int residue = (at_z % steps[0] * steps[1] + at_y % steps[1]) * steps[2];
      place_row(plane, static_cast<const T*>(plane.data) + z * plane.strides[0] + y * plane.strides[1],
                out + residue * distance + (at_z / steps[0] * spans[1] + at_y / steps[1]) * spans[2], distance);
    }
}

// Products of this many planes of the gradient with this many of the input are added up in registers.
constexpr int kConvOutputs = 3;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kConvInputs = 9;
#else
constexpr int kConvInputs = 3;
#endif

template <class Compute>
inline void multiply_planes(const Compute* const* grad, Int grad_sample, const Compute* const* x, Int x_sample, Int samples,
                            Int length, double* sums) {
  Vector<Compute> acc[kConvOutputs][kConvInputs] = {};
  for (Int n = 0; n < samples; ++n) {
    const Compute *a[kConvOutputs], *b[kConvInputs];
    for (int o = 0; o < kConvOutputs; ++o) a[o] = grad[o] + n * grad_sample;
    for (int i = 0; i < kConvInputs; ++i) b[i] = x[i] + n * x_sample;
    for (Int c = 0; c < length; c += kLanes<Compute>) {
      Vector<Compute> slopes[kConvOutputs];
      for (int o = 0; o < kConvOutputs; ++o) slopes[o] = load<Compute>(a[o] + c);
      for (int i = 0; i < kConvInputs; ++i) {
        // Read once: most of these cross a cache line.
        const Vector<Compute> values = opaque(load<Compute>(b[i] + c));
        for (int o = 0; o < kConvOutputs; ++o) acc[o][i] += slopes[o] * values;
      }
    }
  }
  for (int o = 0; o < kConvOutputs; ++o)
    for (int i = 0; i < kConvInputs; ++i) *sums++ = sum_lanes<Compute>(acc[o][i]);
}

template <class Compute>
void conv_tile(const ConvTile& tile) {
  const Compute *grad = static_cast<const Compute*>(tile.grad), *x = static_cast<const Compute*>(tile.x);
  for (Int begin = 0; begin < tile.inputs; begin += kConvInputs) {
    // What sticks out at the end repeats the last one.
    const Compute* inputs[kConvInputs];
    for (int i = 0; i < kConvInputs; ++i) inputs[i] = x + tile.shifts[smaller(begin + i, tile.inputs - 1)];
    for (Int first = 0; first < tile.outputs; first += kConvOutputs) {
      const Compute* outputs[kConvOutputs];
      for (int o = 0; o < kConvOutputs; ++o) outputs[o] = grad + smaller(first + o, tile.outputs - 1) * tile.length;
      double sums[kConvOutputs * kConvInputs];
      multiply_planes(outputs, tile.grad_sample, inputs, tile.x_sample, tile.samples, tile.length, sums);
      for (Int o = first; o < smaller(first + kConvOutputs, tile.outputs); ++o) {
        Compute* out = static_cast<Compute*>(tile.out) + o * tile.out_stride + begin;
        const double* own = sums + (o - first) * kConvInputs;
        for (Int i = 0; i < smaller(kConvInputs, tile.inputs - begin); ++i)
          out[i] = static_cast<Compute>(tile.add ? static_cast<double>(out[i]) + own[i] : own[i]);
      }
    }
  }
}

}  // namespace
}  // namespace diffmtl::cpu
