// The storage types of weights as a run-time tag, and their conversion to and from the types that calm computes in.
//
// The tag is resolved once a call, never per value. A new storage type is a line in DType, visit_dtype and name_of, and
// its layout in half.hpp or quantised.hpp.
#pragma once

#include <calm/core/error.hpp>
#include <calm/tensor/half.hpp>
#include <calm/tensor/quantised.hpp>

#include <array>
#include <cstring>
#include <string_view>
#include <type_traits>

namespace calm::inline CALM_ABI {

enum class DType : std::uint8_t { f64, f32, bf16, f16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k };

inline constexpr std::array all_dtypes{DType::f64,  DType::f32,  DType::bf16, DType::f16,  DType::q8_0, DType::q4_0,
                                       DType::q4_1, DType::q5_0, DType::q5_1, DType::q4_k, DType::q5_k, DType::q6_k};

constexpr std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return "f64";
    case DType::f32: return "f32";
    case DType::bf16: return "bf16";
    case DType::f16: return "f16";
    case DType::q8_0: return "q8_0";
    case DType::q4_0: return "q4_0";
    case DType::q4_1: return "q4_1";
    case DType::q5_0: return "q5_0";
    case DType::q5_1: return "q5_1";
    case DType::q4_k: return "q4_k";
    case DType::q5_k: return "q5_k";
    case DType::q6_k: return "q6_k";
  }
  return "";
}

/// Calls function(T{}) with the type that the tag stands for.
template <class Function>
constexpr auto visit_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::f64: return function(double{});
    case DType::f32: return function(float{});
    case DType::bf16: return function(bf16{});
    case DType::f16: return function(f16{});
    case DType::q8_0: return function(Q8_0{});
    case DType::q4_0: return function(Q4_0{});
    case DType::q4_1: return function(Q4_1{});
    case DType::q5_0: return function(Q5_0{});
    case DType::q5_1: return function(Q5_1{});
    case DType::q4_k: return function(Q4_K{});
    case DType::q5_k: return function(Q5_K{});
    case DType::q6_k: return function(Q6_K{});
  }
  fail<ConfigError>({"unknown storage type ", static_cast<int>(dtype)});
}

/// The smallest piece in which values are stored: one value, or a block that shares its scales.
struct StoredBlock {
  Index values;
  Index bytes;
};

constexpr StoredBlock block_of(DType dtype) {
  return visit_dtype(dtype, []<class Stored>(Stored) -> StoredBlock {
    if constexpr (BlockQuantised<Stored>) return {Stored::values, Stored::bytes};
    else return {1, sizeof(Stored)};
  });
}

/// The bytes that `count` values take. Throws ShapeError where they are not whole blocks.
constexpr Index bytes_of(DType dtype, Index count) {
  const StoredBlock block = block_of(dtype);
  if (count % block.values != 0) [[unlikely]]
    fail<ShapeError>({count, " values of type ", name_of(dtype), " are not whole blocks of ", block.values});
  return count / block.values * block.bytes;
}

/// Whether encode() can make values of this type.
constexpr bool is_encodable(DType dtype) {
  return visit_dtype(dtype, []<class Stored>(Stored) { return !BlockQuantised<Stored> || BlockEncodable<Stored>; });
}

/// The DType that holds values of type T.
template <class T>
constexpr DType dtype_of = [] {
  if constexpr (std::is_same_v<T, double>) return DType::f64;
  else if constexpr (std::is_same_v<T, float>) return DType::f32;
  else if constexpr (std::is_same_v<T, bf16>) return DType::bf16;
  else return DType::f16;
}();

/// Reads `count` stored values as Scalar. The source need not be aligned; it must not overlap the target. Throws
/// ShapeError where the values are not whole blocks.
template <class Scalar>
void decode(DType dtype, const std::byte* source, Index count, Scalar* target) {
  bytes_of(dtype, count);
  visit_dtype(dtype, [&]<class Stored>(Stored) {
    if constexpr (BlockQuantised<Stored>) {
      for (; count > 0; count -= Stored::values, source += Stored::bytes, target += Stored::values) {
        if constexpr (std::is_same_v<Scalar, float>) {
          Stored::decode(source, target);
        } else {
          std::array<float, Stored::values> block;
          Stored::decode(source, block.data());
          for (std::size_t i = 0; i < block.size(); ++i) target[i] = static_cast<Scalar>(block[i]);
        }
      }
    } else {
      for (Index i = 0; i < count; ++i) {
        Stored value;
        std::memcpy(&value, source + i * static_cast<Index>(sizeof(Stored)), sizeof(Stored));
        if constexpr (std::is_arithmetic_v<Stored>) target[i] = static_cast<Scalar>(value);
        else target[i] = static_cast<Scalar>(to_float(value));
      }
    }
  });
}

/// Writes `count` values of type Scalar in the stored type, rounding to nearest. Throws ShapeError where the values are
/// not whole blocks, ConfigError for q4_k, q5_k and q6_k, which calm only reads.
template <class Scalar>
void encode(DType dtype, const Scalar* source, Index count, std::byte* target) {
  bytes_of(dtype, count);
  visit_dtype(dtype, [&]<class Stored>(Stored) {
    if constexpr (BlockEncodable<Stored>) {
      std::array<float, Stored::values> block;
      for (; count > 0; count -= Stored::values, source += Stored::values, target += Stored::bytes) {
        for (std::size_t i = 0; i < block.size(); ++i) block[i] = static_cast<float>(source[i]);
        Stored::encode(block.data(), target);
      }
    } else if constexpr (BlockQuantised<Stored>) {
      fail<ConfigError>({"values of type ", name_of(dtype),
                         " are read, but cannot be made; of the quantised types q8_0, q4_0, q4_1, q5_0, q5_1 can"});
    } else {
      for (Index i = 0; i < count; ++i) {
        Stored value;
        if constexpr (std::is_same_v<Stored, bf16>) value = to_bf16(static_cast<float>(source[i]));
        else if constexpr (std::is_same_v<Stored, f16>) value = to_f16(static_cast<float>(source[i]));
        else value = static_cast<Stored>(source[i]);
        std::memcpy(target + i * static_cast<Index>(sizeof(Stored)), &value, sizeof(Stored));
      }
    }
  });
}

}  // namespace calm::inline CALM_ABI
