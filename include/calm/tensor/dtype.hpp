// The storage types of weights and their conversion to and from f32.
//
// bf16 is the upper half of an f32; f16 is IEEE 754 binary16. Both round to nearest, ties to even. The block-quantised
// types of GGUF are not here.
#pragma once

#include <calm/core/error.hpp>

#include <bit>
#include <cstring>
#include <string_view>

namespace calm::inline CALM_ABI {

enum class DType : std::uint8_t { f64, f32, bf16, f16 };

constexpr Index size_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
  }
  return 0;
}

constexpr std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return "f64";
    case DType::f32: return "f32";
    case DType::bf16: return "bf16";
    case DType::f16: return "f16";
  }
  return "";
}

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

inline float to_float(f16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000U) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 0x1FU, fraction = x.bits & 0x3FFU;
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000U | (fraction << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24F;  // zero and subnormal numbers
  return sign != 0 ? -magnitude : magnitude;
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

/// The DType that holds values of type T.
template <class T>
constexpr DType dtype_of = [] {
  if constexpr (std::is_same_v<T, double>) return DType::f64;
  else if constexpr (std::is_same_v<T, float>) return DType::f32;
  else if constexpr (std::is_same_v<T, bf16>) return DType::bf16;
  else return DType::f16;
}();

/// Reads `count` stored values as Scalar. The source need not be aligned.
template <class Scalar>
void decode(DType dtype, const std::byte* source, Index count, Scalar* target) {
  const auto convert = [&]<class Stored>(Stored) {
    for (Index i = 0; i < count; ++i) {
      Stored value;
      std::memcpy(&value, source + i * static_cast<Index>(sizeof(Stored)), sizeof(Stored));
      if constexpr (std::is_arithmetic_v<Stored>) target[i] = static_cast<Scalar>(value);
      else target[i] = static_cast<Scalar>(to_float(value));
    }
  };
  switch (dtype) {
    case DType::f64: return convert(double{});
    case DType::f32: return convert(float{});
    case DType::bf16: return convert(bf16{});
    case DType::f16: return convert(f16{});
  }
}

/// Writes `count` values of type Scalar in the stored type, rounding to nearest.
template <class Scalar>
void encode(DType dtype, const Scalar* source, Index count, std::byte* target) {
  const auto convert = [&](auto from_scalar) {
    using Stored = decltype(from_scalar(Scalar{}));
    for (Index i = 0; i < count; ++i) {
      const Stored value = from_scalar(source[i]);
      std::memcpy(target + i * static_cast<Index>(sizeof(Stored)), &value, sizeof(Stored));
    }
  };
  switch (dtype) {
    case DType::f64: return convert([](Scalar x) { return static_cast<double>(x); });
    case DType::f32: return convert([](Scalar x) { return static_cast<float>(x); });
    case DType::bf16: return convert([](Scalar x) { return to_bf16(static_cast<float>(x)); });
    case DType::f16: return convert([](Scalar x) { return to_f16(static_cast<float>(x)); });
  }
}

}  // namespace calm::inline CALM_ABI
