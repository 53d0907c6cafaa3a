// The block-quantised types of GGUF: how a block of values lies in bytes, and its conversion to and from f32.
//
// A block is a few bytes of scale and then a small integer q for each of its 32 or 256 values:
//   q8_0 q4_0 q5_0   x = d q            one f16 scale d
//   q4_1 q5_1        x = d q + m        and an f16 minimum m
//   q4_k q5_k        x = d s q - e m    8 groups of 32 values, each with 6-bit integers s and m; d and e are f16
//   q6_k             x = d s q          16 groups of 16 values, each with an 8-bit integer s
// Source: ggml-quants.c of github.com/ggml-org/ggml; the values and the encoded bytes are those of its Python twin
// (gguf.quants), bit for bit. d s q has at most 24 significant bits, so that no rounding, and no fused multiply-add,
// comes before the one subtraction or addition. Not here: encoding to q4_k, q5_k, q6_k, which searches for its scales.
#pragma once

#include <calm/core/config.hpp>
#include <calm/tensor/half.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace calm::inline CALM_ABI {

namespace quantised {

inline unsigned byte_at(const std::byte* block, int place) { return std::to_integer<unsigned>(block[place]); }

[[gnu::always_inline]] inline float read_f16(const std::byte* source) {
  f16 value;
  std::memcpy(&value, source, 2);
  return to_float(value);
}

inline void write_f16(float x, std::byte* target) {
  const f16 value = to_f16(x);
  std::memcpy(target, &value, 2);
}

/// a * b, rounded: behind a call, so that no compiler fuses it with the addition that follows.
[[gnu::noinline]] inline float product(float a, float b) { return a * b; }

/// The whole part of x in [0, highest]; 0 for a NaN.
inline unsigned level(float x, float highest) { return x >= 0 ? static_cast<unsigned>(std::min(x, highest)) : 0U; }

inline float inverse_or_zero(float d) { return d == 0 ? 0.0F : 1 / d; }

/// The first value of the largest magnitude, with its sign.
inline float largest(const float* x, int count) {
  return *std::max_element(x, x + count, [](float a, float b) { return std::abs(a) < std::abs(b); });
}

}  // namespace quantised

/// x = d q with q in [-127, 127]: d, then 32 bytes.
struct Q8_0 {
  static constexpr Index values = 32, bytes = 34;

  static void decode(const std::byte* block, float* __restrict x) {
    const float d = quantised::read_f16(block);
    for (int i = 0; i < values; ++i) x[i] = d * static_cast<float>(static_cast<std::int8_t>(block[2 + i]));
  }

  static void encode(const float* x, std::byte* block) {
    const float d = std::abs(quantised::largest(x, values)) / 127;
    const float scale = quantised::inverse_or_zero(d);
    quantised::write_f16(d, block);
    for (int i = 0; i < values; ++i) {
      const float q = std::round(x[i] * scale);
      const bool fits = std::abs(q) <= 127;  // false for a NaN
      block[2 + i] = static_cast<std::byte>(fits ? static_cast<int>(q) : 0);
    }
  }
};

/// q4_0, q4_1, q5_0, q5_1. Bits: of q. With a minimum q counts from it, else from -2^(Bits - 1) in steps of d.
///
/// d, m where there is one; for 5 bits the highest bits of all values in 4 bytes; then the low 4 bits, the first half
/// of the values in the lower half of each byte.
template <int Bits, bool HasMinimum>
struct QuantisedBlock32 {
  static constexpr Index values = 32, bytes = 2 + (HasMinimum ? 2 : 0) + (Bits == 5 ? 4 : 0) + 16;

  static void decode(const std::byte* block, float* __restrict x) {
    const float d = quantised::read_f16(block);
    float minimum = 0;
    if constexpr (HasMinimum) minimum = quantised::read_f16(block + 2);
    std::array<unsigned, Bits == 5 ? 32 : 0> fifth;  // bits, as what they are worth
    if constexpr (Bits == 5) {
      std::uint32_t high;
      std::memcpy(&high, block + high_place, 4);
      for (unsigned i = 0; i < 32; ++i) fifth[i] = ((high >> i) & 1U) << 4;
    }
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 16; ++i) {
        unsigned q = (quantised::byte_at(block, low_place + i) >> (4 * half)) & 15U;
        if constexpr (Bits == 5) q |= fifth[static_cast<std::size_t>(16 * half + i)];
        if constexpr (HasMinimum) x[16 * half + i] = d * static_cast<float>(q) + minimum;
        else x[16 * half + i] = d * static_cast<float>(static_cast<int>(q) - middle);
      }
    }
  }

  static void encode(const float* x, std::byte* block) {
    float d, origin = 0, half = static_cast<float>(middle) + 0.5F;
    if constexpr (HasMinimum) {
      origin = *std::min_element(x, x + 32);
      d = (*std::max_element(x, x + 32) - origin) / static_cast<float>(2 * middle - 1);
      half = 0.5F;
      quantised::write_f16(origin, block + 2);
    } else {
      d = quantised::largest(x, 32) / static_cast<float>(-middle);
    }
    quantised::write_f16(d, block);
    const float scale = quantised::inverse_or_zero(d);
    std::uint32_t high = 0;
    std::array<unsigned, 32> q;
    for (unsigned i = 0; i < 32; ++i) {
      const float shifted = HasMinimum ? x[i] - origin : x[i];
      q[i] = quantised::level(quantised::product(shifted, scale) + half, static_cast<float>(2 * middle - 1));
      high |= (q[i] >> 4) << i;
    }
    if constexpr (Bits == 5) std::memcpy(block + high_place, &high, 4);
    for (unsigned i = 0; i < 16; ++i)
      block[low_place + static_cast<int>(i)] = static_cast<std::byte>((q[i] & 15U) | ((q[i + 16] & 15U) << 4));
  }

 private:
  static constexpr int middle = 1 << (Bits - 1), high_place = HasMinimum ? 4 : 2, low_place = bytes - 16;
};

