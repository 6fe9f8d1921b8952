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

// ---- Convolutions --------------------------------------------------------------------------------------------------
// The gradient of one weight is the inner product of two planes, the output's gradient and the input shifted by the
// weight's place in the kernel. With the padding's zeros in both, a shift by rows and columns is a shift in memory, and
// the products need no other copy of the input.

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

// Where channels lie next to each other, the gradient is a product of matrices whose rows are pixels: of one element of
// the kernel, every output's gradient times the input's pixel that this element meets.

// Output pixels [begin, end) of one dimension, at which an element of the kernel meets the input.
struct Span {
  Int begin, end, shift;  // input = output * step + shift
};

inline Span meeting(const ConvPixels& conv, int d, Int element) {
  const Int shift = element * conv.dilation[d] - conv.padding[d], step = conv.steps[d];
  const Int begin = shift < 0 ? (-shift + step - 1) / step : 0;
  const Int end = shift >= conv.x_sizes[d] ? 0 : (conv.x_sizes[d] - 1 - shift) / step + 1;
  return {begin, smaller(end, conv.grad_sizes[d]), shift};
}

// Adds up the products of n pixels in registers.
template <int kVectors, bool kWhole, class Compute, class T>
DIFFMTL_INLINE_LOOP void multiply_pixels(const Compute* grad, const T* x, Int step, Int n, Int inputs,
                                         Vector<Compute> (&sums)[kPixelOutputs][kVectors]) {
  for (Int i = 0; i < n; ++i, grad += kPixelOutputs, x += step) {
    Vector<Compute> values[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const T* from = x + v * kLanes<Compute>;
      values[v] = kWhole ? load<Compute>(from) : load_first<Compute>(from, inputs - v * kLanes<Compute>);
    }
    for (int o = 0; o < kPixelOutputs; ++o)
      for (int v = 0; v < kVectors; ++v) sums[o][v] += grad[o] * values[v];
  }
}

// A row of pixels: sample, and two of the three coordinates.
struct PixelRow {
  Int sample, z, y;

  void advance(const Int* sizes) {
    if (++y < sizes[1]) return;
    y = 0;
    if (++z < sizes[0]) return;
    z = 0;
    ++sample;
  }
};

// Adds the products of some rows of pixels, for one element of the kernel and kVectors registers of inputs.
template <int kVectors, class Compute, class T>
DIFFMTL_SHARED void multiply_rows(const ConvPixels& conv, const Span (&spans)[3], PixelRow row, Int rows, const Compute* grads,
                                  Int first, Compute* out, Int out_stride) {
  constexpr Int kWidth = kVectors * kLanes<Compute>;
  const Int *strides = conv.x_strides, step = conv.steps[2] * strides[3], n = spans[2].end - spans[2].begin;
  const Int inputs = smaller(kWidth, conv.inputs - first);
  const T* const images = static_cast<const T*>(conv.x) + (spans[2].begin * conv.steps[2] + spans[2].shift) * strides[3] + first;
  grads += spans[2].begin * kPixelOutputs;
  Vector<Compute> sums[kPixelOutputs][kVectors] = {};
  for (Int i = 0; i < rows; ++i, row.advance(conv.grad_sizes), grads += conv.grad_sizes[2] * kPixelOutputs) {
    if (row.z < spans[0].begin || row.z >= spans[0].end || row.y < spans[1].begin || row.y >= spans[1].end || n <= 0) continue;
    const Int z = row.z * conv.steps[0] + spans[0].shift, y = row.y * conv.steps[1] + spans[1].shift;
    const T* const x = images + row.sample * strides[0] + z * strides[1] + y * strides[2];
    // Lanes behind the last input are not used, and may hold what lies behind the pixel.
    if (x + (n - 1) * step + kWidth <= static_cast<const T*>(conv.x_end)) {
      multiply_pixels<kVectors, true>(grads, x, step, n, inputs, sums);
    } else {
      multiply_pixels<kVectors, false>(grads, x, step, n, inputs, sums);
    }
  }
  for (int o = 0; o < kPixelOutputs; ++o)
    for (int v = 0; v < kVectors; ++v) {
      Compute* to = out + o * out_stride + v * kLanes<Compute>;
      store<Compute>(to, load<Compute>(to) + sums[o][v]);
    }
}

