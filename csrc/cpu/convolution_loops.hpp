// The loops of convolutions' weight gradients, compiled for the instruction set of the including file.
//
// A register holds neighbouring channels of one factor at one position, and an element of the other factor there multiplies
// all of them: sums over positions form where they are, without a sum over lanes.
#pragma once
#include "vector.hpp"

namespace diffmtl::cpu {
namespace {

// ---- Strips of channels --------------------------------------------------------------------------------------------

// n positions of a line.
template <class Compute, class T>
inline void pack_line(const ConvStrip& strip, const T* line, Int n, Compute* out) {
  constexpr Int kLane = kLanes<Compute>;
  const Int step = strip.strides[2], apart = strip.channel_stride;
  for (Int first = 0; first < strip.width; first += kLane) {
    const Int channels = larger(0, smaller(kLane, strip.channels - first));
    const T* from = line + first * apart;
    Compute* to = out + first;
    if (step == 1) {
      for (Int begin = 0; begin < n; begin += kLane) {
        const Int size = smaller(kLane, n - begin);
        Vector<Compute> square[kLane] = {};
        for (Int c = 0; c < channels; ++c) square[c] = load_first<Compute>(from + c * apart + begin, size);
        transpose<Compute>(square);
        for (Int i = 0; i < size; ++i) store<Compute>(to + (begin + i) * strip.width, square[i]);
      }
    } else if (apart == 1 && channels == kLane) {
      for (Int i = 0; i < n; ++i) store<Compute>(to + i * strip.width, load<Compute>(from + i * step));
    } else {
      for (Int i = 0; i < n; ++i)
        for (Int c = 0; c < kLane; ++c)
          to[i * strip.width + c] = c < channels ? static_cast<Compute>(to_number(from[c * apart + i * step])) : 0;
    }
  }
}

template <class T>
void conv_strip(const ConvStrip& strip) {
  using Compute = ComputeOf<T>;
  const Int *extents = strip.extents, *padding = strip.padding, *sizes = strip.sizes, *strides = strip.strides;
  const Int begin = smaller(padding[2], extents[2]), end = smaller(padding[2] + sizes[2], extents[2]);
  const auto clear = [&](Compute* out, Int positions) {
    std::memset(out, 0, static_cast<std::size_t>(positions * strip.width) * sizeof(Compute));
  };
  Compute* out = static_cast<Compute*>(strip.out);
  for (Int z = -padding[0]; z < extents[0] - padding[0]; ++z)
    for (Int y = -padding[1]; y < extents[1] - padding[1]; ++y, out += extents[2] * strip.width) {
      if (z < 0 || z >= sizes[0] || y < 0 || y >= sizes[1]) {
        clear(out, extents[2]);
        continue;
      }
      clear(out, begin);
      pack_line(strip, static_cast<const T*>(strip.data) + z * strides[0] + y * strides[1], end - begin, out + begin * strip.width);
      clear(out + end * strip.width, extents[2] - end);
    }
}

// ---- Products ------------------------------------------------------------------------------------------------------

// The sums of a tile of rows x registers are kept in registers, beside those of one position.
constexpr int kConvRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kConvVectors = 4;
#else
constexpr int kConvVectors = 2;
#endif

// The tile of the rows from `row` on with kVectors registers from `lane` on.
template <int kVectors, class Compute>
DIFFMTL_SHARED void multiply_tile(const ConvProducts& products, Int row, Int tap, Int lane) {
  const Int *strip_steps = products.strip_steps, *row_steps = products.row_steps, *sizes = products.sizes;
  const Compute* rows[kConvRows];
  for (int r = 0; r < kConvRows; ++r)  // what sticks out at the end repeats the last one
    rows[r] = static_cast<const Compute*>(products.elements) + products.rows[smaller(row + r, products.row_count - 1)];
  const Compute* const strips = static_cast<const Compute*>(products.strips) + products.taps[tap] + lane;
  const Int strip_step = strip_steps[3], row_step = row_steps[3];
  Vector<Compute> acc[kConvRows][kVectors] = {};
  for (Int n = 0; n < sizes[0]; ++n)
    for (Int z = 0; z < sizes[1]; ++z)
      for (Int y = 0; y < sizes[2]; ++y) {
        const Compute* strip = strips + n * strip_steps[0] + z * strip_steps[1] + y * strip_steps[2];
        Int at = n * row_steps[0] + z * row_steps[1] + y * row_steps[2];
        for (Int x = 0; x < sizes[3]; ++x, strip += strip_step, at += row_step) {
          Vector<Compute> values[kVectors];
          for (int v = 0; v < kVectors; ++v) values[v] = load<Compute>(strip + v * kLanes<Compute>);
          for (int r = 0; r < kConvRows; ++r)
            for (int v = 0; v < kVectors; ++v) acc[r][v] += rows[r][at] * values[v];
        }
      }
  Compute* sums = static_cast<Compute*>(products.sums) + (row * products.tap_count + tap) * products.width + lane;
  for (int r = 0; r < smaller(kConvRows, products.row_count - row); ++r, sums += products.tap_count * products.width)
    for (int v = 0; v < kVectors; ++v) {
      Compute* to = sums + v * kLanes<Compute>;
      store<Compute>(to, products.add ? load<Compute>(to) + acc[r][v] : acc[r][v]);
    }
}

template <int kVectors, class Compute>
inline void multiply_at_most(const ConvProducts& products, Int row, Int tap, Int lane) {
  if constexpr (kVectors > 1) {
    if (products.width - lane < kVectors * kLanes<Compute>)
      return multiply_at_most<kVectors - 1, Compute>(products, row, tap, lane);
  }
  multiply_tile<kVectors, Compute>(products, row, tap, lane);
}

// Memory that has left the caches is fetched while there is something to compute, a tap's share with every tap.
template <class Compute>
inline void prefetch_results(const ConvProducts& products, Int row, Int tap) {
  if (!products.results) return;
  const Compute* results = static_cast<const Compute*>(products.results) + tap * products.width;
  for (Int r = row; r < smaller(row + kConvRows, products.row_count); ++r)
    for (Int i = 0; i < products.width; i += 64 / sizeof(Compute)) __builtin_prefetch(results + r * products.result_stride + i, 1);
}

template <class Compute>
void conv_products(const ConvProducts& products) {
  for (Int row = 0; row < products.row_count; row += kConvRows)
    for (Int tap = 0; tap < products.tap_count; ++tap) {
      prefetch_results<Compute>(products, row, tap);
      for (Int lane = 0; lane < products.width; lane += kConvVectors * kLanes<Compute>)
        multiply_at_most<kConvVectors, Compute>(products, row, tap, lane);
    }
}

// ---- Results -------------------------------------------------------------------------------------------------------

// [taps][width] as [channels][taps], of a register's channels; `out` has room for a register behind them.
template <class Compute>
inline void arrange(const Compute* sums, Int width, Int taps, Compute* out) {
  constexpr Int kLane = kLanes<Compute>;
  // Whole registers are written, whose last lanes stick out into what is written afterwards.
  for (Int first = (taps - 1) / kLane * kLane; first >= 0; first -= kLane) {
    Vector<Compute> square[kLane] = {};
    for (Int tap = 0; tap < smaller(kLane, taps - first); ++tap) square[tap] = load<Compute>(sums + (first + tap) * width);
    transpose<Compute>(square);
    for (Int c = 0; c < kLane; ++c) store<Compute>(out + c * taps + first, square[c]);
  }
}

template <class Compute>
void conv_weights(const ConvWeights& weights) {
  constexpr Int kLane = kLanes<Compute>, kMostTaps = 128;
  const Int taps = weights.taps;
  Compute arranged[kLane * (kMostTaps + 1)];
  for (Int row = 0; row < weights.rows; ++row) {
    const Compute* sums = static_cast<const Compute*>(weights.sums) + row * taps * weights.width;
    Compute* out = static_cast<Compute*>(weights.out) + row * weights.out_stride;
    for (Int first = 0; first < weights.channels; first += kLane, sums += kLane, out += kLane * taps) {
      const Int count = smaller(kLane, weights.channels - first) * taps;
      if (taps > kMostTaps) {
        for (Int i = 0; i < count; i += taps)
          for (Int tap = 0; tap < taps; ++tap)
            out[i + tap] = (weights.add ? out[i + tap] : 0) + sums[tap * weights.width + i / taps];
        continue;
      }
      if (taps > 1) arrange(sums, weights.width, taps, arranged);
      const Compute* const from = taps > 1 ? arranged : sums;
      for (Int i = 0; i < count; i += kLane) {
        const Int n = smaller(kLane, count - i);
        Vector<Compute> sum = load<Compute>(from + i);
        if (weights.add) sum += load_first<Compute>(out + i, n);
        if (n == kLane) {
          store<Compute>(out + i, sum);
        } else {
          store_first<Compute>(out + i, sum, n);
        }
      }
    }
  }
}

}  // namespace
}  // namespace diffmtl::cpu
