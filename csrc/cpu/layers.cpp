// The ops over layers: weight gradients and sums of the rows of clusters, and the backward of normalisations. Divided
// into blocks of the result.
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

struct Cluster {
  Int index, begin, end;  // rows
};

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

void cluster_wgrad(const Handle& grad, const Handle& x, const std::vector<Int>& offsets, Int longest, Int outputs, Int inputs,
                   const Handle& out, bool add, int threads) {
  Wgrad wgrad{Numbers(grad), Numbers(x), Numbers(out), outputs, inputs, add, false};
  check_one_dtype("cluster_wgrad", wgrad.grad.dtype, wgrad.x.dtype);
  std::vector<Cluster> clusters;
  for (std::size_t k = 0; k + 1 < offsets.size(); ++k)
    if (offsets[k + 1] - offsets[k] <= longest) clusters.push_back({static_cast<Int>(k), offsets[k], offsets[k + 1]});
  const Int count = static_cast<Int>(clusters.size());
  wgrad.past_caches = !add && count * wgrad.bytes() >= kBytesPastCaches && in_cache_lines(wgrad.out, inputs);
  Int products = 0;
  for (const auto& [index, begin, end] : clusters) products += (end - begin) * outputs * inputs;
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
