// The two 16-bit floating point types of weights and their conversion to and from f32.
//
// bf16 is the upper half of an f32; f16 is IEEE 754 binary16. Both round to nearest, ties to even.
#pragma once

#include <calm/core/config.hpp>

#include <bit>
#include <cstdint>

namespace calm::inline CALM_ABI {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline float to_float(bf16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

inline bf16 to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return {static_cast<std::uint16_t>((bits >> 16) | 0x40)};  // stays a NaN
  return {static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16)};
}

/// Without branches, so that compilers make vectors of it: of zero and subnormal numbers the exponent is made that of
/// 2^-14, which is then taken away.
inline float to_float(f16 x) {
  const std::uint32_t magnitude = x.bits & 0x7FFFU, shifted = magnitude << 13;
  const std::uint32_t is_small = 0U - static_cast<std::uint32_t>(magnitude < 0x0400U);
  const auto small = std::bit_cast<std::uint32_t>(std::bit_cast<float>(shifted + (113U << 23)) - 0x1p-14F);
  const std::uint32_t normal = (shifted + (112U << 23)) | (magnitude < 0x7C00U ? 0U : 0x7F800000U);
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000U) << 16;
  return std::bit_cast<float>(sign | (small & is_small) | (normal & ~is_small));
}

inline f16 to_f16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
  const float magnitude = std::bit_cast<float>(bits & 0x7FFFFFFFU);
  if (magnitude != magnitude) return {static_cast<std::uint16_t>(sign | 0x7E00U)};
  if (magnitude >= 65520.0F) return {static_cast<std::uint16_t>(sign | 0x7C00U)};
  if (magnitude < 0x1p-14F) {  // below the normal range: adding 0.5 lets the FPU round at 2^-24
    const auto rounded = std::bit_cast<std::uint32_t>(magnitude + 0.5F) - std::bit_cast<std::uint32_t>(0.5F);
    return {static_cast<std::uint16_t>(sign | rounded)};
  }
  const auto m = std::bit_cast<std::uint32_t>(magnitude);
  const std::uint32_t rounded = m + 0xFFFU + ((m >> 13) & 1U);
  return {static_cast<std::uint16_t>(sign | ((rounded >> 13) - (112U << 10)))};
}

}  // namespace calm::inline CALM_ABI
