// Registers of numbers: how they are read, written and added up. Local to the including file, as element_types.hpp is.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <utility>  // for index_sequence, which is a type alone

#include "element_types.hpp"

namespace diffmtl::cpu {
namespace {

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
DIFFMTL_SHARED void convert(const T* from, Int n, Compute* to) {
  Int c = 0;
  for (; c + kLanes<Compute> <= n; c += kLanes<Compute>) store<Compute>(to + c, load<Compute>(from + c));
  if (c == n) return;
  for (int i = 0; i < kLanes<Compute>; ++i) to[c + i] = c + i < n ? to_number(from[c + i]) : 0;
}

// The first n elements, zeros in the other lanes; any n > 0.
template <class Compute, class T>
DIFFMTL_INLINE_LOOP Vector<Compute> load_first(const T* p, Int n) {
  if (n >= kLanes<Compute>) return load<Compute>(p);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Compute, float>)
    return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#endif
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

// The elements themselves where they are of the computing type, or a copy, in `copy`.
template <class Compute, class T>
DIFFMTL_INLINE_LOOP const Compute* converted(const T* from, Int n, Compute* copy) {
  if constexpr (std::is_same_v<T, Compute>) {
    return from;
  } else {
    convert(from, n, copy);
    return copy;
  }
}

// And back: n elements of whole registers, rounded.
template <class T, class Compute>
DIFFMTL_SHARED void convert_back(const Compute* from, Int n, T* to) {
  Int c = 0;
  for (; c + kLanes<Compute> <= n; c += kLanes<Compute>) store<Compute>(to + c, load<Compute>(from + c));
  if (c < n) store_first<Compute>(to + c, load<Compute>(from + c), n - c);
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

// a and b become a0, b0, a1, b1, .. of the first half of their lanes, and of the second. (GCC knows Clang's builtin from
// version 12 on.)
template <class Compute, std::size_t... kLane>
DIFFMTL_INLINE_LOOP void interleave(Vector<Compute>& a, Vector<Compute>& b, std::index_sequence<kLane...>) {
  constexpr std::size_t kCount = sizeof...(kLane);
#if defined(__clang__)
  const Vector<Compute> low = __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kCount)...);
  const Vector<Compute> high = __builtin_shufflevector(a, b, (kCount / 2 + kLane / 2 + kLane % 2 * kCount)...);
#else
  using Index = std::conditional_t<std::is_same_v<Compute, float>, std::int32_t, std::int64_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  const Vector<Compute> low = __builtin_shuffle(a, b, Indices{(kLane / 2 + kLane % 2 * kCount)...});
  const Vector<Compute> high = __builtin_shuffle(a, b, Indices{(kCount / 2 + kLane / 2 + kLane % 2 * kCount)...});
#endif
  a = low;
  b = high;
}

// Rows become columns: interleaving the first half of them with the second moves one bit of a row's number into the
// lane's, so as many rounds as it has bits move all.
template <class Compute>
DIFFMTL_INLINE_LOOP void transpose(Vector<Compute> (&rows)[kLanes<Compute>]) {
  constexpr int kCount = kLanes<Compute>, kHalf = kCount / 2;
  for (int round = 1; round < kCount; round *= 2) {
    Vector<Compute> next[kCount];
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = rows[i];
      next[2 * i + 1] = rows[i + kHalf];
      interleave<Compute>(next[2 * i], next[2 * i + 1], std::make_index_sequence<kCount>());
    }
    for (int i = 0; i < kCount; ++i) rows[i] = next[i];
  }
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
