// Weight gradients of convolutions. A gradient is a sum over the positions of the output: of the output's gradient there
// times the input where the weight meets it. One of these two factors is copied into strips of channels, whose
// registers are multiplied by single elements of the other one: the input, or where it has few channels, the gradient.
//
// Every element of a result is summed by one thread in an order of its own: how many threads there are, and where
// they divide the result, changes no bit of it.
#include "convolution.hpp"

#include <algorithm>
#include <cstring>
#include <memory>

#include "memory.hpp"
#include "numbers.hpp"
#include "threads.hpp"

namespace diffmtl::cpu {
namespace {

// What a thread keeps in its own caches: sums, and strips of some samples.
constexpr Int kSumsBytes = 1 << 17, kStripsBytes = 1 << 18;
// Positions that are added up before they are added to the sums, in whole samples or lines.
constexpr Int kPositions = 512;
// Rows of a block: a multiple of what is multiplied at a time, and few enough to stay in a near cache.
constexpr Int kRowsUnit = 6, kMostRows = 48;
// Results of this size have left the caches before they are written.
constexpr Int kBytesPastCaches = 1 << 20;
// A strip has this many of the longest registers at most.
constexpr Int kStripRegisters = 4;

using Steps = std::array<Int, 4>;  // to the next sample, depth, line and column

Int product(const Sizes& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// Makes one dimension of two whose positions follow each other in memory and are neither padded nor skipped.
bool fold(Images& grad, Images& x, const Geometry& geometry, std::size_t d) {
  const auto& [kernel, stride, padding, dilation] = geometry;
  for (const std::size_t i : {d, std::size_t{2}})
    if (kernel[i] != 1 || stride[i] != 1 || padding[i] != 0) return false;
  for (const Images* images : {&grad, &x}) {
    const auto& [address, dtype, sizes, strides] = *images;
    if (sizes[d + 2] != 1 && strides[d + 2] != sizes[4] * strides[4]) return false;
  }
  for (Images* images : {&grad, &x}) {
    auto& sizes = std::get<2>(*images);
    sizes[4] *= sizes[d + 2];
    sizes[d + 2] = 1;
  }
  return true;
}

// One of the two factors: the images, and at which of their positions they are multiplied.
class Factor {
 public:
  // steps: from where one position of the output meets them to where the next one does. extents: of all that are met.
  Factor(const Images& images, const Sizes& padding, const Sizes& steps, const Sizes& extents)
      : data_(reinterpret_cast<const void*>(std::get<0>(images))),
        dtype_(static_cast<DType>(std::get<1>(images))),
        strides_(std::get<3>(images)),
        padding_(padding),
        steps_(steps),
        extents_(extents) {
    std::copy_n(std::get<2>(images).begin() + 2, 3, sizes_.begin());
  }

  DType dtype() const { return dtype_; }
  Int channel_stride() const { return strides_[1]; }
  const void* at(Int sample, Int channel) const { return advance(data_, dtype_, sample * strides_[0] + channel * strides_[1]); }
  Steps steps() const { return {strides_[0], steps_[0] * strides_[2], steps_[1] * strides_[3], steps_[2] * strides_[4]}; }

  // Of strips: [samples][positions][width].
  Int strip_size(Int width) const { return product(extents_) * width; }
  Int offset(const Sizes& position, Int width) const {
    return ((position[0] * extents_[1] + position[1]) * extents_[2] + position[2]) * width;
  }
  Steps strip_steps(Int width) const {
    return {strip_size(width), offset({steps_[0], 0, 0}, width), offset({0, steps_[1], 0}, width), offset({0, 0, steps_[2]}, width)};
  }
  void pack(Int sample, Int samples, Int channel, Int channels, Int width, DType compute, void* out) const {
    for (Int n = 0; n < samples; ++n)
      kernels().conv_strip[dtype_]({at(sample + n, channel), channels, strides_[1], strides_.data() + 2, sizes_.data(),
                                    padding_.data(), extents_.data(), width, advance(out, compute, n * strip_size(width))});
  }

 private:
  const void* data_;
  DType dtype_;
  std::array<Int, 5> strides_;
  Sizes sizes_{}, padding_, steps_, extents_;
};

// The order of the work: rows x lanes x taps. In lanes are channels of one factor, in strips. Rows are channels of the
// other one, read where they are if they are of the computing type; or, where the outputs are in lanes, inputs and taps.
struct Order {
  Factor in_rows, in_lanes;
  bool outputs_in_lanes;
  Int row_channels, lane_channels;  // of a group
  Int width;                        // of a strip
  Int block;                        // rows
  bool packed_rows;
  Int row_width;  // of the rows' strips, if they are packed
  std::vector<Int> rows, taps;

  Int count() const { return static_cast<Int>(rows.size()); }
  Int strips() const { return ceil_div(lane_channels, width); }
  Int blocks() const { return ceil_div(count(), block); }
};

}  // namespace

void cluster_conv_wgrad(Images grad_images, Images x_images, const std::vector<Int>& bounds, Int groups,
                        const Geometry& geometry, const Handle& out_handle, bool add, int threads) {
  if (fold(grad_images, x_images, geometry, 1)) fold(grad_images, x_images, geometry, 0);
  const auto& [kernel, stride, padding, dilation] = geometry;
  const auto& grad_sizes = std::get<2>(grad_images);
  const Sizes image{grad_sizes[2], grad_sizes[3], grad_sizes[4]};
  Sizes extents;
  for (std::size_t d = 0; d < 3; ++d) extents[d] = (image[d] - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1;
  const Factor grad(grad_images, {0, 0, 0}, {1, 1, 1}, image), x(x_images, padding, stride, extents);
  const Numbers out(out_handle);
  const DType compute = out.dtype;
  check_one_dtype("cluster_conv_wgrad", grad.dtype(), x.dtype());
  check_one_dtype("cluster_conv_wgrad: out", accumulation_dtype(x.dtype(), x.dtype()), compute);
  const Int item = static_cast<Int>(kBytes[compute]), lanes = kLongestRegister / item;
  const Int clusters = static_cast<Int>(bounds.size()) - 1;
  const Int outputs = grad_sizes[1] / groups, inputs = std::get<2>(x_images)[1] / groups, taps = product(kernel);
  const Int products = bounds.back() * product(image) * groups * outputs * inputs * taps;
  // A product takes about the time of half a byte.
  threads = useful_threads(threads, products / 2);

  const auto whole = [](Int n, Int unit) { return ceil_div(n, unit) * unit; };
  const bool swapped = inputs < lanes && whole(inputs * taps, kRowsUnit) * whole(outputs, lanes) < whole(outputs, kRowsUnit) * taps * whole(inputs, lanes);
  Order order{swapped ? x : grad, swapped ? grad : x, swapped, swapped ? inputs : outputs, swapped ? outputs : inputs,
              0, 0, false, 0, {}, {}};
  const Int strips = ceil_div(order.lane_channels, kStripRegisters * lanes);
  order.width = whole(ceil_div(order.lane_channels, strips), lanes);
  const auto tap_offsets = [&](Int width) {
    std::vector<Int> offsets;
    for (Int a = 0; a < kernel[0]; ++a)
      for (Int b = 0; b < kernel[1]; ++b)
        for (Int c = 0; c < kernel[2]; ++c)
          offsets.push_back(x.offset({a * dilation[0], b * dilation[1], c * dilation[2]}, width));
    return offsets;
  };
  if (swapped) {
    order.block = inputs * taps;
    order.packed_rows = true;
    order.row_width = whole(inputs, lanes);
    order.taps = {0};
    for (Int channel = 0; channel < inputs; ++channel)
      for (const Int offset : tap_offsets(order.row_width)) order.rows.push_back(channel + offset);
  } else {
    const Int room = std::max<Int>(1, kSumsBytes / (taps * order.width * item) / kRowsUnit) * kRowsUnit;
    const Int parts = ceil_div(threads * kBlocksPerThread, clusters * groups * strips);
    order.block = std::min({kMostRows, room, part_size(outputs, parts, kRowsUnit, kRowsUnit)});
    order.packed_rows = grad.dtype() != compute;
    order.row_width = order.packed_rows ? whole(std::min(order.block, outputs), lanes) : 0;
    order.taps = tap_offsets(order.width);
    for (Int output = 0; output < outputs; ++output)
      order.rows.push_back(order.packed_rows ? output % order.block : output % order.block * grad.channel_stride());
  }

  Int longest = 1;
  for (Int k = 0; k < clusters; ++k) longest = std::max(longest, bounds[k + 1] - bounds[k]);
  const Int strip_size = order.in_lanes.strip_size(order.width), row_size = order.in_rows.strip_size(order.row_width);
  const Int chunk = std::clamp<Int>(kStripsBytes / (strip_size * item), 1, longest);
  const Int tap_count = static_cast<Int>(order.taps.size()), sums_size = order.block * tap_count * order.width;
  const Int lines = (sums_size + chunk * (strip_size + row_size)) * item / static_cast<Int>(sizeof(Line)) + 1;
  const std::unique_ptr<Line[]> scratch(new Line[static_cast<std::size_t>(lines * threads)]);
  const bool prefetch = !swapped && clusters * groups * outputs * inputs * taps * item >= kBytesPastCaches;
  const Int height = std::clamp<Int>(kPositions / image[2], 1, image[1]);
  const Int together = height == image[1] && image[0] == 1 ? std::max<Int>(1, kPositions / product(image)) : 1;
  const Steps strip_steps = order.in_lanes.strip_steps(order.width);
  const Steps row_steps = order.packed_rows ? order.in_rows.strip_steps(order.row_width) : order.in_rows.steps();

  parallel_for(clusters * groups * order.strips() * order.blocks(), threads, [&](Int task, int thread) {
    const Int row = task % order.blocks() * order.block, lane = task / order.blocks() % order.strips() * order.width;
    const Int group = task / order.blocks() / order.strips() % groups, cluster = task / order.blocks() / order.strips() / groups;
    const Int rows = std::min(order.block, order.count() - row), channels = std::min(order.width, order.lane_channels - lane);
    void* const sums = scratch[static_cast<std::size_t>(thread * lines)].bytes;
    void* const strip = advance(sums, compute, sums_size);
    void* const packed = advance(strip, compute, chunk * strip_size);
    const Int first_output = group * outputs + (swapped ? lane : row);
    void* const weights = advance(const_cast<void*>(out.data), compute,
                                  cluster * out.stride + (first_output * inputs + (swapped ? 0 : lane)) * taps);
    bool first = true;
    for (Int begin = bounds[cluster]; begin < bounds[cluster + 1]; begin += chunk) {
      const Int samples = std::min(chunk, bounds[cluster + 1] - begin);
      order.in_lanes.pack(begin, samples, group * order.lane_channels + lane, channels, order.width, compute, strip);
      const Int row_channel = group * order.row_channels + (swapped ? 0 : row);
      const void* elements = packed;
      if (order.packed_rows) {
        order.in_rows.pack(begin, samples, row_channel, swapped ? inputs : rows, order.row_width, compute, packed);
      } else {
        elements = order.in_rows.at(begin, row_channel);
      }
      for (Int n = 0; n < samples; n += together)
        for (Int z = 0; z < image[0]; ++z)
          for (Int y = 0; y < image[1]; y += height) {
            const auto offset = [&](const Steps& steps) { return n * steps[0] + z * steps[1] + y * steps[2]; };
            const Steps sizes{std::min(together, samples - n), 1, std::min(height, image[1] - y), image[2]};
            const bool last = prefetch && begin + n + together >= bounds[cluster + 1] && z + 1 == image[0] && y + height >= image[1];
            kernels().conv_products[compute]({advance(elements, compute, offset(row_steps)), order.rows.data() + row, row_steps.data(),
                                              advance(strip, compute, offset(strip_steps)), order.taps.data(), strip_steps.data(),
                                              sizes.data(), rows, tap_count, order.width, !first, sums, last ? weights : nullptr,
                                              inputs * taps});
            first = false;
          }
    }
    if (first) std::memset(sums, 0, static_cast<std::size_t>(sums_size * item));
    if (swapped) {
      kernels().conv_weights[compute]({sums, 1, rows, channels, order.width, add, weights, 0});
    } else {
      kernels().conv_weights[compute]({sums, rows, taps, channels, order.width, add, weights, inputs * taps});
    }
  });
}

}  // namespace diffmtl::cpu
