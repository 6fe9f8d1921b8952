// The ops over layers: weight gradients and sums of the rows of clusters, convolutions' weight gradients, and the
// backward of normalisations. Divided into blocks of the result.
//
// Every element of a result is summed by one thread in an order of its own: how many threads there are, and where
// they divide the result, changes no bit of it.
#include "layers.hpp"

#include <algorithm>
#include <memory>

#include "memory.hpp"
#include "numbers.hpp"
#include "threads.hpp"

namespace diffmtl::cpu {
namespace {

// Blocks for every thread, so that they finish together.
constexpr Int kBlocksPerThread = 4;

// The least multiple of `unit` that divides `size` into at least `parts`, if that leaves `least` in a part.
Int part_size(Int size, Int parts, Int unit, Int least) {
  return std::max(least, ceil_div(ceil_div(size, std::max<Int>(1, parts)), unit) * unit);
}

// ---- Weight gradients ----------------------------------------------------------------------------------------------

// Results of this size have left the caches before they are read again: they need not displace anything there.
constexpr Int kBytesPastCaches = 1 << 20;

struct Wgrad {
  Numbers grad, x, out;
  Int outputs, inputs;
  bool add, past_caches;

  Int bytes() const { return outputs * inputs * static_cast<Int>(kBytes[out.dtype]); }
};

// Whether every row of every cluster's result begins at a cache line.
bool in_cache_lines(const Numbers& out, Int inputs) {
  constexpr Int kLine = 64;
  const Int size = static_cast<Int>(kBytes[out.dtype]), address = static_cast<Int>(reinterpret_cast<std::uintptr_t>(out.data));
  return address % kLine == 0 && out.stride * size % kLine == 0 && inputs * size % kLine == 0;
}

void add_blocks(const Wgrad& wgrad, const Cluster& cluster, Int parts, std::vector<WgradBlock>& blocks) {
  const auto [index, begin, end] = cluster;
  const Int rows = end - begin;
  // The inputs of a block stay in the second-level cache, and so few outputs are its least that packing them is cheap.
  // Blocks begin at cache lines where the result does.
  const Int inputs = std::clamp<Int>((1 << 16) / std::max<Int>(1, rows), 512, 4096) / 64 * 64;
  const Int outputs = std::min<Int>(192, part_size(wgrad.outputs, ceil_div(parts, ceil_div(wgrad.inputs, inputs)), 48, 48));
  for (Int o = 0; o < wgrad.outputs; o += outputs)
    for (Int i = 0; i < wgrad.inputs; i += inputs)
      blocks.push_back({advance(wgrad.grad.data, wgrad.grad.dtype, begin * wgrad.grad.stride + o), wgrad.grad.stride,
                        advance(wgrad.x.data, wgrad.x.dtype, begin * wgrad.x.stride + i), wgrad.x.stride, rows,
                        std::min(outputs, wgrad.outputs - o), std::min(inputs, wgrad.inputs - i), wgrad.add, wgrad.past_caches,
                        advance(const_cast<void*>(wgrad.out.data), wgrad.out.dtype, index * wgrad.out.stride + o * wgrad.inputs + i),
                        wgrad.inputs});
}

}  // namespace

void cluster_wgrad(const Handle& grad, const Handle& x, const std::vector<Cluster>& clusters, Int outputs, Int inputs,
                   const Handle& out, bool add, int threads) {
  Wgrad wgrad{Numbers(grad), Numbers(x), Numbers(out), outputs, inputs, add, false};
  check_one_dtype("cluster_wgrad", wgrad.grad.dtype, wgrad.x.dtype);
  const Int count = static_cast<Int>(clusters.size());
  wgrad.past_caches = !add && count * wgrad.bytes() >= kBytesPastCaches && in_cache_lines(wgrad.out, inputs);
  Int products = 0, longest = 0;
  for (const auto& [index, begin, end] : clusters) {
    products += (end - begin) * outputs * inputs;
    longest = std::max(longest, end - begin);
  }
  // A product takes about the time of half a byte.
  threads = useful_threads(threads, count * wgrad.bytes() + products / 2);
  std::vector<WgradBlock> blocks;
  for (const Cluster& cluster : clusters) add_blocks(wgrad, cluster, ceil_div(threads * kBlocksPerThread, count), blocks);

  std::size_t scratch_bytes = 0;
  for (const WgradBlock& block : blocks) scratch_bytes = std::max(scratch_bytes, wgrad_scratch(block));
  const std::size_t lines = scratch_bytes / sizeof(Line) + 1;
  const std::unique_ptr<Line[]> scratch(new Line[lines * threads]);
  const auto kernel = kernels().wgrad[wgrad.x.dtype][wgrad.out.dtype];
  parallel_for(static_cast<Int>(blocks.size()), threads,
               [&](Int task, int thread) { kernel(blocks[task], scratch.get() + lines * thread); });
}

// ---- Sums ----------------------------------------------------------------------------------------------------------

void cluster_sum(const Handle& values, const std::vector<Int>& offsets, Int columns, const Handle& out, bool add, int threads) {
  const Numbers rows(values), sums(out);
  const Int count = static_cast<Int>(offsets.size()) - 1;
  threads = useful_threads(threads, offsets.back() * columns * static_cast<Int>(kBytes[rows.dtype]));
  const Int width = threads == 1 ? columns : part_size(columns, ceil_div(threads * kBlocksPerThread, count), 64, 64);
  const Int parts = width == 0 ? 0 : ceil_div(columns, width);
  const auto kernel = kernels().sum_rows[rows.dtype][sums.dtype];
  parallel_for(count * parts, threads, [&](Int task, int) {
    const Int cluster = task / parts, column = task % parts * width, begin = offsets[cluster];
    kernel(advance(rows.data, rows.dtype, begin * rows.stride + column), rows.stride, offsets[cluster + 1] - begin,
           std::min(width, columns - column), add,
           advance(const_cast<void*>(sums.data), sums.dtype, cluster * sums.stride + column));
  });
}

namespace {

// ---- Convolutions --------------------------------------------------------------------------------------------------

// Outputs of a tile: its input is read from a near cache for all of them.
constexpr Int kTileOutputs = 12;
// The copies of some samples, which fill the caches no further than this.
constexpr Int kScratchBytes = 4 << 20;

Int product(const Sizes& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// Images of one tensor and the form of their copies.
struct Planes {
  Planes(const Images& images, const Sizes& padding, const Sizes& steps, const Sizes& spans, Int length)
      : data(reinterpret_cast<const void*>(std::get<0>(images))),
        dtype(static_cast<DType>(std::get<1>(images))),
        channels(std::get<2>(images)[1]),
        strides(std::get<3>(images)),
        padding(padding),
        steps(steps),
        spans(spans),
        length(length) {
    std::copy_n(std::get<2>(images).begin() + 2, 3, sizes.begin());
  }

  void copy(Int sample, Int channel, void* out) const {
    const void* from = advance(data, dtype, sample * strides[0] + channel * strides[1]);
    kernels().conv_plane[dtype](
        {from, sizes.data(), strides.data() + 2, padding.data(), steps.data(), spans.data(), length, out});
  }

  const void* data;
  DType dtype;
  Int channels;
  std::array<Int, 5> strides;
  Sizes sizes{}, padding, steps, spans;
  Int length;  // of a copy, in elements
};

// Samples of one cluster whose copies are made at a time.
struct Piece {
  Int cluster, begin, end;
  bool add;
  Int offset;  // samples before it in the scratch memory
};

// Runs of pieces whose copies fit into `room` samples.
std::vector<std::vector<Piece>> divide(const std::vector<Int>& bounds, Int room, bool add) {
  std::vector<std::vector<Piece>> runs(1);
  Int used = 0;
  for (std::size_t k = 0; k + 1 < bounds.size(); ++k) {
    Int begin = bounds[k];
    do {  // an empty cluster has a piece, too, which writes its zeros
      if (used == room) {
        runs.emplace_back();
        used = 0;
      }
      const Int end = std::min(bounds[k + 1], begin + room - used);
      runs.back().push_back({static_cast<Int>(k), begin, end, add || begin > bounds[k], used});
      used += end - begin;
      begin = end;
    } while (begin < bounds[k + 1]);
  }
  return runs;
}

// Images whose channels lie next to each other.
struct Pixels {
  explicit Pixels(const Images& images)
      : data(reinterpret_cast<const void*>(std::get<0>(images))), channels(std::get<2>(images)[1]) {
    const auto& [samples, _, depth, height, width] = std::get<2>(images);
    const auto& steps = std::get<3>(images);
    sizes = {depth, height, width};
    strides = {steps[0], steps[2], steps[3], steps[4]};
    last = (samples - 1) * steps[0] + (depth - 1) * steps[2] + (height - 1) * steps[3] + (width - 1) * steps[4] + channels - 1;
  }

  const void* data;
  Int channels, last;  // last: of the elements
  Sizes sizes;
  std::array<Int, 4> strides;
};

// No copy of the images is made.
void multiply_pixels(const Pixels& grad, const Pixels& x, DType dtype, const std::vector<Int>& bounds, Int groups,
                     const Geometry& geometry, const Numbers& out, bool add, int threads) {
  const Int inputs = x.channels / groups, outputs = grad.channels / groups, columns = inputs * product(std::get<0>(geometry));
  const auto conv = [&](Int cluster, Int group, Int begin) {
    const Int output = group * outputs + begin;
    return ConvPixels{advance(grad.data, dtype, bounds[cluster] * grad.strides[0] + output),
                      grad.sizes.data(),
                      grad.strides.data(),
                      advance(x.data, dtype, bounds[cluster] * x.strides[0] + group * inputs),
                      advance(x.data, dtype, x.last + 1),
                      x.sizes.data(),
                      x.strides.data(),
                      std::get<0>(geometry).data(),
                      std::get<1>(geometry).data(),
                      std::get<2>(geometry).data(),
                      std::get<3>(geometry).data(),
                      bounds[cluster + 1] - bounds[cluster],
                      std::min(kPixelOutputs, outputs - begin),
                      inputs,
                      add,
                      advance(const_cast<void*>(out.data), out.dtype, cluster * out.stride + output * columns)};
  };
  const Int count = static_cast<Int>(bounds.size()) - 1, tiles = ceil_div(outputs, kPixelOutputs);
  // A product takes about the time of half a byte.
  threads = useful_threads(threads, bounds.back() * product(grad.sizes) * grad.channels * columns / 2);
  const std::size_t lines = conv_pixels_scratch(conv(0, 0, 0)) / sizeof(Line) + 1;
  const std::unique_ptr<Line[]> scratch(new Line[lines * static_cast<std::size_t>(threads)]);
  const auto multiply = kernels().conv_pixels[dtype];
  parallel_for(count * groups * tiles, threads, [&](Int task, int thread) {
    multiply(conv(task / (groups * tiles), task / tiles % groups, task % tiles * kPixelOutputs),
             scratch.get() + lines * static_cast<std::size_t>(thread));
  });
}

}  // namespace

void cluster_conv_wgrad(const Images& grad_images, const Images& x_images, const std::vector<Int>& bounds, Int groups,
                        const Geometry& geometry, const Handle& out_handle, bool add, int threads) {
  const auto& [kernel, steps, padding, dilation] = geometry;
  const Numbers out(out_handle);
  const Int item = static_cast<Int>(kBytes[out.dtype]), lanes = kLongestRegister / item;
  const DType dtype = static_cast<DType>(std::get<1>(x_images));
  check_one_dtype("cluster_conv_wgrad", static_cast<DType>(std::get<1>(grad_images)), dtype);
  check_one_dtype("cluster_conv_wgrad: out", accumulation_dtype(dtype, dtype), out.dtype);
  const auto& x_sizes = std::get<2>(x_images);
  // Of few channels in a group most lanes of a register would have nothing to do.
  if (std::get<3>(grad_images)[1] == 1 && std::get<3>(x_images)[1] == 1 && x_sizes[1] / groups >= lanes / 2)
    return multiply_pixels(Pixels(grad_images), Pixels(x_images), dtype, bounds, groups, geometry, out, add, threads);
  const auto& grad_sizes = std::get<2>(grad_images);
  Sizes spans;
  for (int d = 0; d < 3; ++d) spans[d] = ceil_div(x_sizes[d + 2] + 2 * padding[d], steps[d]);
  const Int reach = ((grad_sizes[2] - 1) * spans[1] + grad_sizes[3] - 1) * spans[2] + grad_sizes[4];
  const Int length = ceil_div(reach, lanes) * lanes;
  // A gradient's last register may end behind the input's last element.
  const Planes x(x_images, padding, steps, spans, ceil_div(product(steps) * product(spans), lanes) * lanes + lanes);
  const Planes grad(grad_images, {0, 0, 0}, {1, 1, 1}, spans, length);
  const Int group_inputs = x.channels / groups, group_outputs = grad.channels / groups;

  std::vector<Int> shifts;
  for (Int channel = 0; channel < group_inputs; ++channel)
    for (Int a = 0; a < kernel[0]; ++a)
      for (Int b = 0; b < kernel[1]; ++b)
        for (Int c = 0; c < kernel[2]; ++c) {
          const Sizes at{a * dilation[0], b * dilation[1], c * dilation[2]};
          const Int residue = (at[0] % steps[0] * steps[1] + at[1] % steps[1]) * steps[2] + at[2] % steps[2];
          const Int place = (at[0] / steps[0] * spans[1] + at[1] / steps[1]) * spans[2] + at[2] / steps[2];
          shifts.push_back(channel * x.length + residue * product(spans) + place);
        }
  const Int inputs = static_cast<Int>(shifts.size());

  const Int per_sample = (x.channels * x.length + grad.channels * grad.length) * item;
  const Int room = std::clamp<Int>(kScratchBytes / per_sample, 1, std::max<Int>(1, bounds.back()));
  const Int grad_bytes = grad.channels * grad.length * item, x_bytes = x.channels * x.length * item;
  const std::unique_ptr<Line[]> scratch(new Line[static_cast<std::size_t>(room * (grad_bytes + x_bytes)) / sizeof(Line) + 1]);
  char* const grads = scratch[0].bytes;
  char* const values = grads + room * grad_bytes;
  const Int blocks = ceil_div(group_outputs, kTileOutputs);
  const auto multiply = kernels().conv_tile[out.dtype];

  for (const std::vector<Piece>& run : divide(bounds, room, add)) {
    const Int first = run.front().begin, samples = run.back().end - first, planes = grad.channels + x.channels;
    parallel_for(samples * planes, useful_threads(threads, samples * per_sample), [&](Int task, int) {
      const Int sample = task / planes, plane = task % planes;
      if (plane < grad.channels) {
        grad.copy(first + sample, plane, grads + sample * grad_bytes + plane * grad.length * item);
      } else {
        const Int channel = plane - grad.channels;
        x.copy(first + sample, channel, values + sample * x_bytes + channel * x.length * item);
      }
    });
    // A product takes about the time of half a byte.
    const Int products = samples * grad.channels * inputs * length;
    const Int tiles = static_cast<Int>(run.size()) * groups * blocks;
    parallel_for(tiles, useful_threads(threads, products / 2), [&](Int task, int) {
      const Piece& piece = run[static_cast<std::size_t>(task / (groups * blocks))];
      const Int group = task / blocks % groups, begin = task % blocks * kTileOutputs;
      const Int output = group * group_outputs + begin;
      multiply({grads + piece.offset * grad_bytes + output * length * item, grad_bytes / item, length,
                values + piece.offset * x_bytes + group * group_inputs * x.length * item, x_bytes / item, shifts.data(),
                piece.end - piece.begin, std::min(kTileOutputs, group_outputs - begin), inputs, piece.add,
                advance(const_cast<void*>(out.data), out.dtype, piece.cluster * out.stride + output * inputs), inputs});
    });
  }
}

namespace {

// ---- Normalisations ------------------------------------------------------------------------------------------------

// Elements that one task works on at least.
constexpr Int kTaskSize = 1 << 15;

}  // namespace

void group_norm_backward(const Handle& grad, const Handle& x, const Handle& mean, const Handle& rstd,
                         const std::optional<Handle>& weight, Int samples, Int channels, Int size, Int groups, const Handle& by_x,
                         std::uintptr_t by_weight, std::uintptr_t by_bias, int threads) {
  const Numbers slopes(grad), values(x), out(by_x), means(mean), rstds(rstd);
  check_one_dtype("group_norm_backward", slopes.dtype, values.dtype);
  std::vector<double> weights(static_cast<std::size_t>(channels), 1.0);
  if (weight)
    for (Int c = 0; c < channels; ++c) weights[c] = Numbers(*weight)[c];
  const Int width = channels / groups, elements = width * size, total = samples * groups;
  const Int per_task = std::max<Int>(1, kTaskSize / std::max<Int>(1, elements));
  const auto kernel = kernels().group_norm[values.dtype];
  threads = useful_threads(threads, 3 * total * elements * static_cast<Int>(kBytes[values.dtype]));
  parallel_for(ceil_div(total, per_task), threads, [&](Int task, int) {
    for (Int i = task * per_task; i < std::min(total, (task + 1) * per_task); ++i) {
      const Int first = i * width;
      kernel({advance(slopes.data, slopes.dtype, i * elements), advance(values.data, values.dtype, i * elements), means.at(i),
              rstds.at(i), weights.data() + i % groups * width, width, size,
              advance(const_cast<void*>(out.data), out.dtype, i * elements), reinterpret_cast<double*>(by_weight) + first,
              reinterpret_cast<double*>(by_bias) + first});
    }
  });
}

}  // namespace diffmtl::cpu
