// One register of numbers, and the four element types in it.
//
// Written with the vector extensions of GCC and Clang, so that one text serves every instruction set. Everything is
// local to the including file: the linker must never take a function compiled for one instruction set for another's.
// For the same reason no header of the standard library with code in it is used here.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu_kernels.hpp"

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

DIFFMTL_INLINE_LOOP Int smaller(Int a, Int b) { return b < a ? b : a; }

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

#if defined(__AVX512F__)
// The unmasked intrinsics of GCC 12 warn of an uninitialised operand.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

// Memory is read and written at any address that suits one element.

template <class V>
DIFFMTL_INLINE_LOOP V load_bits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// GCC 12 does these two in several steps on vectors of its own.
DIFFMTL_INLINE_LOOP Words widen(Shorts x) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(kAllLanes, (__m256i)x);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}

DIFFMTL_INLINE_LOOP Shorts narrow(Words x) {
#if defined(__AVX512F__)
  return (Shorts)_mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)x);
#else
  return __builtin_convertvector(x, Shorts);
#endif
}

// Numbers of a type that no register of the same number of lanes is for.
template <class T, int kCount>
struct Array {
  T at[kCount];
};

// A register of numbers in the type of memory, rounded, and back.
template <class T, class Compute>
DIFFMTL_INLINE_LOOP auto pack(Vector<Compute> v) {
  if constexpr (std::is_same_v<T, Compute>) {
    return v;
  } else if constexpr (std::is_same_v<T, float>) {
    return __builtin_convertvector(v, HalfFloats);
  } else if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<Compute, float>) {
    return narrow(encode_bfloat16<Words>(v));
  } else if constexpr (std::is_same_v<T, Float16> && std::is_same_v<Compute, float>) {
#if defined(__AVX512F__)
    return (Shorts)_mm512_maskz_cvtps_ph(kAllLanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
    return (Shorts)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    return narrow(encode_float16<Words>(v));
#endif
  } else {
    Array<T, kLanes<Compute>> packed;
    for (int i = 0; i < kLanes<Compute>; ++i) packed.at[i] = from_number<T>(v[i]);
    return packed;
  }
}

template <class T, class Compute>
using Packed = decltype(pack<T, Compute>(Vector<Compute>{}));

template <class Compute, class T>
DIFFMTL_INLINE_LOOP Vector<Compute> unpack(const Packed<T, Compute>& from) {
  if constexpr (std::is_same_v<T, Compute>) {
    return from;
  } else if constexpr (std::is_same_v<T, float>) {
    return __builtin_convertvector(from, Doubles);
  } else if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<Compute, float>) {
    return decode_bfloat16<Floats>(widen(from));
  } else if constexpr (std::is_same_v<T, Float16> && std::is_same_v<Compute, float>) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_cvtph_ps(kAllLanes, (__m256i)from);
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps((__m128i)from);
#else
    return decode_float16<Floats>(widen(from));
#endif
  } else {
    Vector<Compute> v;
    for (int i = 0; i < kLanes<Compute>; ++i) v[i] = to_number(from.at[i]);
    return v;
  }
}

template <class Compute, class T>
DIFFMTL_INLINE_LOOP Vector<Compute> load(const T* p) {
  return unpack<Compute, T>(load_bits<Packed<T, Compute>>(p));
}

template <class V>
DIFFMTL_INLINE_LOOP void put(void* p, const V& value) {
  std::memcpy(p, &value, sizeof(value));
}

template <class Compute, class T>
DIFFMTL_INLINE_LOOP void store(T* p, Vector<Compute> v) {
  put(p, pack<T, Compute>(v));
}

// Writes past the caches to an address aligned to the size of the value, where the processor can.
template <class V>
DIFFMTL_INLINE_LOOP void stream(void* p, const V& value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), bit_cast<__m512i>(value));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(value));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), bit_cast<__m128i>(value));
#endif
  put(p, value);
}

// Makes what was streamed visible to other threads before anything written later.
DIFFMTL_INLINE_LOOP void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Copies n elements in the computing type and fills up the last register with zeros.
template <class Compute, class T>
inline void convert(const T* from, Int n, Compute* to) {
  Int c = 0;
  for (; c + kLanes<Compute> <= n; c += kLanes<Compute>) store<Compute>(to + c, load<Compute>(from + c));
  if (c == n) return;
  for (int i = 0; i < kLanes<Compute>; ++i) to[c + i] = c + i < n ? to_number(from[c + i]) : 0;
}

// The first n elements, zeros in the other lanes; any n > 0.
template <class Compute, class T>
DIFFMTL_INLINE_LOOP Vector<Compute> load_first(const T* p, Int n) {
  if (n >= kLanes<Compute>) return load<Compute>(p);
  T padded[kLanes<Compute>] = {};
  std::memcpy(padded, p, static_cast<std::size_t>(n) * sizeof(T));
  return load<Compute>(padded);
}

template <class Compute, class T>
DIFFMTL_INLINE_LOOP void store_first(T* p, Vector<Compute> v, Int n) {
  T all[kLanes<Compute>];
  store<Compute>(all, v);
  std::memcpy(p, all, static_cast<std::size_t>(n) * sizeof(T));
}

// The same value, in a register of its own that the compiler knows nothing of.
template <class V>
DIFFMTL_INLINE_LOOP V opaque(V value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  asm("" : "+m"(value));
#endif
  return value;
}

// Keeps a product from being fused with the sum that follows: it is rounded on its own, on every processor.
template <class V>
DIFFMTL_INLINE_LOOP V rounded(V product) {
  return opaque(product);
}

DIFFMTL_INLINE_LOOP Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_sqrt_ps(kAllLanes, (__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Floats)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// (a0, b0, a1, b1) and (a2, b2, a3, b3) of every four lanes.

DIFFMTL_INLINE_LOOP Floats interleave_lower(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_unpacklo_ps(kAllLanes, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_unpacklo_ps((__m256)a, (__m256)b);
#else
  return Floats{a[0], b[0], a[1], b[1]};
#endif
}

DIFFMTL_INLINE_LOOP Floats interleave_upper(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_unpackhi_ps(kAllLanes, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#else
  return Floats{a[2], b[2], a[3], b[3]};
#endif
}

// The sum of the lanes, by halves: a tree, which compilers do not make of a loop.
template <class Compute, int kCount>
struct Halves {
  typedef Compute Half __attribute__((vector_size(kCount / 2 * sizeof(Compute))));
  Half low, high;
};

template <class Compute, int kCount = kLanes<Compute>, class V>
DIFFMTL_INLINE_LOOP double sum_lanes(V v) {
  if constexpr (kCount == 2) {
    return static_cast<double>(v[0] + v[1]);
  } else {
    const auto halves = bit_cast<Halves<Compute, kCount>>(v);
    return sum_lanes<Compute, kCount / 2>(halves.low + halves.high);
  }
}

}  // namespace
}  // namespace diffmtl::cpu