template <int kVectors, class Compute, class T, class... Args>
inline void multiply_inputs(int vectors, const Args&... args) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return multiply_inputs<kVectors - 1, Compute, T>(vectors, args...);
  }
  multiply_rows<kVectors, Compute, T>(args...);
}

template <class T>
void conv_pixels(const ConvPixels& conv, void* scratch) {
  using Compute = ComputeOf<T>;
  constexpr Int kLane = kLanes<Compute>, kCacheBytes = 1 << 18;  // of the second level, which the inputs' pixels fill
  const Int* const kernel = conv.kernel;
  const Int taps = kernel[0] * kernel[1] * kernel[2], stride = (conv.inputs + kLane - 1) / kLane * kLane;
  Compute* const sums = static_cast<Compute*>(scratch);  // [taps, outputs, inputs]
  Compute* const grads = sums + taps * kPixelOutputs * stride;
  std::memset(sums, 0, sizeof(Compute) * static_cast<std::size_t>(taps * kPixelOutputs * stride));

  const Int width = conv.grad_sizes[2], total = conv.samples * conv.grad_sizes[0] * conv.grad_sizes[1];
  const Int pixels = smaller(kBlock, kCacheBytes / (conv.inputs * static_cast<Int>(sizeof(T)) * conv.steps[1] * conv.steps[2]));
  const Int piece = pixels > width ? pixels / width : 1;
  PixelRow row{0, 0, 0};
  for (Int begin = 0; begin < total; begin += piece) {
    const Int rows = smaller(piece, total - begin);
    const PixelRow first_row = row;
    Compute* to = grads;
    for (Int i = 0; i < rows; ++i, row.advance(conv.grad_sizes)) {
      const T* from = static_cast<const T*>(conv.grad) + row.sample * conv.grad_strides[0] + row.z * conv.grad_strides[1] +
                      row.y * conv.grad_strides[2];
      for (Int x = 0; x < width; ++x, from += conv.grad_strides[3], to += kPixelOutputs)
        for (Int o = 0; o < kPixelOutputs; ++o) to[o] = o < conv.outputs ? static_cast<Compute>(to_number(from[o])) : 0;
    }
    for (Int tap = 0; tap < taps; ++tap) {
      const Span spans[3] = {meeting(conv, 0, tap / (kernel[1] * kernel[2])), meeting(conv, 1, tap / kernel[2] % kernel[1]),
                             meeting(conv, 2, tap % kernel[2])};
      for (Int first = 0; first < stride; first += kTileInputs<Compute>) {
        const int vectors = static_cast<int>(smaller(kTileVectors, (stride - first) / kLane));
        multiply_inputs<kTileVectors, Compute, T>(vectors, conv, spans, first_row, rows, grads, first,
                                                  sums + tap * kPixelOutputs * stride + first, stride);
      }
    }
  }
  Compute* out = static_cast<Compute*>(conv.out);
  for (Int o = 0; o < conv.outputs; ++o)
    for (Int i = 0; i < conv.inputs; ++i)
      for (Int tap = 0; tap < taps; ++tap, ++out) *out = sums[(tap * kPixelOutputs + o) * stride + i] + (conv.add ? *out : 0);
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
  const double share = group.rstd / static_cast<double>(group.channels * size);
  const double by_x = -along * group.rstd * share, constant = -slope * share - by_x * group.mean;
  for (Int c = 0; c < group.channels; ++c)
    mix_affine(grad + c * size, static_cast<Compute>(group.weight[c] * group.rstd), x + c * size, static_cast<Compute>(by_x),
               static_cast<Compute>(constant), out + c * size, size);
}

}  // namespace
}  // namespace diffmtl::cpu
