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

std::vector<double> weights_of(const std::optional<Handle>& weight, Int channels) {
  std::vector<double> weights(static_cast<std::size_t>(channels), 1.0);
  if (weight)
    for (Int c = 0; c < channels; ++c) weights[c] = Numbers(*weight)[c];
  return weights;
}

// The memory of a normalisation: of what it reads and of the gradient by x.
struct Norm {
  Numbers grad, x;
  std::optional<Numbers> mean;  // none where x is not moved
  Numbers rstd;
  std::vector<double> weight;
  Int channels, size, groups;
  Numbers by_x;

  double mean_at(Int i) const { return mean ? mean->at(i) : 0; }
  int useful_threads(int threads, Int samples) const {
    return cpu::useful_threads(threads, 3 * samples * channels * size * static_cast<Int>(kBytes[x.dtype]));
  }
};

void norm_by_groups(const Norm& norm, Int samples, double* by_weight, double* by_bias, int threads) {
  const Int width = norm.channels / norm.groups, elements = width * norm.size, total = samples * norm.groups;
  const Int per_task = std::max<Int>(1, kTaskSize / std::max<Int>(1, elements));
  const auto kernel = kernels().group_norm[norm.x.dtype];
  parallel_for(ceil_div(total, per_task), norm.useful_threads(threads, samples), [&](Int task, int) {
    for (Int i = task * per_task; i < std::min(total, (task + 1) * per_task); ++i) {
      const Int first = i * width;
      kernel({advance(norm.grad.data, norm.grad.dtype, i * elements), advance(norm.x.data, norm.x.dtype, i * elements),
              norm.mean_at(i), norm.rstd.at(i), norm.weight.data() + i % norm.groups * width, width, norm.size,
              norm.mean.has_value(), advance(const_cast<void*>(norm.by_x.data), norm.by_x.dtype, i * elements),
              by_weight + first, by_bias + first});
    }
  });
}

// Where the gradients by weight or bias go.
struct NormSums {
  std::optional<Handle> out;
  bool add;

  // The sums of rows of `channels` numbers; rows of a cluster follow each other, `stride` apart.
  void write(const void* rows, DType dtype, Int stride, const std::vector<Int>& offsets, Int channels) const {
    if (!out) return;
    const Numbers sums(*out);
    const auto kernel = kernels().sum_rows[dtype][sums.dtype];
    for (std::size_t k = 0; k + 1 < offsets.size(); ++k)
      kernel(advance(rows, dtype, offsets[k] * stride), stride, offsets[k + 1] - offsets[k], channels, add,
             advance(const_cast<void*>(sums.data), sums.dtype, static_cast<Int>(k) * sums.stride));
  }
};

struct RowsTask {
  Int begin, end;
};

// Rows are divided in the same way for any number of threads, and every part has sums of its own, which are then added up.
void norm_by_rows(const Norm& norm, const std::vector<Int>& offsets, const NormSums& by_weight, const NormSums& by_bias,
                  int threads) {
  const Int columns = norm.channels;
  const Int per_task = std::clamp<Int>(kTaskSize / std::max<Int>(1, columns), 16, kBlock);
  std::vector<RowsTask> tasks;
  std::vector<Int> task_offsets{0};
  for (std::size_t k = 0; k + 1 < offsets.size(); ++k) {
    for (Int begin = offsets[k]; begin < offsets[k + 1]; begin += per_task)
      tasks.push_back({begin, std::min(begin + per_task, offsets[k + 1])});
    task_offsets.push_back(static_cast<Int>(tasks.size()));
  }
  const DType compute = accumulation_dtype(norm.x.dtype, norm.x.dtype);
  const Int bytes = static_cast<Int>(kBytes[compute]), lines = columns * bytes / static_cast<Int>(sizeof(Line)) + 1;
  const Int width = lines * static_cast<Int>(sizeof(Line)) / bytes;
  const bool affine = by_weight.out || by_bias.out;
  const std::unique_ptr<Line[]> scratch(new Line[lines * (1 + (affine ? 2 * static_cast<Int>(tasks.size()) : 0))]);
  Line* sums = scratch.get() + lines;
  for (Int c = 0; c < width; ++c)
    write_number(reinterpret_cast<std::uintptr_t>(scratch.get()), compute, c, c < columns ? norm.weight[c] : 0);
  const auto kernel = kernels().norm_rows[norm.x.dtype];
  parallel_for(static_cast<Int>(tasks.size()), norm.useful_threads(threads, offsets.back()), [&](Int task, int) {
    const auto [begin, end] = tasks[task];
    double mean[kBlock], rstd[kBlock];
    for (Int i = begin; i < end; ++i) {
      mean[i - begin] = norm.mean_at(i);
      rstd[i - begin] = norm.rstd.at(i);
    }
    Line* own = sums + 2 * lines * task;
    const Int first = begin * columns;
    kernel({advance(norm.grad.data, norm.grad.dtype, first), advance(norm.x.data, norm.x.dtype, first), mean, rstd, end - begin,
            columns, norm.mean.has_value(), scratch.get(), advance(const_cast<void*>(norm.by_x.data), norm.by_x.dtype, first),
            affine ? own : nullptr, affine ? own + lines : nullptr});
  });
  by_weight.write(sums, compute, 2 * width, task_offsets, columns);
  by_bias.write(sums + lines, compute, 2 * width, task_offsets, columns);
}

std::optional<Numbers> optional_numbers(const std::optional<Handle>& handle) {
  return handle ? std::optional<Numbers>(*handle) : std::nullopt;
}

}  // namespace

void group_norm_backward(const Handle& grad, const Handle& x, const Handle& mean, const Handle& rstd,
                         const std::optional<Handle>& weight, Int samples, Int channels, Int size, Int groups, const Handle& by_x,
                         std::uintptr_t by_weight, std::uintptr_t by_bias, int threads) {
  const Norm norm{Numbers(grad), Numbers(x), Numbers(mean), Numbers(rstd), weights_of(weight, channels), channels, size,
                  groups, Numbers(by_x)};
  check_one_dtype("group_norm_backward", norm.grad.dtype, norm.x.dtype);
  norm_by_groups(norm, samples, reinterpret_cast<double*>(by_weight), reinterpret_cast<double*>(by_bias), threads);
}

void cluster_norm_backward(const Handle& grad, const Handle& x, const std::optional<Handle>& mean, const Handle& rstd,
                           const std::optional<Handle>& weight, const std::vector<Int>& offsets, Int channels, Int size,
                           Int groups, const Handle& by_x, const std::optional<Handle>& by_weight, bool add_to_weight,
                           const std::optional<Handle>& by_bias, bool add_to_bias, int threads) {
  const Norm norm{Numbers(grad), Numbers(x), optional_numbers(mean), Numbers(rstd), weights_of(weight, channels), channels,
                  size, groups, Numbers(by_x)};
  check_one_dtype("cluster_norm_backward", norm.grad.dtype, norm.x.dtype);
  const NormSums weights{by_weight, add_to_weight}, biases{by_bias, add_to_bias};
  if (groups == 1 && size == 1) return norm_by_rows(norm, offsets, weights, biases, threads);
  const Int samples = offsets.back(), count = samples * channels;
  const std::unique_ptr<double[]> sums(new double[2 * count]);
  norm_by_groups(norm, samples, sums.get(), sums.get() + count, threads);
  weights.write(sums.get(), kFloat64, channels, offsets, channels);
  biases.write(sums.get() + count, kFloat64, channels, offsets, channels);
}

}  // namespace diffmtl::cpu
