// StoredColumns: a panel of rows of a stored weight, decoded into vectors that hold one value of each row.
//
// y = x W^T is multiplied from the rows of W as they are stored: a vector must hold value k of several rows. 16 bytes
// of each row are read, transposed as 32-bit words, and each word is taken apart. What a vector then holds has the bits
// that decode() (dtype.hpp) gives: the products of scales and small integers are exact, in any order, and with scales
// that are divided by powers of two; one rounding follows where there is a minimum.
//
// The bytes come from a source: the rows as they lie in the file (StoredRows), or a copy in which the same fields of
// all rows lie side by side, transposed once (InterleavedRows).
#pragma once

#include <calm/backend/cpu_product.hpp>

#include <bit>
#include <utility>

namespace calm::inline CALM_ABI::cpu {

using Floats = Vector<float>;
using Words = Vector<std::uint32_t>;
using Integers = Vector<std::int32_t>;
inline constexpr Index row_lanes = lanes_of<float>;

/// A vector for each part of one or two panels: a value of every row.
template <class T, int Parts>
struct PanelVectors {
  Vector<T> part[Parts];
};

/// of(p) for each part.
template <int Parts, class Of>
[[gnu::always_inline]] inline auto each_part(const Of& of) {
  PanelVectors<std::decay_t<decltype(of(0)[0])>, Parts> all;
#pragma GCC unroll 4
  for (int p = 0; p < Parts; ++p) all.part[p] = of(p);
  return all;
}

inline Floats as_floats(Words bits) { return reinterpret_cast<Floats>(bits); }
inline Floats to_floats(Words small) { return __builtin_convertvector(reinterpret_cast<Integers>(small), Floats); }

/// The four bits of each word from bit `shift` on, less Offset, as floats.
template <int Offset = 0>
[[gnu::always_inline]] inline Floats floats_of_nibbles(Words word, unsigned shift) {
#if defined(__AVX512F__)
  constexpr float o = Offset;  // a look into sixteen values, which heeds four bits alone
  constexpr Floats values{-o,    1 - o, 2 - o,  3 - o,  4 - o,  5 - o,  6 - o,  7 - o,
                          8 - o, 9 - o, 10 - o, 11 - o, 12 - o, 13 - o, 14 - o, 15 - o};
  return reinterpret_cast<Floats>(
      _mm512_permutexvar_ps(reinterpret_cast<__m512i>(word >> shift), reinterpret_cast<__m512>(values)));
#else
  return to_floats(((word >> shift) & 15U) - static_cast<unsigned>(Offset));
#endif
}

/// to_float() of the f16 in the lower half of each word.
inline Floats floats_of_f16(Words word) {
  const Words magnitude = (word & 0x7FFFU) << 13;
  const Words finite = reinterpret_cast<Words>(as_floats(magnitude) * 0x1p112F);  // moves the exponent; exact
  const Words value = magnitude >= 0x0F800000U ? magnitude | 0x7F800000U : finite;
  return as_floats(value | (word & 0x8000U) << 16);
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

/// Rows of a panel.
inline constexpr Index panel_rows = 2 * row_lanes;

/// 16 bytes of every row of a panel.
struct PanelWords {
  FourWords part[2];

  /// Word t of the rows of part p.
  [[gnu::always_inline]] Words word(int p, int t) const { return part[p].word[t]; }
};

/// of(part, word t of its rows) for each part of `rows`.
template <class Rows, class Of>
[[gnu::always_inline]] inline auto map_words(const auto& words, int t, const Of& of) {
  return each_part<Rows::parts>([&](int p) { return of(p, words.word(p, t)); });
}

/// A panel of rows as they are stored, row_bytes apart.
struct StoredRows {
  static constexpr int parts = 2;
  const std::byte* first;
  Index row_bytes;

  /// Bytes [place, place + 16).
  [[gnu::always_inline]] PanelWords words(Index place) const {
    const std::byte* at = first + place;
    return {{transposed_words(at, row_bytes), transposed_words(at + row_lanes * row_bytes, row_bytes)}};
  }
  /// Bytes [place, place + sizeof(T)) as a T, 16 or 32 bits wide.
  template <class T>
  [[gnu::always_inline]] PanelVectors<std::uint32_t, parts> numbers(Index place) const {
    std::uint32_t each[panel_rows];
    for (Index i = 0; i < panel_rows; ++i) {
      T value;
      std::memcpy(&value, first + place + i * row_bytes, sizeof(T));
      each[i] = value;
    }
    PanelVectors<std::uint32_t, parts> all;
    std::memcpy(&all, each, sizeof(each));
    return all;
  }
  /// The rows from byte `place` on.
  [[gnu::always_inline]] StoredRows from(Index place) const { return {first + place, row_bytes}; }
};

/// Panels with the fields of all their rows side by side: what lies at byte `place` of a row begins at byte
/// place * panel_rows of a panel, words as words() and numbers as numbers() give them. Two panels at a time keep more
/// sums going.
template <int Panels>
struct InterleavedRows {
  static constexpr int parts = 2 * Panels;
  const std::byte* first;
  Index panel_bytes;

  struct At {
    const std::byte* first;
    Index panel_bytes;

    /// Word t of the rows of part p.
    [[gnu::always_inline]] Words word(int p, int t) const {
      return *reinterpret_cast<const Words*>(first + p / 2 * panel_bytes + (p % 2 * 4 + t) * vector_bytes);
    }
  };
  [[gnu::always_inline]] At words(Index place) const { return {first + place * panel_rows, panel_bytes}; }

  template <class T>
  [[gnu::always_inline]] PanelVectors<std::uint32_t, parts> numbers(Index place) const {
    typedef T Narrow
        __attribute__((vector_size(row_lanes * sizeof(T)), aligned(1), may_alias));  // NOLINT(modernize-use-using)
    return each_part<parts>([&](int p) {
      const auto* numbers = reinterpret_cast<const Narrow*>(first + p / 2 * panel_bytes + place * panel_rows);
      return __builtin_convertvector(numbers[p % 2], Words);
    });
  }
  /// Asks the memory for as many bytes of each row, some way ahead: where much is computed between two lines the
  /// processor does not foresee them.
  [[gnu::always_inline]] void prefetch(Index bytes) const {
    constexpr Index ahead = 4096, cache_line = 64;
    for (int panel = 0; panel < Panels; ++panel)
      for (Index i = 0; i < bytes * panel_rows; i += cache_line)
        __builtin_prefetch(first + panel * panel_bytes + ahead + i);
  }
  [[gnu::always_inline]] InterleavedRows from(Index place) const { return {first + place * panel_rows, panel_bytes}; }
};

/// A source that writes all that it is asked for to where InterleavedRows reads it.
struct Interleaver {
  static constexpr int parts = StoredRows::parts;
  StoredRows rows;
  std::byte* target;

  PanelWords words(Index place) const {
    const PanelWords all = rows.words(place);
    std::memcpy(target + place * panel_rows, &all, sizeof(all));
    return all;
  }
  template <class T>
  PanelVectors<std::uint32_t, parts> numbers(Index place) const {
    for (Index i = 0; i < panel_rows; ++i)
      std::memcpy(target + place * panel_rows + i * static_cast<Index>(sizeof(T)),
                  rows.first + place + i * rows.row_bytes, sizeof(T));
    return rows.numbers<T>(place);
  }
};

/// StoredColumns<Stored>: `depth` values of each row lie in `bytes`. decode() calls use(k, the values of each part) for
/// k from 0 to depth - 1, in this order.
template <class Stored>
struct StoredColumns;

template <>
struct StoredColumns<double> {
  static constexpr Index depth = 2, bytes = 16;
  static constexpr int kept = 0;
  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
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
  static constexpr int kept = 0;
  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    const auto words = rows.words(0);
#pragma GCC unroll 16
    for (int t = 0; t < 4; ++t) use(t, map_words<Rows>(words, t, [](int, Words w) { return as_floats(w); }));
  }
};

template <>
struct StoredColumns<bf16> {
  static constexpr Index depth = 8, bytes = 16;
  static constexpr int kept = 0;
  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
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
  static constexpr int kept = 0;
  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    const auto words = rows.words(0);
#pragma GCC unroll 16
    for (int t = 0; t < 4; ++t) {
      use(2 * t, map_words<Rows>(words, t, [](int, Words w) { return floats_of_f16(w); }));
      use(2 * t + 1, map_words<Rows>(words, t, [](int, Words w) { return floats_of_f16(w >> 16); }));
    }
  }
};

