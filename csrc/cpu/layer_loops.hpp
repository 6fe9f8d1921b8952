// The loops of the ops over layers, compiled for the instruction set of the including file.
#pragma once
#include "vector.hpp"

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
DIFFMTL_SHARED void pack(const T* rows, Int stride, Int n, Int columns, Compute* strips) {
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
DIFFMTL_SHARED void multiply_strips(const Compute* grad, const Compute* x, Int n, bool add, Out* out, Int out_stride) {
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
DIFFMTL_SHARED void multiply_last_strips(const Compute* grad, const Compute* x, Int n, bool add, Out* out, Int out_stride,
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
DIFFMTL_SHARED void multiply_block(const WgradBlock& block, const Compute* grad, const Compute* x) {
  constexpr Int kOutputs = kTileOutputs, kInputs = kTileInputs<Compute>;
  // Products in float64 seldom go into a shorter type: there, every tile is written as the last ones are.
  constexpr bool kWholeTiles = std::is_same_v<Compute, float> || std::is_same_v<Out, double>;
  for (Int o = 0; o < block.outputs; o += kOutputs)
    for (Int i = 0; i < block.inputs; i += kInputs) {
      Out* out = static_cast<Out*>(block.out) + o * block.out_stride + i;
      const Int outputs = smaller(kOutputs, block.outputs - o), inputs = smaller(kInputs, block.inputs - i);
      if constexpr (kWholeTiles) {
        if (outputs == kOutputs && inputs == kInputs) {
          multiply_strips<kPastCaches>(grad + o * block.rows, x + i * block.rows, block.rows, block.add, out, block.out_stride);
          continue;
        }
      }
      multiply_last_strips(grad + o * block.rows, x + i * block.rows, block.rows, block.add, out, block.out_stride, outputs,
                           inputs);
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
DIFFMTL_SHARED void sum_columns(const T* rows, Int stride, Int count, Int n, Compute* total) {
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

// out = (add ? out : 0) + total
template <class Compute, class Out>
DIFFMTL_SHARED void write_total(const Compute* total, Int n, bool add, Out* out) {
  constexpr Int kLane = kLanes<Compute>;
  Int c = 0;
  for (; c + kLane <= n; c += kLane) {
    Vector<Compute> sum = load<Compute>(total + c);
    if (add) sum += load<Compute>(out + c);
    store<Compute>(out + c, sum);
  }
  for (; c < n; ++c) out[c] = from_number<Out>(add ? total[c] + static_cast<Compute>(to_number(out[c])) : total[c]);
}

template <class T, class Out>
void sum_rows(const void* rows, Int stride, Int count, Int columns, bool add, void* out_data) {
  using Compute = ComputeOf<T, Out>;
  const T* data = static_cast<const T*>(rows);
  Out* out = static_cast<Out*>(out_data);
  Compute total[kBlock];
  for (Int begin = 0; begin < columns; begin += kBlock, out += kBlock) {
    const Int n = smaller(kBlock, columns - begin);
    sum_columns(data + begin, stride, count, n, total);
    write_total(total, n, add, out);
  }
}

// ---- Normalisations ------------------------------------------------------------------------------------------------

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
  if (!group.centred) slope = 0;
  const double share = group.rstd / static_cast<double>(group.channels * size);
  const double by_x = -along * group.rstd * share, constant = -slope * share - by_x * group.mean;
  for (Int c = 0; c < group.channels; ++c)
    mix_affine(grad + c * size, static_cast<Compute>(group.weight[c] * group.rstd), x + c * size, static_cast<Compute>(by_x),
               static_cast<Compute>(constant), out + c * size, size);
}

// Of one row the sums of w g and of w g z; g z and g are added to the sums of the columns.
template <bool kAffine, class Compute, class T>
DIFFMTL_INLINE_LOOP void add_norm_row(const NormRows& norm, Int row, double& slope, double& along) {
  constexpr Int kWidth = kLanes<Compute>;
  const Int columns = norm.columns;
  const T* grad = static_cast<const T*>(norm.grad) + row * columns;
  const T* x = static_cast<const T*>(norm.x) + row * columns;
  const Compute* weight = static_cast<const Compute*>(norm.weight);
  Compute* by_weight = static_cast<Compute*>(norm.by_weight);
  Compute* by_bias = static_cast<Compute*>(norm.by_bias);
  const Compute mean = static_cast<Compute>(norm.mean[row]), rstd = static_cast<Compute>(norm.rstd[row]);
  slope = along = 0;
  for (Int begin = 0; begin < columns; begin += kBlock) {
    const Int end = smaller(columns, begin + kBlock);
    Vector<Compute> slopes{}, alongs{};
    const auto add = [&](Int c, const auto& read) {
      const Vector<Compute> g = read(grad + c), z = (read(x + c) - mean) * rstd, wg = load<Compute>(weight + c) * g;
      slopes += wg;
      alongs += wg * z;
      if constexpr (kAffine) {
        store<Compute>(by_weight + c, load<Compute>(by_weight + c) + g * z);
        store<Compute>(by_bias + c, load<Compute>(by_bias + c) + g);
      }
    };
    Int c = begin;
    for (; c + kWidth <= end; c += kWidth) add(c, [](const T* p) { return load<Compute>(p); });
    if (c < end) add(c, [&](const T* p) { return load_first<Compute>(p, end - c); });  // zeros behind the end
    slope += sum_lanes<Compute>(slopes);
    along += sum_lanes<Compute>(alongs);
  }
}

// dx of one row, as in `group_norm`, whose weight differs from one element to the next.
template <class Compute, class T>
DIFFMTL_INLINE_LOOP void write_norm_row(const NormRows& norm, Int row, double slope, double along) {
  const Int columns = norm.columns;
  const T* grad = static_cast<const T*>(norm.grad) + row * columns;
  const T* x = static_cast<const T*>(norm.x) + row * columns;
  const Compute* weight = static_cast<const Compute*>(norm.weight);
  T* out = static_cast<T*>(norm.by_x) + row * columns;
  const double share = norm.rstd[row] / static_cast<double>(columns);
  const Compute mean = static_cast<Compute>(norm.mean[row]), rstd = static_cast<Compute>(norm.rstd[row]);
  const Compute by_x = static_cast<Compute>(-along * norm.rstd[row] * share);
  const Compute constant = norm.centred ? static_cast<Compute>(-slope * share) : 0;
  const auto at = [&](Int c, const auto& read) {
    return rstd * load<Compute>(weight + c) * read(grad + c) + (by_x * (read(x + c) - mean) + constant);
  };
  Int c = 0;
  for (; c + kLanes<Compute> <= columns; c += kLanes<Compute>)
    store<Compute>(out + c, at(c, [](const T* p) { return load<Compute>(p); }));
  if (c < columns)
    store_first<Compute>(out + c, at(c, [&](const T* p) { return load_first<Compute>(p, columns - c); }), columns - c);
}

template <bool kAffine, class T>
DIFFMTL_SHARED void all_norm_rows(const NormRows& norm) {
  using Compute = ComputeOf<T>;
  for (Int row = 0; row < norm.rows; ++row) {
    double slope, along;
    add_norm_row<kAffine, Compute, T>(norm, row, slope, along);
    write_norm_row<Compute, T>(norm, row, slope, along);
  }
}

// A row is read again from the nearest cache. At most kBlock rows: their sums are in the computing precision.
template <class T>
void norm_rows(const NormRows& norm) {
  if (norm.by_weight == nullptr) return all_norm_rows<false, T>(norm);
  for (Int c = 0; c < norm.columns; ++c)
    static_cast<ComputeOf<T>*>(norm.by_weight)[c] = static_cast<ComputeOf<T>*>(norm.by_bias)[c] = 0;
  all_norm_rows<true, T>(norm);
}

}  // namespace
}  // namespace diffmtl::cpu
