// philox.h: Philox4x32-10, random numbers that are a pure function of a key and a counter.
// From Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11).
// Owns: nothing.  Thread-safety: pure functions.
#pragma once

#include <array>
#include <cstdint>

namespace vmalloc {

using PhiloxCounter = std::array<std::uint32_t, 4>;
using PhiloxKey = std::array<std::uint32_t, 2>;

/// Four random words.
inline PhiloxCounter philox4x32(PhiloxCounter counter, PhiloxKey key) noexcept {
  constexpr int kNumRounds = 10;
  for (int round = 0; round < kNumRounds; ++round) {
    const std::uint64_t product_0 = std::uint64_t{counter[0]} * 0xD2511F53U;
    const std::uint64_t product_1 = std::uint64_t{counter[2]} * 0xCD9E8D57U;
    counter = {static_cast<std::uint32_t>(product_1 >> 32) ^ counter[1] ^ key[0],
               static_cast<std::uint32_t>(product_1),
               static_cast<std::uint32_t>(product_0 >> 32) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(product_0)};
    key[0] += 0x9E3779B9U;
    key[1] += 0xBB67AE85U;
  }
  return counter;
}

/// A number in [0, 1) with 53 random bits, for a request's seed, one of its choices and a position.
inline double philox_uniform(std::uint64_t seed, std::uint32_t choice,
                             std::uint32_t position) noexcept {
  const PhiloxCounter words =
      philox4x32({position, choice, 0, 0},
                 {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  const std::uint64_t bits = (std::uint64_t{words[0]} >> 5 << 26) + (words[1] >> 6);
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace vmalloc
