// The loops of the Gramian of many rows; a part of cpu_loops.hpp.
//
// Of few rows every element is read once and the products are few: memory is the limit. Of many rows the products are:
// here the rows are transposed into panels, of which tiles of products are formed in registers, as in any product of
// matrices. The left and the right factor are the same panels.
#pragma once
#include <utility>  // for index_sequence, which is a type alone

#include "cpu_vector.hpp"

namespace diffmtl::cpu {
namespace {

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

// a and b become a0, b0, a1, b1, .. of the first half of their lanes, and of the second. (GCC knows Clang's builtin from
// version 12 on.)
template <class Compute, std::size_t... kLane>
DIFFMTL_INLINE_LOOP void interleave(Vector<Compute>& a, Vector<Compute>& b, std::index_sequence<kLane...>) {
  constexpr std::size_t kCount = sizeof...(kLane);
#if defined(__clang__)
  const Vector<Compute> low = __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kCount)...);
  const Vector<Compute> high = __builtin_shufflevector(a, b, (kCount / 2 + kLane / 2 + kLane % 2 * kCount)...);
#else
  using Index = std::conditional_t<std::is_same_v<Compute, float>, std::int32_t, std::int64_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  const Vector<Compute> low = __builtin_shuffle(a, b, Indices{(kLane / 2 + kLane % 2 * kCount)...});
  const Vector<Compute> high = __builtin_shuffle(a, b, Indices{(kCount / 2 + kLane / 2 + kLane % 2 * kCount)...});
#endif
  a = low;
  b = high;
}

// Rows become columns: interleaving the first half of them with the second moves one bit of a row's number into the
// lane's, so as many rounds as it has bits move all.
template <class Compute>
DIFFMTL_INLINE_LOOP void transpose(Vector<Compute> (&rows)[kLanes<Compute>]) {
  constexpr int kCount = kLanes<Compute>, kHalf = kCount / 2;
  for (int round = 1; round < kCount; round *= 2) {
    Vector<Compute> next[kCount];
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = rows[i];
      next[2 * i + 1] = rows[i + kHalf];
      interleave<Compute>(next[2 * i], next[2 * i + 1], std::make_index_sequence<kCount>());
    }
    for (int i = 0; i < kCount; ++i) rows[i] = next[i];
  }
}

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
