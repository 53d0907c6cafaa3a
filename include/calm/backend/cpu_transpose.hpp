// Transposing in registers: four by four values of any type, 32-bit values in whole vectors.
#pragma once

#include <calm/backend/cpu_vector.hpp>
#include <calm/tensor/view.hpp>

#include <cstdint>
#include <cstring>
#include <utility>

namespace calm::inline CALM_ABI::cpu {

using Floats = Vector<float>;
using Words = Vector<std::uint32_t>;
using Integers = Vector<std::int32_t>;
inline constexpr Index row_lanes = lanes_of<float>;

/// target [4, 4] = source^T; rows lie `from` and `to` values apart.
template <class S>
void transpose_four(const S* source, Index from, S* target, Index to) {
  typedef S Four __attribute__((vector_size(4 * sizeof(S))));  // NOLINT(modernize-use-using)
  // At any address; by reference, since wide vectors are passed by value only where the machine has them.
  const auto read = [&](Index i, Four& values) { std::memcpy(&values, source + i * from, sizeof(values)); };
  Four a, b, c, d;
  read(0, a), read(1, b), read(2, c), read(3, d);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const auto write = [&](Index i, const Four& values) { std::memcpy(target + i * to, &values, sizeof(values)); };
  write(0, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  write(1, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  write(2, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
  write(3, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}

/// A vector of the four values of the pattern in each 128 bits; from 4 on they are those of b.
template <int... Pattern, std::size_t... I>
[[gnu::always_inline]] inline Words shuffle_quarters(Words a, Words b, std::integer_sequence<int, Pattern...>,
                                                     std::index_sequence<I...>) {
  constexpr int pattern[] = {Pattern...}, beyond = static_cast<int>(row_lanes) - 4;
  return __builtin_shufflevector(
      a, b, (pattern[I % 4] + static_cast<int>(I / 4 * 4) + (pattern[I % 4] >= 4 ? beyond : 0))...);
}
template <int... Pattern>
[[gnu::always_inline]] inline Words shuffle_quarters(Words a, Words b) {
  return shuffle_quarters(a, b, std::integer_sequence<int, Pattern...>{},
                          std::make_index_sequence<static_cast<std::size_t>(row_lanes)>{});
}

/// Words 0 to 3 of as many rows as a vector has lanes.
struct FourWords {
  Words word[4];
};

/// 16 bytes of each row, from `first` on.
template <Index Lanes = row_lanes>
[[gnu::always_inline]] inline FourWords transposed_words(const std::byte* first, Index row_bytes) {
  typedef std::uint32_t Quarter __attribute__((vector_size(16)));  // NOLINT(modernize-use-using)
  const auto quarter = [=](Index row) {
    Quarter words;
    std::memcpy(&words, first + row * row_bytes, sizeof(words));
    return words;
  };
  const auto rows = [=](Index z) {  // rows z, z + 4, ..., a quarter each
    if constexpr (Lanes == 4) {
      return Words(quarter(z));
    } else if constexpr (Lanes == 8) {
      return Words(__builtin_shufflevector(quarter(z), quarter(z + 4), 0, 1, 2, 3, 4, 5, 6, 7));
    } else {
      const auto low = __builtin_shufflevector(quarter(z), quarter(z + 4), 0, 1, 2, 3, 4, 5, 6, 7);
      const auto high = __builtin_shufflevector(quarter(z + 8), quarter(z + 12), 0, 1, 2, 3, 4, 5, 6, 7);
      return Words(__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    }
  };
  const Words a = rows(0), b = rows(1), c = rows(2), d = rows(3);
  const Words ab = shuffle_quarters<0, 4, 1, 5>(a, b), ab_high = shuffle_quarters<2, 6, 3, 7>(a, b);
  const Words cd = shuffle_quarters<0, 4, 1, 5>(c, d), cd_high = shuffle_quarters<2, 6, 3, 7>(c, d);
  return {{shuffle_quarters<0, 1, 4, 5>(ab, cd), shuffle_quarters<2, 3, 6, 7>(ab, cd),
           shuffle_quarters<0, 1, 4, 5>(ab_high, cd_high), shuffle_quarters<2, 3, 6, 7>(ab_high, cd_high)}};
}

/// panel [in, Width] = rows [first, first + Width) of w [out, in], transposed; rows that w lacks are zeros.
template <Index Width, class S>
void transpose_rows(MatrixView<const S> w, Index first, S* panel) {
  constexpr bool in_words = sizeof(S) == 4 && Width % row_lanes == 0;
  constexpr Index rows = in_words ? row_lanes : 4, step = 4;
  for (Index j = 0; j < Width; j += rows) {
    const Index row = first + j;
    Index k = 0;
    if (row + rows <= w.rows) {
      for (; k + step <= w.cols; k += step) {
        if constexpr (in_words) {
          const FourWords words = transposed_words(reinterpret_cast<const std::byte*>(w.row(row) + k),
                                                   w.stride * static_cast<Index>(sizeof(S)));
          for (Index i = 0; i < step; ++i) std::memcpy(panel + (k + i) * Width + j, &words.word[i], vector_bytes);
        } else {
          transpose_four(w.row(row) + k, w.stride, panel + k * Width + j, Width);
        }
      }
    }
    for (; k < w.cols; ++k)
      for (Index i = 0; i < rows; ++i) panel[k * Width + j + i] = row + i < w.rows ? w(row + i, k) : S{};
  }
}

}  // namespace calm::inline CALM_ABI::cpu
