// StoredColumns: a panel of rows of a stored weight, decoded into vectors that hold one value of each row.
//
// y = x W^T is multiplied from the rows of W as they are stored: a vector must hold value k of several rows. 16 bytes
// of each row are read, transposed as 32-bit words, and each word is taken apart. Here are the types whose values are
// floats; cpu_stored_quantised.hpp has the others.
#pragma once

#include <calm/backend/cpu_stored_rows.hpp>

#include <bit>

namespace calm::inline CALM_ABI::cpu {

/// StoredColumns<Stored>: `depth` values of each row lie in `bytes`. decode() calls use(k, the values of each part) for
/// k from 0 to depth - 1, in this order, and rows.ask() of all bytes in small steps (AskingAhead).
template <class Stored>
struct StoredColumns;

template <>
struct StoredColumns<double> {
  static constexpr Index depth = 2, bytes = 16;
  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    rows.template ask<bytes>(0);
    const auto words = rows.words(0);
    for (int t = 0; t < 2; ++t)
      use(t, map_words<Rows>(words, 2 * t, [&](int p, Words low) {
            const Words high = words.word(p, 2 * t + 1);
            Floats values{};
            for (Index i = 0; i < row_lanes; ++i)
              values[i] = static_cast<float>(std::bit_cast<double>(std::uint64_t{high[i]} << 32 | low[i]));
            return values;
          }));
  }
};

template <>
struct StoredColumns<float> {
  static constexpr Index depth = 4, bytes = 16;
  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    rows.template ask<bytes>(0);
    const auto words = rows.words(0);
#pragma GCC unroll 16
    for (int t = 0; t < 4; ++t) use(t, map_words<Rows>(words, t, [](int, Words w) { return as_floats(w); }));
  }
};

template <>
struct StoredColumns<bf16> {
  static constexpr Index depth = 8, bytes = 16;
  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    rows.template ask<bytes>(0);
    const auto words = rows.words(0);
#pragma GCC unroll 16
    for (int t = 0; t < 4; ++t) {
      use(2 * t, map_words<Rows>(words, t, [](int, Words w) { return as_floats(w << 16); }));
      use(2 * t + 1, map_words<Rows>(words, t, [](int, Words w) { return as_floats(w & 0xFFFF0000U); }));
    }
  }
};

template <>
struct StoredColumns<f16> {
  static constexpr Index depth = 8, bytes = 16;
  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    rows.template ask<bytes>(0);
    const auto words = rows.words(0);
#pragma GCC unroll 16
    for (int t = 0; t < 4; ++t) {
      use(2 * t, map_words<Rows>(words, t, [](int, Words w) { return floats_of_f16(w); }));
      use(2 * t + 1, map_words<Rows>(words, t, [](int, Words w) { return floats_of_f16(w >> 16); }));
    }
  }
};

}  // namespace calm::inline CALM_ABI::cpu
