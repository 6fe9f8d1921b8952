// The noise of the forward process: division into blocks.
#include "noise.hpp"

#include "memory.hpp"
#include "samples.hpp"

namespace diffmtl::cpu {

void add_noise(const Handle& x0, const Handle& noise, const Handle& alpha, const Handle& sigma, Int samples, Int size,
               std::uintptr_t out, int threads) {
  const Numbers image(x0), alphas(alpha), sigmas(sigma);
  const Elements drawn(noise);
  const auto mix = kernels().mix[image.dtype][drawn.dtype()][image.dtype];
  void* const noisy = reinterpret_cast<void*>(out);
  prefer_huge_pages(noisy, samples * size * bytes_of(image.dtype));
  for_blocks({samples, size}, 2 * bytes_of(image.dtype) + drawn.bytes(), threads, [&](Int, Int sample, Int begin, Int n) {
    Scratch scratch;
    mix(element(image, sample, begin), alphas[sample], drawn.at(sample, begin, n, scratch.first), sigmas[sample],
        advance(noisy, image.dtype, sample * size + begin), n);
  });
}

void philox_normal(const Handle& seed, Int samples, Int size, std::uintptr_t out, int threads) {
  const Elements noise(seed);
  prefer_huge_pages(reinterpret_cast<void*>(out), samples * size * bytes_of(kFloat32));
  for_blocks({samples, size}, noise.bytes(), threads, [&](Int, Int sample, Int begin, Int n) {
    noise.at(sample, begin, n, reinterpret_cast<float*>(out) + sample * size + begin);
  });
}

void box_muller(std::uintptr_t radius, std::uintptr_t turn, Int n, std::uintptr_t cosine, std::uintptr_t sine) {
  kernels().box_muller(reinterpret_cast<const std::uint32_t*>(radius), reinterpret_cast<const std::uint32_t*>(turn),
                       reinterpret_cast<float*>(cosine), reinterpret_cast<float*>(sine), n);
}

}  // namespace diffmtl::cpu
