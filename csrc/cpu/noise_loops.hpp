// Counter-based normal noise: Philox4x32-10 and Box-Muller; diffmtl_fast/ops/philox.py has the definition.
//
// The same bits with every instruction set: additions, exact products and, by `rounded`, products that no compiler
// fuses into the sum that follows.
#pragma once
#include "vector.hpp"

namespace diffmtl::cpu {
namespace {

// ---- Philox --------------------------------------------------------------------------------------------------------

// Two words in every lane, the first one on top.
typedef std::uint64_t WordPairs __attribute__((vector_size(kVectorBytes)));
constexpr int kPairs = kVectorBytes / 8;

// The 64-bit products of the lower words.
DIFFMTL_INLINE_LOOP WordPairs multiply_lower(WordPairs x, std::uint32_t factor) {
  const WordPairs factors = WordPairs{} + factor;
#if defined(__AVX512F__)
  return (WordPairs)_mm512_maskz_mul_epu32(0xff, (__m512i)x, (__m512i)factors);
#elif defined(__AVX2__)
  return (WordPairs)_mm256_mul_epu32((__m256i)x, (__m256i)factors);
#elif defined(__SSE2__)
  return (WordPairs)_mm_mul_epu32((__m128i)x, (__m128i)factors);
#else
  return (x & 0xffffffff) * factors;
#endif
}

// The counter's four words: first = (a, b), second = (c, d).
struct Counters {
  WordPairs first, second;
};

// Ten rounds, each (a, b, c, d) -> (high(c m1) ^ b ^ k0, low(c m1), high(a m0) ^ d ^ k1, low(a m0)).
DIFFMTL_INLINE_LOOP Counters philox(Counters x, std::uint64_t seed) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const WordPairs a = multiply_lower(x.first >> 32, 0xD2511F53), c = multiply_lower(x.second >> 32, 0xCD9E8D57);
    x = {c ^ (x.first << 32) ^ std::uint64_t{key0} << 32, a ^ (x.second << 32) ^ std::uint64_t{key1} << 32};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return x;
}

// ---- Box-Muller ----------------------------------------------------------------------------------------------------
// A word stands for u = (word / 2^8 + 1) / 2^24 in (0, 1], without the fraction of the division.

// -2 ln u, to 2^-22 of itself: u = 2^e (1 + f) with 1 + f in [sqrt 1/2, sqrt 2), and ln (1 + f) by a minimax polynomial.
DIFFMTL_INLINE_LOOP Floats minus_two_log(Words word) {
  const Words bits = bit_cast<Words>(from_integer((word >> 8) + 1)), root_half = (bits & 0) + 0x3f3504f3;
  const Ints exponent = (Ints)(bits - root_half) >> 23;
  const Floats e = __builtin_convertvector(exponent - 24, Floats);
  const Floats f = bit_cast<Floats>(bits - ((Words)exponent << 23)) - 1.0f;
  Floats p = rounded(f * 8.7004378e-2f) - 1.42674878e-1f;
  p = rounded(p * f) + 1.49147674e-1f;
  p = rounded(p * f) - 1.6577585e-1f;
  p = rounded(p * f) + 1.99630633e-1f;
  p = rounded(p * f) - 2.50013381e-1f;
  p = rounded(p * f) + 3.33339095e-1f;
  const Floats square = rounded(f * f), log2_low = rounded(e * -2.12194440e-4f);
  const Floats small = rounded(rounded(square * f) * p) + log2_low - 0.5f * square;
  return -2.0f * (small + f + rounded(e * 0.693359375f));  // the last product is exact
}

struct Circle {
  Floats cosine, sine;
};

// cos 2 pi u and sin 2 pi u, to 2^-23: the nearest quarter turn is taken off as an integer, and short polynomials
// (those of Cephes' sinf and cosf) do the rest.
DIFFMTL_INLINE_LOOP Circle circle(Words word) {
  const Words turn = (word >> 8) + 1, quarter = (turn + (1u << 21)) >> 22;
  const Floats x = from_integer(turn - (quarter << 22)) * 0x1.921fb6p-22f;  // pi / 2 in units of 2^-22
  const Floats y = rounded(x * x);
  Floats s = rounded(y * -1.9515295891e-4f) + 8.3321608736e-3f;
  s = rounded(s * y) - 1.6666654611e-1f;
  const Floats sine = rounded(rounded(x * y) * s) + x;
  Floats c = rounded(y * 2.443315711809948e-5f) - 1.388731625493765e-3f;
  c = rounded(c * y) + 4.166664568298827e-2f;
  const Floats cosine = rounded(rounded(y * y) * c) + (1.0f - 0.5f * y);
  const Words odd = -(quarter & 1);
  const Words a = (bit_cast<Words>(sine) & odd) | (bit_cast<Words>(cosine) & ~odd);
  const Words b = (bit_cast<Words>(cosine) & odd) | (bit_cast<Words>(sine) & ~odd);
  return {bit_cast<Floats>(a ^ ((quarter + 1) & 2) << 30), bit_cast<Floats>(b ^ (quarter & 2) << 30)};
}

DIFFMTL_INLINE_LOOP Circle box_muller(Words radius, Words turn) {
  const Floats length = square_root(minus_two_log(radius));
  const Circle unit = circle(turn);
  return {rounded(length * unit.cosine), rounded(length * unit.sine)};
}

// ---- Kernels -------------------------------------------------------------------------------------------------------

// The groups of four elements that two registers hold: two lanes next to each other end up half a register apart.
DIFFMTL_INLINE_LOOP WordPairs group_lanes() {
  WordPairs groups;
  for (int lane = 0; lane < kPairs; ++lane) groups[lane] = lane % 2 * (kPairs / 2) + lane / 2;
  return groups;
}

void normals(std::uint64_t seed, Int sample, Int begin, Int n, float* out) {
  constexpr Int kStep = 2 * kLanes<float>;
  constexpr std::uint64_t kLow = 0xffffffff, kHigh = ~kLow;
  const WordPairs lanes = group_lanes(), c = (lanes & 0) + (static_cast<std::uint64_t>(sample) << 32);
  for (Int i = 0; i < n; i += kStep) {
    const WordPairs group = lanes + static_cast<std::uint64_t>((begin + i) / 4);
    const Counters words = philox({group << 32, c}, seed);
    const WordPairs radius = (words.first >> 32) | (words.second & kHigh);
    const WordPairs turn = (words.first & kLow) | (words.second << 32);
    const Circle normal = box_muller((Words)radius, (Words)turn);
    const Floats pair[2] = {interleave_lower(normal.cosine, normal.sine), interleave_upper(normal.cosine, normal.sine)};
    std::memcpy(out + i, pair, static_cast<std::size_t>(n - i < kStep ? n - i : kStep) * sizeof(float));
  }
}

void box_muller_of_words(const std::uint32_t* radius, const std::uint32_t* turn, float* cosine, float* sine, Int n) {
  for (Int i = 0; i + kLanes<float> <= n; i += kLanes<float>) {
    const Circle normal = box_muller(load_bits<Words>(radius + i), load_bits<Words>(turn + i));
    store<float>(cosine + i, normal.cosine);
    store<float>(sine + i, normal.sine);
  }
}

}  // namespace
}  // namespace diffmtl::cpu
