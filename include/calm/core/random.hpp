// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
//
// A number is a pure function of (seed, stream, counter): a run that is resumed needs only its step, threads share
// nothing, and every purpose takes a stream of its own. Not for cryptography.
#pragma once

#include <calm/core/config.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace calm::inline CALM_ABI {

/// One block of four numbers of Philox4x32-10.
constexpr std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                                  std::array<std::uint32_t, 2> key) {
  constexpr std::uint64_t multiplier_0 = 0xD2511F53, multiplier_1 = 0xCD9E8D57;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product_0 = multiplier_0 * counter[0], product_1 = multiplier_1 * counter[2];
    counter = {static_cast<std::uint32_t>(product_1 >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(product_1),
               static_cast<std::uint32_t>(product_0 >> 32) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(product_0)};
    key = {key[0] + 0x9E3779B9U, key[1] + 0xBB67AE85U};
  }
  return counter;
}

/// A sequence of random numbers, fixed by its seed and stream. Models UniformRandomBitGenerator.
class Random {
 public:
  using result_type = std::uint32_t;

  /// `stream` tells the purposes of one seed apart (a parameter's number, a training step, a prompt).
  explicit Random(std::uint64_t seed, std::uint64_t stream = 0) : seed_(seed), stream_(stream) {}

  static constexpr result_type min() { return 0; }
  static constexpr result_type max() { return 0xFFFFFFFFU; }

  result_type operator()() {
    if (position_ == 4) {
      block_ = philox4x32({low(counter_), high(counter_), low(stream_), high(stream_)}, {low(seed_), high(seed_)});
      ++counter_;
      position_ = 0;
    }
    return block_[position_++];
  }

  /// Uniform in [0, 1), with 24 random bits: the same value in float and double.
  double uniform() { return static_cast<double>((*this)() >> 8) * 0x1p-24; }

  /// Uniform in [0, bound), for 0 < bound < 2^32 (Lemire's multiplication; its bias is below bound / 2^32).
  Index below(Index bound) {
    return static_cast<Index>((static_cast<std::uint64_t>((*this)()) * static_cast<std::uint64_t>(bound)) >> 32);
  }

  /// Standard normal (Box-Muller).
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  }

 private:
  static constexpr std::uint32_t low(std::uint64_t x) { return static_cast<std::uint32_t>(x); }
  static constexpr std::uint32_t high(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); }

  std::uint64_t seed_, stream_, counter_ = 0;
  std::array<std::uint32_t, 4> block_{};
  std::size_t position_ = 4;
};

}  // namespace calm::inline CALM_ABI
