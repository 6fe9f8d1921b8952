// The loops of the ops over a Jacobian, compiled for the instruction set of the including file.
#pragma once
#include "vector.hpp"

namespace diffmtl::cpu {
namespace {

// ---- Few rows ------------------------------------------------------------------------------------------------------
// Every element is read once and the products are few: memory is the limit.

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
DIFFMTL_SHARED void multiply(const T* const* rows, int count, Int n, double* sums) {
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
DIFFMTL_SHARED double add_rows(const T* data, Int stride, int count, const Compute* weights, const Start* start, Int n, Out* out) {
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

// The same of types without a loop: by way of copies in the computing type.
template <class Compute, class T, class Out>
inline double combine_copies(const T* data, Int stride, int count, const Compute* weights, bool add, Int n, Compute* total,
                             Out* out) {
  if (add) convert(out, n, total);
  for (int first = 0; first < count; first += kStreams) {
    const int some = static_cast<int>(smaller(kStreams, count - first));
    const Compute* start = add || first ? total : nullptr;
    const T* rows = data + first * stride;
    if constexpr (std::is_same_v<T, Compute>) {
      add_rows<false>(rows, stride, some, weights + first, start, n, total);
    } else {
      Compute copies[kStreams * kBlock];
      for (int i = 0; i < some; ++i) convert(rows + i * stride, n, copies + i * kBlock);
      add_rows<false>(copies, kBlock, some, weights + first, start, n, total);
    }
  }
  convert_back(total, n, out);
  convert(out, n, total);
  const Compute* written = total;
  double square = 0;
  multiply<Compute>(&written, 1, (n + kLanes<Compute> - 1) / kLanes<Compute> * kLanes<Compute>, &square);
  return square;
}

// Between these a sum of squares in float32 has lost nothing that counts.
constexpr double kLeastSquare = 0x1p-90, kMostSquare = 0x1p126;

// The squares of n numbers, n <= kBlock, in double.
template <class Compute, class Out>
DIFFMTL_SHARED double square_of(const Out* out, Int n, Compute* copies) {
  convert(out, n, copies);
  double square = 0;
  for (Int i = 0; i < n; ++i) square += static_cast<double>(copies[i]) * static_cast<double>(copies[i]);
  return square;
}

template <class T, class Out>
double combine(const Rows& rows, const double* weights, Write write, void* out_data) {
  using Compute = ComputeOf<T, Out>;
  const T* data = static_cast<const T*>(rows.data);
  Out* out = static_cast<Out*>(out_data);
  Compute w[kMaxRows], total[kBlock];
  for (int i = 0; i < rows.count; ++i) w[i] = static_cast<Compute>(weights[i]);
  double square = 0;
  Int begin = 0;
  const auto next = [&](auto block, Int n) {
    const double part = block(data + begin, rows.stride, rows.count, w, write == kAdd, n, total, out + begin);
    // Squares of the computing type may have overflowed or vanished: not in a sum between these.
    square += part > kLeastSquare && part < kMostSquare ? part : square_of(out + begin, n, total);
    begin += n;
  };
  if constexpr (kDirect<T, Out>) {
    if (write == kStream) {
      // Streaming begins where the registers that it writes are aligned.
      const Int misplaced = static_cast<Int>(-reinterpret_cast<std::uintptr_t>(out) % kVectorBytes);
      next(combine_block<false, Compute, T, Out>, smaller(misplaced / static_cast<Int>(sizeof(Out)), rows.columns));
      if (reinterpret_cast<std::uintptr_t>(out + begin) % kVectorBytes == 0) {
        while (begin < rows.columns) next(combine_block<true, Compute, T, Out>, smaller(kBlock, rows.columns - begin));
        end_stream();
      }
    }
    while (begin < rows.columns) next(combine_block<false, Compute, T, Out>, smaller(kBlock, rows.columns - begin));
  } else {
    while (begin < rows.columns) next(combine_copies<Compute, T, Out>, smaller(kBlock, rows.columns - begin));
  }
  return square;
}

// ---- Many rows -----------------------------------------------------------------------------------------------------
// The products are the limit: the rows are transposed into panels, of which tiles of products are formed in registers, as
// in any product of matrices. The left and the right factor are the same panels.

// A tile is as many rows to the left by a panel of rows to the right; its sums stay in registers, beside the right rows.
constexpr int kPanelVectors = 3;
template <class Compute>
constexpr Int kPanelRows = kPanelVectors * kLanes<Compute>;
#if defined(__AVX512F__)
constexpr Int kMostLeftRows = 8;
#else
constexpr Int kMostLeftRows = 4;
#endif
template <class Compute>
constexpr Int kLeftRows = kPanelRows<Compute> % kMostLeftRows == 0 ? kMostLeftRows : 3;

// rows.count rows, at most a panel's, as [columns][panel]; zeros in the place of those that are missing.
template <class Least, class T>
void pack_panel(const Rows& rows, void* out) {
  using Compute = ComputeOf<Least, T>;
  constexpr Int kLane = kLanes<Compute>, kPanel = kPanelRows<Compute>;
  for (Int first = 0; first < kPanel; first += kLane) {
    const T* data = static_cast<const T*>(rows.data) + first * rows.stride;
    const Int count = smaller(kLane, rows.count - first);
    Compute* panel = static_cast<Compute*>(out) + first;
    for (Int c = 0; c < rows.columns; c += kLane, data += kLane) {
      const Int n = smaller(kLane, rows.columns - c);
      Vector<Compute> square[kLane] = {};
      for (Int i = 0; i < count; ++i) square[i] = load_first<Compute>(data + i * rows.stride, n);
      transpose<Compute>(square);
      for (Int i = 0; i < n; ++i, panel += kPanel) store<Compute>(panel, square[i]);
    }
  }
}

// The products of kLeftRows rows with the vectors of a panel from kFirst on.
template <int kFirst, class Compute>
DIFFMTL_INLINE_LOOP void multiply_rows(const Compute* left, const Compute* right, Int n, double* sums) {
  constexpr Int kLane = kLanes<Compute>, kPanel = kPanelRows<Compute>, kLeft = kLeftRows<Compute>;
  // The sums have left the caches since the last columns; they are back by the time they are needed.
  for (Int i = 0; i < kLeft * kPanel; i += 64 / sizeof(double)) __builtin_prefetch(sums + i, 1);
  Vector<Compute> tile[kLeft][kPanelVectors] = {};
  for (Int c = 0; c < n; ++c, left += kPanel, right += kPanel) {
    Vector<Compute> x[kPanelVectors];
    for (int v = kFirst; v < kPanelVectors; ++v) x[v] = load<Compute>(right + v * kLane);
    for (Int i = 0; i < kLeft; ++i)
      for (int v = kFirst; v < kPanelVectors; ++v) tile[i][v] += left[i] * x[v];
  }
  for (Int i = 0; i < kLeft; ++i)
    for (int v = kFirst; v < kPanelVectors; ++v) {
      Compute lanes[kLane];
      store<Compute>(lanes, tile[i][v]);
      for (Int lane = 0; lane < kLane; ++lane) sums[i * kPanel + v * kLane + lane] += lanes[lane];
    }
}

// sums[i][j] += <left row i, right row j> over n columns: kLeftRows rows of a panel from `first` on, and all rows of a
// panel; of a panel with itself for i <= j at least.
template <class Compute>
void multiply_panels(const void* left_data, Int first, const void* right_data, Int n, double* sums) {
  const Compute* left = static_cast<const Compute*>(left_data) + first;
  const Compute* right = static_cast<const Compute*>(right_data);
  sums += first * kPanelRows<Compute>;
  const Int below = left_data == right_data ? first / kLanes<Compute> : 0;  // whole registers below the diagonal
  if (below == 0) multiply_rows<0>(left, right, n, sums);
  if (below == 1) multiply_rows<1>(left, right, n, sums);
  if (below == 2) multiply_rows<2>(left, right, n, sums);
}

}  // namespace
}  // namespace diffmtl::cpu
