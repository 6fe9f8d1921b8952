// The loops of the CPU ops, compiled for the instruction set of the including file.
#pragma once
#include "cpu_cluster_loops.hpp"
#include "cpu_conv_loops.hpp"
#include "cpu_loss_loops.hpp"
#include "cpu_noise.hpp"
#include "cpu_norm_loops.hpp"
#include "cpu_panel_loops.hpp"
#include "cpu_vector.hpp"

namespace diffmtl::cpu {
namespace {

// Rows per tile of a Gramian: R x R products are accumulated in registers, next to R + 1 rows.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 5;
#else
constexpr int kTile = 3;
#endif

// Elements ahead of the present one that are fetched: the processor by itself does not look beyond a page.
constexpr Int kAhead = 512;

// sums[i][j] += <a_i, b_j> for i < R, j < S; on the diagonal, where a is b, for i <= j only. n: whole registers.
template <class Compute, int R, int S, bool kDiagonal, class T>
inline void multiply_tile(const T* const* a, const T* const* b, Int n, double* sums, int stride) {
  Vector<Compute> acc[R][S] = {};
  for (Int c = 0; c < n; c += kLanes<Compute>) {
    Vector<Compute> x[R];
    for (int i = 0; i < R; ++i) {
      if (kDiagonal) __builtin_prefetch(a[i] + c + kAhead);  // the first time that this row is read
      x[i] = load<Compute>(a[i] + c);
    }
    for (int j = 0; j < S; ++j) {
      const Vector<Compute> y = kDiagonal ? x[j] : load<Compute>(b[j] + c);
      for (int i = 0; i < (kDiagonal ? j + 1 : R); ++i) acc[i][j] += x[i] * y;
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = kDiagonal ? i : 0; j < S; ++j) sums[i * stride + j] += sum_lanes<Compute>(acc[i][j]);
}

// The tile of a full group of rows with a group of `size`, or of that group with itself.
template <class Compute, int S, bool kDiagonal, class T>
inline void multiply_group(int size, const T* const* a, const T* const* b, Int n, double* sums, int stride) {
  if (size == S) {
    multiply_tile<Compute, kDiagonal ? S : kTile, S, kDiagonal>(a, b, n, sums, stride);
  } else if constexpr (S > 1) {
    multiply_group<Compute, S - 1, kDiagonal>(size, a, b, n, sums, stride);
  }
}

template <class Compute, class T>
inline void multiply(const T* const* rows, int count, Int n, double* sums) {
  for (int i = 0; i < count; i += kTile) {
    double* tile = sums + i * count + i;
    multiply_group<Compute, kTile, true>(static_cast<int>(smaller(kTile, count - i)), rows + i, rows + i, n, tile, count);
    for (int j = i + kTile; j < count; j += kTile)
      multiply_group<Compute, kTile, false>(static_cast<int>(smaller(kTile, count - j)), rows + i, rows + j, n,
                                            tile + (j - i), count);
  }
}

template <class Least, class T>
void gram(const Rows& rows, double* sums, void* scratch) {
  using Compute = ComputeOf<Least, T>;
  const T* data = static_cast<const T*>(rows.data);
  Compute* converted = static_cast<Compute*>(scratch);
  // From here on a block stays in the cache while all its products are formed.
  for (Int begin = 0; begin < rows.columns; begin += kBlock) {
    const Int n = smaller(kBlock, rows.columns - begin);
    const Int padded = (n + kLanes<Compute> - 1) / kLanes<Compute> * kLanes<Compute>;
    if constexpr (std::is_same_v<T, Compute> || std::is_same_v<T, float>) {  // floats become doubles on their way
      if (n == padded) {
        const T* block[kMaxRows];
        for (int i = 0; i < rows.count; ++i) block[i] = data + i * rows.stride + begin;
        multiply<Compute>(block, rows.count, n, sums);
        continue;
      }
    }
    const Compute* block[kMaxRows];
    for (int i = 0; i < rows.count; ++i) {
      convert(data + i * rows.stride + begin, n, converted + i * kBlock);
      block[i] = converted + i * kBlock;
    }
    multiply<Compute>(block, rows.count, padded, sums);
  }
}

// Rows that are read side by side: more streams than this, and the processor no longer fetches them ahead.
constexpr int kStreams = 8;

// out = (start ? start : 0) + weights * rows over kUnroll registers of columns; returns the squares of what is written.
template <int kUnroll, bool kStreamed, class Compute, class T, class Start, class Out>
DIFFMTL_INLINE_LOOP Vector<Compute> add_registers(const T* data, Int stride, int count, const Compute* weights,
                                                  const Start* start, Out* out) {
  constexpr Int kLane = kLanes<Compute>;
  Vector<Compute> acc[kUnroll], squares = {};
  for (int u = 0; u < kUnroll; ++u) acc[u] = start ? load<Compute>(start + u * kLane) : Vector<Compute>{};
  for (int i = 0; i < count; ++i)
    for (int u = 0; u < kUnroll; ++u) acc[u] += weights[i] * load<Compute>(data + i * stride + u * kLane);
  for (int u = 0; u < kUnroll; ++u) {
    const auto packed = pack<Out, Compute>(acc[u]);
    if constexpr (kStreamed) {
      stream(out + u * kLane, packed);
    } else {
      put(out + u * kLane, packed);
    }
    const Vector<Compute> written = unpack<Compute, Out>(packed);
    squares += written * written;
  }
  return squares;
}

// The same over n columns, n <= kBlock. Returns |out|^2.
template <bool kStreamed, class Compute, class T, class Start, class Out>
inline double add_rows(const T* data, Int stride, int count, const Compute* weights, const Start* start, Int n, Out* out) {
  constexpr int kUnroll = 4;
  constexpr Int kLane = kLanes<Compute>;
  Vector<Compute> squares = {};
  Int c = 0;
  for (; c + kUnroll * kLane <= n; c += kUnroll * kLane)
    squares += add_registers<kUnroll, kStreamed>(data + c, stride, count, weights, start ? start + c : nullptr, out + c);
  for (; c < n; c += kLane) {
    const Int rest = smaller(kLane, n - c);
    Vector<Compute> acc = start ? load_first<Compute>(start + c, rest) : Vector<Compute>{};
    for (int i = 0; i < count; ++i) acc += weights[i] * load_first<Compute>(data + i * stride + c, rest);
    store_first<Compute>(out + c, acc, rest);
    const Vector<Compute> written = load_first<Compute>(out + c, rest);  // in the other lanes is 0 times a weight
    squares += written * written;
  }
  return sum_lanes<Compute>(squares);
}

// A block of columns: where there are many rows, some of them at a time, to and from `total`.
template <bool kStreamed, class Compute, class T, class Out>
inline double combine_block(const T* data, Int stride, int count, const Compute* weights, bool add, Int n, Compute* total,
                            Out* out) {
  const Out* start = add ? out : nullptr;
  if (count <= kStreams) return add_rows<kStreamed>(data, stride, count, weights, start, n, out);
  add_rows<false>(data, stride, kStreams, weights, start, n, total);
  int i = kStreams;
  for (; i + kStreams < count; i += kStreams)
    add_rows<false>(data + i * stride, stride, kStreams, weights + i, total, n, total);
  return add_rows<kStreamed>(data + i * stride, stride, count - i, weights + i, total, n, out);
}

template <class T, class Out>
double combine(const Rows& rows, const double* weights, Write write, void* out_data) {
  using Compute = ComputeOf<T, Out>;
  const T* data = static_cast<const T*>(rows.data);
  Out* out = static_cast<Out*>(out_data);
  Compute w[kMaxRows], total[kBlock];
  for (int i = 0; i < rows.count; ++i) w[i] = static_cast<Compute>(weights[i]);
  // Streaming begins where the registers that it writes are aligned.
  const Int misplaced = static_cast<Int>(-reinterpret_cast<std::uintptr_t>(out) % kVectorBytes);
  const Int head = write == kStream ? smaller(misplaced / static_cast<Int>(sizeof(Out)), rows.columns) : 0;
  const bool streamed = write == kStream && reinterpret_cast<std::uintptr_t>(out + head) % kVectorBytes == 0;
  double square = combine_block<false>(data, rows.stride, rows.count, w, false, head, total, out);
  for (Int begin = head; begin < rows.columns; begin += kBlock) {
    const auto block = streamed ? combine_block<true, Compute, T, Out> : combine_block<false, Compute, T, Out>;
    square += block(data + begin, rows.stride, rows.count, w, write == kAdd, smaller(kBlock, rows.columns - begin), total,
                    out + begin);
  }
  if (streamed) end_stream();
  return square;
}

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
          {DIFFMTL_PER_LAST_TWO(mix, float), DIFFMTL_PER_LAST_TWO(mix, double), DIFFMTL_PER_LAST_TWO(mix, BFloat16),
           DIFFMTL_PER_LAST_TWO(mix, Float16)},
          DIFFMTL_PER_PAIR(wgrad),
          DIFFMTL_PER_PAIR(sum_rows),
          DIFFMTL_PER_DTYPE(group_norm),
          DIFFMTL_PER_DTYPE(conv_plane),
          {conv_tile<float>, conv_tile<double>},
          normals,
          box_muller_of_words};
}

}  // namespace
}  // namespace diffmtl::cpu
