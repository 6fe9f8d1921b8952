// The four element types, and a register of them.
//
// Written with the vector extensions of GCC and Clang, so that one text serves every instruction set. Everything is
// local to the including file: the linker must never take a function compiled for one instruction set for another's.
// For the same reason no header of the standard library with code in it is used here.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.hpp"

namespace diffmtl::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define DIFFMTL_INLINE_LOOP inline __attribute__((always_inline))
// Of a loop that kernels for several types have in common: compiled once, not into each of them.
#define DIFFMTL_SHARED __attribute__((noinline))

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2)));
typedef std::int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));

template <class Compute>
using Vector = std::conditional_t<std::is_same_v<Compute, float>, Floats, Doubles>;
template <class Compute>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Compute));

// Sums over elements of these types are formed in this type.
template <class A, class B = A>
using ComputeOf = std::conditional_t<std::is_same_v<A, double> || std::is_same_v<B, double>, double, float>;

// The pairs of types that there are loops for: one type, or the second one is what the first is computed in. Numbers of
// other pairs are brought into the computing type block by block, or go one register at a time.
template <class A, class B>
constexpr bool kDirect = std::is_same_v<B, A> || std::is_same_v<B, ComputeOf<A>>;

DIFFMTL_INLINE_LOOP Int smaller(Int a, Int b) { return b < a ? b : a; }
DIFFMTL_INLINE_LOOP Int larger(Int a, Int b) { return a < b ? b : a; }

template <class To, class From>
DIFFMTL_INLINE_LOOP To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The conversions below serve one number (std::uint32_t, float) and a register of them (Words, Floats) alike.

DIFFMTL_INLINE_LOOP float from_integer(std::uint32_t x) { return static_cast<float>(static_cast<std::int32_t>(x)); }
DIFFMTL_INLINE_LOOP Floats from_integer(Words x) { return __builtin_convertvector((Ints)x, Floats); }

template <class Real, class Bits>
DIFFMTL_INLINE_LOOP Real decode_bfloat16(Bits bits) {
  return bit_cast<Real>(bits << 16);
}

// Rounds to nearest, ties to even; the addition carries into the exponent where it has to.
template <class Bits, class Real>
DIFFMTL_INLINE_LOOP Bits encode_bfloat16(Real x) {
  const Bits bits = bit_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x != x ? (bits & 0) + 0x7fc0 : rounded;
}

template <class Real, class Bits>
DIFFMTL_INLINE_LOOP Real decode_float16(Bits bits) {
  const Bits sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  // Subnormal numbers are multiples of 2^-24: no float32 subnormals, so flushing them to zero does no harm.
  const Bits subnormal = bit_cast<Bits>(from_integer(magnitude) * 0x1p-24f);
  const Bits normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) | 0x7f800000u;
  const Bits finite = magnitude < 0x0400 ? subnormal : normal;
  return bit_cast<Real>((magnitude >= 0x7c00 ? special : finite) | sign);
}

template <class Bits, class Real>
DIFFMTL_INLINE_LOOP Bits encode_float16(Real x) {
  const Bits bits = bit_cast<Bits>(x), magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - (112u << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // Next to 1/2 floats are 2^-24 apart, as float16's subnormals are: the addition rounds.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Real>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
  const Bits infinity = (bits & 0) + 0x7c00, nan = infinity + 0x0200;
  const Bits special = magnitude > 0x7f800000u ? nan : infinity;
  return (magnitude >= 0x47800000u ? special : finite) | ((bits >> 16) & 0x8000);
}

DIFFMTL_INLINE_LOOP float to_number(float x) { return x; }
DIFFMTL_INLINE_LOOP double to_number(double x) { return x; }
DIFFMTL_INLINE_LOOP float to_number(BFloat16 x) { return decode_bfloat16<float>(std::uint32_t{x.bits}); }
DIFFMTL_INLINE_LOOP float to_number(Float16 x) { return decode_float16<float>(std::uint32_t{x.bits}); }

template <class T, class Compute>
DIFFMTL_INLINE_LOOP T from_number(Compute x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {static_cast<std::uint16_t>(encode_bfloat16<std::uint32_t>(static_cast<float>(x)))};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {static_cast<std::uint16_t>(encode_float16<std::uint32_t>(static_cast<float>(x)))};
  } else {
    return static_cast<T>(x);
  }
}

}  // namespace
}  // namespace diffmtl::cpu