/// Signed byte b of each word, times 2^24.
[[gnu::always_inline]] inline Floats high_byte(Words w, int b) { return to_floats((w << (24 - 8 * b)) & 0xFF000000U); }

template <>
struct StoredColumns<Q8_0> {
  static constexpr Index depth = Q8_0::values, bytes = Q8_0::bytes;
  static constexpr int kept = 1;
  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    const auto scales = rows.template numbers<std::uint16_t>(0);
    const auto d = each_part<Rows::parts>([&](int p) { return floats_of_f16(scales.part[p]) * 0x1p-24F; });
#pragma GCC unroll 2
    for (int quarter = 0; quarter < 2; ++quarter) {
      const auto words = rows.words(2 + 16 * quarter);
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k)
        use(16 * quarter + k,
            map_words<Rows>(words, k / 4, [&](int p, Words w) { return d.part[p] * high_byte(w, k % 4); }));
    }
  }
};

/// q4_0, q4_1, q5_0, q5_1.
template <int Bits, bool HasMinimum>
struct StoredColumns<QuantisedBlock32<Bits, HasMinimum>> {
  using Block = QuantisedBlock32<Bits, HasMinimum>;
  static constexpr Index depth = 32, bytes = Block::bytes;
  static constexpr int kept = 1 + (HasMinimum ? 1 : 0) + (Bits == 5 ? 1 : 0);
  static constexpr int offset = HasMinimum ? 0 : 1 << (Bits - 1);

  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    const auto scales = rows.template numbers<std::conditional_t<HasMinimum, std::uint32_t, std::uint16_t>>(0);
    const auto d = each_part<Rows::parts>([&](int p) { return floats_of_f16(scales.part[p]); });
    const auto minimum = each_part<Rows::parts>([&](int p) { return floats_of_f16(scales.part[p] >> 16); });
    auto high = each_part<Rows::parts>([](int) { return Words{}; });
    if constexpr (Bits == 5) high = rows.template numbers<std::uint32_t>(HasMinimum ? 4 : 2);
    const auto words = rows.words(bytes - 16);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int k = 16 * half + i;
        use(k, map_words<Rows>(words, i / 4, [&](int p, Words w) {
              const unsigned shift = 8 * static_cast<unsigned>(i % 4) + 4 * static_cast<unsigned>(half);
              Floats q;
              if constexpr (Bits == 4) {
                q = floats_of_nibbles<offset>(w, shift);
              } else {
                const Words fifth = (k >= 4 ? high.part[p] >> (k - 4) : high.part[p] << (4 - k)) & 16U;
                q = to_floats(((w >> shift & 15U) | fifth) - static_cast<unsigned>(offset));
              }
              if constexpr (HasMinimum) return multiply_add<float>(d.part[p], q, minimum.part[p]);
              else return d.part[p] * q;
            }));
      }
    }
  }
};

