// The streaming kernels of the CPU ops and how one set of them is chosen.
//
// The *_loops.hpp are compiled once for every instruction set, each time into a table of this type. A kernel runs on one
// thread over one chunk of memory; the .cpp file of its family divides tensors into chunks and adds up what those return.
#pragma once
#include <cstddef>
#include <cstdint>

namespace diffmtl::cpu {

using Int = std::int64_t;

// The codes that diffmtl_fast/ops/cpu/handles.py sends.
enum DType { kFloat32, kFloat64, kBFloat16, kFloat16, kDTypes };
// An int64 scalar in the place of a tensor: the seed of the noise that is meant.
constexpr DType kSeed = kDTypes;

constexpr std::size_t kBytes[kDTypes] = {4, 8, 2, 2};

constexpr int kMaxRows = 64;
// Terms of sums are added up in the computing precision (float32, or float64 where an input is) within a block only;
// those of products of matrices over all rows, and of convolutions over some samples or lines.
constexpr Int kBlock = 1024;

// Of an error e: e^2, with half its slope; or Huber's.
enum Loss { kSquaredLoss, kHuberLoss, kLosses };

// What becomes of an output's values: they are replaced, or, past the caches, or they are added to.
enum Write { kReplace, kStream, kAdd };

// K rows of a Jacobian or of a part of its columns; elements of a row lie next to each other.
struct Rows {
  const void* data;
  Int stride;  // in elements
  Int columns;
  int count;
};

// A block of outputs x inputs of one cluster's weight gradient. Elements of a row lie next to each other.
struct WgradBlock {
  const void* grad;
  Int grad_stride;  // in elements
  const void* x;
  Int x_stride;
  Int rows, outputs, inputs;
  bool add;          // to what is there
  bool past_caches;  // write to memory at once; needs an output of the computing type, in cache lines
  void* out;
  Int out_stride;
};

// A group of channels of one sample in the backward of a normalisation: [channels, size] without gaps.
struct NormGroup {
  const void* grad;
  const void* x;
  double mean, rstd;
  const double* weight;  // of every channel, as are the results for weight and bias
  Int channels, size;
  bool centred;  // otherwise x is not moved before it is scaled, and the mean is 0
  void* by_x;
  double* by_weight;
  double* by_bias;
};

// Some rows, of one cluster, in the backward of a normalisation over rows: [rows, columns] without gaps.
struct NormRows {
  const void* grad;
  const void* x;
  const double* mean;  // of every row
  const double* rstd;
  Int rows, columns;
  bool centred;
  const void* weight;  // of every column, in the computing type and in whole registers, as are the two sums
  void* by_x;
  void* by_weight;  // null, as by_bias is then, where these are not wanted
  void* by_bias;
};

// Channels of one sample of a convolution side by side, [positions][width], with the padding's zeros.
struct ConvStrip {
  const void* data;  // of the first channel
  Int channels;      // zeros from there on up to the width
  Int channel_stride;  // in elements, as the next ones are
  const Int* strides;  // of the three spatial dimensions, and so on
  const Int* sizes;
  const Int* padding;
  const Int* extents;  // of the positions, which may end before the padding does
  Int width;           // whole registers
  void* out;           // in the computing type
};

// sums[row][tap][lane] = (add ? sums : 0) + the products of a row's element with a strip's registers, which the tap shifts,
// summed over positions.
struct ConvProducts {
  const void* elements;   // in the computing type, as everything here
  const Int* rows;        // where those of every row begin
  const Int* row_steps;   // to the next sample, depth, line and column
  const void* strips;
  const Int* taps;        // where those of every tap begin
  const Int* strip_steps;
  const Int* sizes;  // how many samples, depths, lines and columns
  Int row_count, tap_count, width;
  bool add;
  void* sums;
  const void* results;  // prefetched: of every row tap_count * width elements that are written next; or null
  Int result_stride;
};

// out[row][channel][tap] = (add ? out : 0) + sums[row][tap][channel], all in the computing type.
struct ConvWeights {
  const void* sums;
  Int rows, taps, channels, width;
  bool add;
  void* out;
  Int out_stride;  // from one row to the next
};

using MixKernel = void (*)(const void* a, double a_share, const void* b, double b_share, void* out, Int n);

struct Kernels {
  const char* name;
  // sums[i * count + j] += <row i, row j> for i <= j, in the type of the rows and in kFloat32 or kFloat64 at least.
  // scratch: gram_scratch(count) bytes, aligned to 64.
  void (*gram[2][kDTypes])(const Rows& rows, double* sums, void* scratch);
  // The Gramian of many rows, by the computing type, kFloat32 or kFloat64: how many rows are a panel, and how many of
  // them are multiplied at a time; rows as [columns][panel], zeros for those that a panel lacks; and
  // sums[i][j] += <left row i, right row j> over n columns, for left_rows rows i from `first` on.
  Int panel_rows[2], left_rows[2];
  void (*pack_panel[2][kDTypes])(const Rows& rows, void* panel);
  void (*multiply_panels[2])(const void* left, Int first, const void* right, Int n, double* sums);
  // out = (kAdd: out) + weights * rows, by the types of the rows and of the output. Returns |out|^2.
  double (*combine[kDTypes][kDTypes])(const Rows& rows, const double* weights, Write write, void* out);
  // The sum of the losses of pred - target over n elements, at most kBlock. delta: of the Huber loss.
  double (*loss_sum[kLosses][kDTypes][kDTypes])(const void* pred, const void* target, double delta, Int n);
  // scale times its slope: in the type of pred to by_pred and, unless that is null, negated and in the type of target
  // to by_target; of at most kBlock elements.
  void (*loss_slope[kLosses][kDTypes][kDTypes])(const void* pred, const void* target, double delta, double scale,
                                                void* by_pred, void* by_target, Int n);
  // out = a_share * a + b_share * b in three roundings, computed in the type of out, but at least in that of a; of at most
  // kBlock elements. Into the type of a, b is of any type; into another computing type it is of the type of a or, being
  // generated, float32. Null for the rest.
  MixKernel mix[kDTypes][kDTypes][kDTypes];
  // By the types of the rows and of the output. scratch: wgrad_scratch(block) bytes, aligned to 64.
  void (*wgrad[kDTypes][kDTypes])(const WgradBlock& block, void* scratch);
  // out = (add ? out : 0) + the sum of `count` rows, by the types of the rows and of the output.
  void (*sum_rows[kDTypes][kDTypes])(const void* rows, Int stride, Int count, Int columns, bool add, void* out);
  void (*group_norm[kDTypes])(const NormGroup& group);
  void (*norm_rows[kDTypes])(const NormRows& norm);
  // Into float32, or float64 of float64; and by that type, kFloat32 or kFloat64.
  void (*conv_strip[kDTypes])(const ConvStrip& strip);
  void (*conv_products[2])(const ConvProducts& products);
  void (*conv_weights[2])(const ConvWeights& weights);
  // The noise of n elements of a sample from element `begin` on, a multiple of 4.
  void (*normals)(std::uint64_t seed, Int sample, Int begin, Int n, float* out);
  // Of given words, n a multiple of 16: for the tests, whose patience ends before the noise meets its extreme words.
  void (*box_muller)(const std::uint32_t* radius, const std::uint32_t* turn, float* cosine, float* sine, Int n);
};

constexpr std::size_t gram_scratch(int rows) { return sizeof(double) * kBlock * static_cast<std::size_t>(rows); }

// No register of any instruction set is longer.
constexpr Int kLongestRegister = 64;

// In whole tiles.
constexpr std::size_t wgrad_scratch(const WgradBlock& block) {
  constexpr Int kTiles = 256;
  return sizeof(double) * static_cast<std::size_t>((block.outputs + block.inputs + kTiles) * block.rows);
}

// Null where the table was not compiled for this architecture.
const Kernels* plain_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The table in use.
const Kernels& kernels();

}  // namespace diffmtl::cpu
