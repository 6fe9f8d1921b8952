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
// those of products of matrices and of convolutions' planes by the lanes of a register.
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
  void* by_x;
  double* by_weight;
  double* by_bias;
};

// The elements of one sample and channel as a convolution's weight gradient reads them: with the padding's zeros, apart by
// their residues modulo the stride, and zeros behind them up to `length`.
struct ConvPlane {
  const void* data;
  const Int* sizes;    // of the three spatial dimensions, and so on
  const Int* strides;  // in elements
  const Int* padding;
  const Int* steps;    // the convolution's stride
  const Int* spans;    // of one residue's elements
  Int length;
  void* out;
};

// Weight gradients of some outputs of a convolution, summed over samples: products of planes, one of them shifted.
struct ConvTile {
  const void* grad;  // in the computing type: [samples, .., length], a row per output
  Int grad_sample, length;  // length: whole registers
  const void* x;
  Int x_sample;
  const Int* shifts;  // of every input channel and element of the kernel, into a sample
  Int samples, outputs, inputs;
  bool add;
  void* out;  // [outputs, inputs] in the computing type
  Int out_stride;
};

// Weight gradients of some outputs of a convolution whose channels lie next to each other, summed over the pixels of
// some samples. Sizes are of the three spatial dimensions, strides of samples and of them, all in elements.
struct ConvPixels {
  const void* grad;  // the first of the outputs
  const Int* grad_sizes;
  const Int* grad_strides;
  const void* x;
  const void* x_end;  // behind the last element that may be read
  const Int* x_sizes;
  const Int* x_strides;
  const Int* kernel;
  const Int* steps;  // the convolution's stride
  const Int* padding;
  const Int* dilation;
  Int samples, outputs, inputs;
  bool add;
  void* out;  // [outputs, inputs, kernel] in the computing type
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
  // Into float32, or float64 of float64; and by that type, kFloat32 or kFloat64.
  void (*conv_plane[kDTypes])(const ConvPlane& plane);
  void (*conv_tile[2])(const ConvTile& tile);
  // By the type of the images. scratch: conv_pixels_scratch(conv) bytes, aligned to 64.
  void (*conv_pixels[kDTypes])(const ConvPixels& conv, void* scratch);
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

// Outputs of a tile, and about how many pixels are added up in registers.
constexpr Int kPixelOutputs = 6;

constexpr std::size_t conv_pixels_scratch(const ConvPixels& conv) {
  const Int taps = conv.kernel[0] * conv.kernel[1] * conv.kernel[2];
  return sizeof(double) * static_cast<std::size_t>((taps * (conv.inputs + kLongestRegister) + kBlock + conv.grad_sizes[2]) * kPixelOutputs);
}

// Null where the table was not compiled for this architecture.
const Kernels* plain_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The table in use.
const Kernels& kernels();

}  // namespace diffmtl::cpu