/// q4_k and q5_k. The first 16 bytes of a block are d, e and the 12 bytes of s and m.
template <int Bits>
struct StoredColumns<QuantisedBlock256<Bits>> {
  using Block = QuantisedBlock256<Bits>;
  static constexpr Index depth = Block::values, bytes = Block::bytes;
  static constexpr int kept = 2;

  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    const auto head = rows.words(0);
    const auto d = map_words<Rows>(head, 0, [](int, Words w) { return floats_of_f16(w); });
    const auto e = map_words<Rows>(head, 0, [](int, Words w) { return floats_of_f16(w >> 16); });
#pragma GCC unroll 16
    for (int group = 0; group < 8; ++group) {
      // As Block::scale_and_minimum: byte group % 4 of words 1 to 3.
      const unsigned shift = 8 * static_cast<unsigned>(group % 4);
      const auto six_bits = [&](int p, int word, unsigned half) {
        const Words own = head.word(p, word) >> shift, third = head.word(p, 3) >> shift;
        return to_floats(group < 4 ? own & 63U : ((third >> half) & 15U) | ((own >> 2) & 48U));
      };
      const auto step = each_part<Rows::parts>([&](int p) { return d.part[p] * six_bits(p, 1, 0); });
      const auto minimum = each_part<Rows::parts>([&](int p) { return e.part[p] * six_bits(p, 2, 4); });
#pragma GCC unroll 2
      for (int quarter = 0; quarter < 2; ++quarter) {
        const auto low = rows.words(bytes - 128 + group / 2 * 32 + quarter * 16);
        const auto high = rows.words(16 + quarter * 16);  // of q5_k
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          use(32 * group + 16 * quarter + i, map_words<Rows>(low, i / 4, [&](int p, Words w) {
                const unsigned byte = 8 * static_cast<unsigned>(i % 4);
                const unsigned nibble = byte + 4 * static_cast<unsigned>(group % 2);
                Floats q;
                if constexpr (Bits == 4) {
                  q = floats_of_nibbles(w, nibble);
                } else {
                  const Words fifth = ((high.word(p, i / 4) >> (byte + static_cast<unsigned>(group))) & 1U) << 4;
                  q = to_floats((w >> nibble & 15U) | fifth);
                }
                return multiply_add<float>(step.part[p], q, -minimum.part[p]);
              }));
      }
    }
  }
};

template <>
struct StoredColumns<Q6_K> {
  static constexpr Index depth = Q6_K::values, bytes = Q6_K::bytes;
  static constexpr int kept = 2;

  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    const auto scales = rows.template numbers<std::uint16_t>(208);
    const auto d = each_part<Rows::parts>([&](int p) { return floats_of_f16(scales.part[p]) * 0x1p-24F; });
    const auto s = rows.words(192);
#pragma GCC unroll 16
    for (int group = 0; group < 16; ++group) {  // of 16 values
      const int half = group / 8, run = group % 8 / 2, quarter = group % 2;
      const auto low = rows.words(half * 64 + run % 2 * 32 + quarter * 16),
                 high = rows.words(128 + half * 32 + quarter * 16);
      const unsigned low_shift = 4 * static_cast<unsigned>(run / 2), high_shift = 2 * static_cast<unsigned>(run);
      const auto step =
          map_words<Rows>(s, group / 4, [&](int p, Words w) { return d.part[p] * high_byte(w, group % 4); });
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        use(16 * group + i, map_words<Rows>(low, i / 4, [&](int p, Words w) {
              const unsigned byte = 8 * static_cast<unsigned>(i % 4);
              const Words q = ((w >> (byte + low_shift)) & 15U) | ((high.word(p, i / 4) >> (byte + high_shift)) & 3U)
                                                                      << 4;
              return step.part[p] * to_floats(q - 32U);
            }));
    }
  }
};

}  // namespace calm::inline CALM_ABI::cpu