using Q4_0 = QuantisedBlock32<4, false>;
using Q4_1 = QuantisedBlock32<4, true>;
using Q5_0 = QuantisedBlock32<5, false>;
using Q5_1 = QuantisedBlock32<5, true>;

/// q4_k and q5_k: d, e; 12 bytes with the 6-bit s and m of 8 groups; for 5 bits 32 bytes with the highest bits (bit g
/// of byte i: value i of group g); then the low 4 bits, two groups in each 32 bytes.
template <int Bits>
struct QuantisedBlock256 {
  static constexpr Index values = 256, bytes = 2 + 2 + 12 + (Bits == 5 ? 32 : 0) + 128;

  static void decode(const std::byte* block, float* __restrict x) {
    const float d = quantised::read_f16(block), e = quantised::read_f16(block + 2);
    for (int group = 0; group < 8; ++group) {
      const auto [s, m] = scale_and_minimum(block + 4, group);
      const float step = d * static_cast<float>(s), minimum = e * static_cast<float>(m);
      const int low_place = bytes - 128 + group / 2 * 32;
      for (int i = 0; i < 32; ++i) {
        unsigned q = (quantised::byte_at(block, low_place + i) >> (group % 2 * 4)) & 15U;
        if constexpr (Bits == 5) q |= ((quantised::byte_at(block, 16 + i) >> group) & 1U) << 4;
        x[group * 32 + i] = step * static_cast<float>(q) - minimum;
      }
    }
  }

 private:
  /// Groups 0 to 3 keep their six bits in bytes 0 to 3 (s) and 4 to 7 (m). Groups 4 to 7 have their low four bits in
  /// bytes 8 to 11, s in the lower half, and their high two bits atop those of the first four groups.
  static std::pair<unsigned, unsigned> scale_and_minimum(const std::byte* packed, int group) {
    const int i = group % 4;
    const unsigned first = quantised::byte_at(packed, i), second = quantised::byte_at(packed, 4 + i);
    if (group < 4) return {first & 63U, second & 63U};
    const unsigned low = quantised::byte_at(packed, 8 + i);
    return {(low & 15U) | ((first >> 2) & 48U), (low >> 4) | ((second >> 2) & 48U)};
  }
};

using Q4_K = QuantisedBlock256<4>;
using Q5_K = QuantisedBlock256<5>;

/// q6_k: the low 4 bits in 128 bytes, the high 2 bits in 64, 16 signed bytes s, d. q counts from -32. Each half of the
/// block has 64 bytes of low and 32 of high bits; its 128 values are four runs of 32.
struct Q6_K {
  static constexpr Index values = 256, bytes = 128 + 64 + 16 + 2;

  static void decode(const std::byte* block, float* __restrict x) {
    const float d = quantised::read_f16(block + 208);
    for (int group = 0; group < 16; ++group) {
      const int half = group / 8, run = group % 8 / 2, quarter = group % 2;
      const float step = d * static_cast<float>(static_cast<std::int8_t>(block[192 + group]));
      const std::byte *low = block + half * 64 + run % 2 * 32 + quarter * 16,
                      *high = block + 128 + half * 32 + quarter * 16;
      for (int i = 0; i < 16; ++i) {
        const unsigned q = ((quantised::byte_at(low, i) >> (run / 2 * 4)) & 15U) |
                           (((quantised::byte_at(high, i) >> (run * 2)) & 3U) << 4);
        x[16 * group + i] = step * static_cast<float>(static_cast<int>(q) - 32);
      }
    }
  }
};

/// A type whose values are stored in blocks.
template <class T>
concept BlockQuantised = requires(const std::byte* block, float* x) {
  { T::values } -> std::convertible_to<Index>;
  { T::bytes } -> std::convertible_to<Index>;
  T::decode(block, x);
};

/// A type of blocks that calm can also make.
template <class T>
concept BlockEncodable = BlockQuantised<T> && requires(const float* x, std::byte* block) {
  T::encode(x, block);
};

}  // namespace calm::inline CALM_ABI
