// The noise of the forward process, on memory that Python has checked.
#pragma once
#include "tensors.hpp"

namespace diffmtl::cpu {

// x0: [samples, size]; noise: likewise, or a seed (kSeed); alpha and sigma: [samples]; out: in the type of x0.
void add_noise(const Handle& x0, const Handle& noise, const Handle& alpha, const Handle& sigma, Int samples, Int size,
               std::uintptr_t out, int threads);

// The noise that a seed stands for, float32 [samples, size].
void philox_normal(const Handle& seed, Int samples, Int size, std::uintptr_t out, int threads);

// Normals of given words, n a multiple of 16. For the tests.
void box_muller(std::uintptr_t radius, std::uintptr_t turn, Int n, std::uintptr_t cosine, std::uintptr_t sine);

}  // namespace diffmtl::cpu
