// The loops of the CPU ops over the rows of clusters; a part of cpu_loops.hpp.
#pragma once
#include "cpu_vector.hpp"

namespace diffmtl::cpu {
namespace {

// ---- Weight gradients ----------------------------------------------------------------------------------------------

// The sums of a tile of outputs x inputs are kept in registers, beside one row of the inputs and one output.
constexpr int kTileOutputs = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
template <class Compute>
constexpr int kTileInputs = kTileVectors * kLanes<Compute>;

// Copies n rows in the computing type as strips of kWidth columns, [strips][n][kWidth], which the tiles read from
// beginning to end. The last strip is filled up with zeros.
template <int kWidth, class Compute, class T>
inline void pack(const T* rows, Int stride, Int n, Int columns, Compute* strips) {
  constexpr Int kPiece = 256 / kWidth * kWidth;
  Compute converted[kPiece + kLanes<Compute>];
  for (Int row = 0; row < n; ++row, rows += stride, strips += kWidth)
    for (Int begin = 0; begin < columns; begin += kPiece) {
      const Int size = smaller(kPiece, columns - begin);
      const Compute* piece = converted;
      if constexpr (std::is_same_v<T, Compute>) {
        piece = rows + begin;
      } else {
        convert(rows + begin, size, converted);
      }
      Int c = 0;
      for (; c + kWidth <= size; c += kWidth) std::memcpy(strips + (begin + c) * n, piece + c, sizeof(Compute) * kWidth);
      if (c == size) continue;
      Compute* last = strips + (begin + c) * n;
      for (int i = 0; i < kWidth; ++i) last[i] = c + i < size ? piece[c + i] : 0;
    }
}

// out = (add ? out : 0) + the products of one strip of outputs with one of inputs, summed over n rows.
template <bool kPastCaches, class Compute, class Out>
inline void multiply_strips(const Compute* grad, const Compute* x, Int n, bool add, Out* out, Int out_stride) {
  Vector<Compute> sums[kTileOutputs][kTileVectors] = {};
  for (Int row = 0; row < n; ++row, grad += kTileOutputs, x += kTileInputs<Compute>) {
    Vector<Compute> inputs[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) inputs[v] = load<Compute>(x + v * kLanes<Compute>);
    for (int o = 0; o < kTileOutputs; ++o)
      for (int v = 0; v < kTileVectors; ++v) sums[o][v] += grad[o] * inputs[v];
  }
  for (int o = 0; o < kTileOutputs; ++o, out += out_stride)
    for (int v = 0; v < kTileVectors; ++v) {
      Out* to = out + v * kLanes<Compute>;
      if (add) sums[o][v] += load<Compute>(to);
      if constexpr (kPastCaches) {
        stream(to, sums[o][v]);
      } else {
        store<Compute>(to, sums[o][v]);
      }
    }
}

// The same at the end of the outputs or inputs, where a tile sticks out.
template <class Compute, class Out>
inline void multiply_last_strips(const Compute* grad, const Compute* x, Int n, bool add, Out* out, Int out_stride,
                                 Int outputs, Int inputs) {
  Compute tile[kTileOutputs * kTileInputs<Compute>];
  multiply_strips<false>(grad, x, n, false, tile, kTileInputs<Compute>);
  for (Int o = 0; o < outputs; ++o)
    for (Int i = 0; i < inputs; ++i) {
      Out& to = out[o * out_stride + i];
      const Compute before = add ? static_cast<Compute>(to_number(to)) : 0;
      to = from_number<Out>(tile[o * kTileInputs<Compute> + i] + before);
    }
}

template <bool kPastCaches, class Compute, class Out>
inline void multiply_block(const WgradBlock& block, const Compute* grad, const Compute* x) {
  constexpr Int kOutputs = kTileOutputs, kInputs = kTileInputs<Compute>;
  for (Int o = 0; o < block.outputs; o += kOutputs)
    for (Int i = 0; i < block.inputs; i += kInputs) {
      Out* out = static_cast<Out*>(block.out) + o * block.out_stride + i;
      const Int outputs = smaller(kOutputs, block.outputs - o), inputs = smaller(kInputs, block.inputs - i);
      if (outputs == kOutputs && inputs == kInputs) {
        multiply_strips<kPastCaches>(grad + o * block.rows, x + i * block.rows, block.rows, block.add, out, block.out_stride);
      } else {
        multiply_last_strips(grad + o * block.rows, x + i * block.rows, block.rows, block.add, out, block.out_stride,
                             outputs, inputs);
      }
    }
}

template <class T, class Out>
void wgrad(const WgradBlock& block, void* scratch) {
  using Compute = ComputeOf<T, Out>;
  Compute* grad = static_cast<Compute*>(scratch);
  constexpr Int kLine = 64 / sizeof(Compute);
  Compute* x = grad + ((block.outputs + kTileOutputs) * block.rows + kLine - 1) / kLine * kLine;
  pack<kTileOutputs>(static_cast<const T*>(block.grad), block.grad_stride, block.rows, block.outputs, grad);
  pack<kTileInputs<Compute>>(static_cast<const T*>(block.x), block.x_stride, block.rows, block.inputs, x);
  if constexpr (std::is_same_v<Out, Compute>) {
    if (block.past_caches) {
      multiply_block<true, Compute, Out>(block, grad, x);
      end_stream();
      return;
    }
  }
  multiply_block<false, Compute, Out>(block, grad, x);
}

// ---- Sums ----------------------------------------------------------------------------------------------------------

// total = (first ? 0 : total) + the sum of `count` rows over n columns.
template <class Compute, class T>
inline void add_up(const T* rows, Int stride, Int count, bool first, Int n, Compute* total) {
  constexpr int kUnroll = 4;
  constexpr Int kLane = kLanes<Compute>, kStep = kUnroll * kLane;
  Int c = 0;
  for (; c + kStep <= n; c += kStep) {
    Vector<Compute> acc[kUnroll];
    for (int u = 0; u < kUnroll; ++u) acc[u] = first ? Vector<Compute>{} : load<Compute>(total + c + u * kLane);
    for (Int i = 0; i < count; ++i)
      for (int u = 0; u < kUnroll; ++u) acc[u] += load<Compute>(rows + i * stride + c + u * kLane);
    for (int u = 0; u < kUnroll; ++u) store<Compute>(total + c + u * kLane, acc[u]);
  }
  for (; c < n; ++c) {
    Compute acc = first ? 0 : total[c];
    for (Int i = 0; i < count; ++i) acc += static_cast<Compute>(to_number(rows[i * stride + c]));
    total[c] = acc;
  }
}

// Sums of at most kBlock columns: in the computing precision within a block of rows, over the blocks in float64.
template <class Compute, class T>
inline void sum_columns(const T* rows, Int stride, Int count, Int n, Compute* total) {
  constexpr Int kRows = 8;  // read side by side
  double sums[kBlock];
  for (Int begin = 0; begin == 0 || begin < count; begin += kBlock) {
    const Int end = smaller(count, begin + kBlock);
    add_up(rows + begin * stride, stride, smaller(kRows, end - begin), true, n, total);
    for (Int row = begin + kRows; row < end; row += kRows)
      add_up(rows + row * stride, stride, smaller(kRows, end - row), false, n, total);
    if (count <= kBlock) return;
    for (Int c = 0; c < n; ++c) sums[c] = (begin == 0 ? 0 : sums[c]) + total[c];
  }
  for (Int c = 0; c < n; ++c) total[c] = static_cast<Compute>(sums[c]);
}

template <class T, class Out>
void sum_rows(const void* rows, Int stride, Int count, Int columns, bool add, void* out_data) {
  using Compute = ComputeOf<T, Out>;
  constexpr Int kLane = kLanes<Compute>;
  const T* data = static_cast<const T*>(rows);
  Out* out = static_cast<Out*>(out_data);
  Compute total[kBlock];
  for (Int begin = 0; begin < columns; begin += kBlock, out += kBlock) {
    const Int n = smaller(kBlock, columns - begin);
    sum_columns(data + begin, stride, count, n, total);
    Int c = 0;
    for (; c + kLane <= n; c += kLane) {
      Vector<Compute> sum = load<Compute>(total + c);
      if (add) sum += load<Compute>(out + c);
      store<Compute>(out + c, sum);
    }
    for (; c < n; ++c) out[c] = from_number<Out>(add ? total[c] + static_cast<Compute>(to_number(out[c])) : total[c]);
  }
}

}  // namespace
}  // namespace diffmtl::cpu
