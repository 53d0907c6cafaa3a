// StoredColumns of the block-quantised types (quantised.hpp).
//
// In a file the bits of an integer lie apart. An interleaved copy keeps the scales where they are, and the integers as
// Fields of as many bytes, which take fewer instructions to read.
//
// Values have the bits that decode() (dtype.hpp) gives: the products of scales and small integers are exact, in any
// order, and with scales that are divided by powers of two; one rounding follows where there is a minimum. In an
// interleaved copy a zero may have the other sign, which is seen only in a sum that begins with -0.
#pragma once

#include <calm/backend/cpu_fields.hpp>
#include <calm/backend/cpu_stored_columns.hpp>

namespace calm::inline CALM_ABI::cpu {

/// Of each part of Rows: the values of integers q are step q + minimum.
template <class Rows>
struct ScaleAndMinimum {
  PanelVectors<float, Rows::parts> step, minimum;
  [[gnu::always_inline]] Floats value(int p, Floats q) const {
    return multiply_add<float>(step.part[p], q, minimum.part[p]);
  }
  /// For integers that are larger by Bias.
  template <int Bias>
  [[gnu::always_inline]] ScaleAndMinimum take_bias() const {
    return {step, each_part<Rows::parts>([&](int p) {
              return multiply_add<float>(step.part[p], every_lane(static_cast<float>(-Bias)), minimum.part[p]);
            })};
  }
  /// All bits of the lanes where take_bias() rounds, or is no number. The sum of two terms less the larger one is exact
  /// (Dekker, "A floating-point technique", 1971): it is the other term only where the sum was not rounded.
  template <int Bias>
  Words take_bias_inexactly() const {
    const auto sum = take_bias<Bias>().minimum;
    Words any{};
    for (int p = 0; p < Rows::parts; ++p) {
      const Floats taken = step.part[p] * static_cast<float>(-Bias);
      const auto exact = (sum.part[p] - taken == minimum.part[p]) & (sum.part[p] - minimum.part[p] == taken);
      any |= ~reinterpret_cast<Words>(exact);
    }
    return any;
  }
};

/// step q.
template <class Rows>
struct Scale {
  PanelVectors<float, Rows::parts> step;
  [[gnu::always_inline]] Floats value(int p, Floats q) const { return step.part[p] * q; }
  template <int Bias>
  [[gnu::always_inline]] ScaleAndMinimum<Rows> take_bias() const {
    return {step, each_part<Rows::parts>([&](int p) { return step.part[p] * static_cast<float>(-Bias); })};
  }
  /// Where a scale is no finite number: at most 19 bits times a bias of 9, or 11 times 9, need no rounding.
  template <int Bias>
  Words take_bias_inexactly() const {
    const auto zero = each_part<Rows::parts>([](int) { return Floats{}; });
    return ScaleAndMinimum<Rows>{step, zero}.template take_bias_inexactly<Bias>();
  }
};

/// What a block of a type consists of:
///   bits, group_size, offset   the bits of an integer, how many values share a scale, what integers are too large by
///   place                      the first byte of the integers in an interleaved copy
///   scales(rows)               all scales of a block
///   scale(scales, group)        the Scale, or ScaleAndMinimum, of a group
///   integers(rows, group, use)  calls use(i, integer i of each part, with any bits above it) in order, from the file
template <class Stored>
struct Layout;

template <>
struct Layout<Q8_0> {
  static constexpr int bits = 8, group_size = 32, offset = 128;
  static constexpr Index place = 2;

  template <class Rows>
  [[gnu::always_inline]] static auto scales(const Rows& rows) {
    return Scale<Rows>{rows.halves(0)};
  }
  template <class Rows>
  [[gnu::always_inline]] static auto scale(const Scale<Rows>& of_block, int /*group*/) {
    return of_block;
  }
  [[gnu::always_inline]] static void integers(const StoredRows& rows, int /*group*/, const auto& use) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const auto words = rows.words(2 + 16 * half);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        const auto four = map_words<StoredRows>(words, t, [](int, Words w) { return w ^ 0x80808080U; });
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k)
          use(16 * half + 4 * t + k, each_part<StoredRows::parts>([&](int p) { return four.part[p] >> 8 * k; }));
      }
    }
  }
};

/// q4_0, q4_1, q5_0, q5_1.
template <int Bits, bool HasMinimum>
struct Layout<QuantisedBlock32<Bits, HasMinimum>> {
  using Block = QuantisedBlock32<Bits, HasMinimum>;
  static constexpr int bits = Bits, group_size = 32, offset = HasMinimum ? 0 : 1 << (Bits - 1);
  static constexpr Index place = HasMinimum ? 4 : 2;

  template <class Rows>
  [[gnu::always_inline]] static auto scales(const Rows& rows) {
    if constexpr (HasMinimum) {
      const auto [d, m] = rows.two_halves(0);
      return ScaleAndMinimum<Rows>{d, m};
    } else {
      return Scale<Rows>{rows.halves(0)};
    }
  }
  [[gnu::always_inline]] static auto scale(const auto& of_block, int /*group*/) { return of_block; }

  [[gnu::always_inline]] static void integers(const StoredRows& rows, int /*group*/, const auto& use) {
    constexpr int parts = StoredRows::parts;
    auto high = each_part<parts>([](int) { return Words{}; });
    if constexpr (Bits == 5) high = rows.template numbers<std::uint32_t>(HasMinimum ? 4 : 2);
    const auto words = rows.words(Block::bytes - 16);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        use(16 * half + i, map_words<StoredRows>(words, i / 4, [&](int p, Words w) {
              const Words low = w >> (8 * (i % 4) + 4 * half);
              return Bits == 5 ? choose_bits(15, low, move_bits(high.part[p], 16 * half + i, 4)) : low;
            }));
    }
  }
};

/// q4_k and q5_k. The first 16 bytes of a block are d, e and the 12 bytes of s and m.
template <int Bits>
struct Layout<QuantisedBlock256<Bits>> {
  using Block = QuantisedBlock256<Bits>;
  static constexpr int bits = Bits, group_size = 32, offset = 0;
  static constexpr Index place = 16;

  template <class Rows, class Head>
  struct Scales {
    Head head;
    PanelVectors<float, Rows::parts> d, e;
  };
  template <class Rows>
  [[gnu::always_inline]] static auto scales(const Rows& rows) {
    const auto head = rows.words(0);
    return Scales<Rows, std::decay_t<decltype(head)>>{
        head, map_words<Rows>(head, 0, [](int, Words w) { return floats_of_f16(w); }),
        map_words<Rows>(head, 0, [](int, Words w) { return floats_of_f16(w >> 16); })};
  }
  /// As Block::scale_and_minimum: byte group % 4 of words 1 to 3.
  template <class Rows, class Head>
  [[gnu::always_inline]] static auto scale(const Scales<Rows, Head>& of_block, int group) {
    const auto six_bits = [&](int p, int word, int nibble) {
      const int shift = 8 * (group % 4);
      const Words own = of_block.head.word(p, word) >> shift, third = of_block.head.word(p, 3) >> shift;
      return to_floats(group < 4 ? own & 63U : ((third >> nibble) & 15U) | ((own >> 2) & 48U));
    };
    return ScaleAndMinimum<Rows>{
        each_part<Rows::parts>([&](int p) { return of_block.d.part[p] * six_bits(p, 1, 0); }),
        each_part<Rows::parts>([&](int p) { return -(of_block.e.part[p] * six_bits(p, 2, 4)); })};
  }

  [[gnu::always_inline]] static void integers(const StoredRows& rows, int group, const auto& use) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const auto low = rows.words(Block::bytes - 128 + group / 2 * 32 + 16 * half);
      const auto high = rows.words(Bits == 5 ? 16 + 16 * half : 0);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        use(16 * half + i, map_words<StoredRows>(low, i / 4, [&](int p, Words w) {
              const int byte = 8 * (i % 4);
              const Words low_bits = w >> group % 2 * 4 >> byte;
              return Bits == 5 ? choose_bits(15, low_bits, high.word(p, i / 4) >> group << 4 >> byte) : low_bits;
            }));
    }
  }
};

template <>
struct Layout<Q6_K> {
  static constexpr int bits = 6, group_size = 16, offset = 32;
  static constexpr Index place = 0;

  template <class Rows, class Bytes>
  struct Scales {
    PanelVectors<float, Rows::parts> d;
    Bytes s;
  };
  template <class Rows>
  [[gnu::always_inline]] static auto scales(const Rows& rows) {
    const auto d = rows.halves(208);
    const auto s = rows.words(192);
    return Scales<Rows, std::decay_t<decltype(s)>>{each_part<Rows::parts>([&](int p) { return d.part[p] * 0x1p-24F; }),
                                                   s};
  }
  template <class Rows, class Bytes>
  [[gnu::always_inline]] static auto scale(const Scales<Rows, Bytes>& of_block, int group) {
    return Scale<Rows>{map_words<Rows>(of_block.s, group / 4, [&](int p, Words w) {  // signed bytes
      return of_block.d.part[p] * to_floats((w << (24 - 8 * (group % 4))) & 0xFF000000U);
    })};
  }

  [[gnu::always_inline]] static void integers(const StoredRows& rows, int group, const auto& use) {
    const int half = group / 8, run = group % 8 / 2, quarter = group % 2;
    const auto low = rows.words(half * 64 + run % 2 * 32 + quarter * 16);
    const auto high = rows.words(128 + half * 32 + quarter * 16);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      use(i, map_words<StoredRows>(low, i / 4, [&](int p, Words w) {
            const int byte = 8 * (i % 4);
            return choose_bits(15, w >> run / 2 * 4 >> byte, high.word(p, i / 4) >> 2 * run << 4 >> byte);
          }));
  }
};

template <BlockQuantised Stored>
struct StoredColumns<Stored> {
  using Own = Layout<Stored>;
  using Integers = Fields<Own::bits, Own::group_size, Own::offset>;
  static constexpr Index depth = Stored::values, bytes = Stored::bytes;

  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    constexpr Index end = Own::place + Integers::words * 4 * depth / Own::group_size;
    rows.template ask<Own::place>(0);
    rows.template ask<bytes - end>(end);
    const auto scales = Own::scales(rows);
    constexpr int groups = static_cast<int>(depth) / Own::group_size, at_once = groups > 1 ? 2 : 1;
#pragma GCC unroll 1  // 256 values in a row would be more instructions than a processor keeps
    for (int some = 0; some < groups / at_once; ++some) {
#pragma GCC unroll 2
      for (int u = 0; u < at_once; ++u) {
        const int group = some * at_once + u;
        const auto scale = scale_of<Rows>(scales, group);
        floats(
            rows, group, [&](int i, const auto& q) __attribute__((always_inline)) {
              use(group * Own::group_size + i,
                  each_part<Rows::parts>([&](int p) { return scale.value(p, q.part[p]); }));
            });
      }
    }
  }

  /// Whether an interleaved copy gives the values of these rows. The bias of Fields is taken from a minimum, which
  /// needs no rounding where no more than 1 is left, since f16 are multiples of 2^-24, and mostly none where more is.
  static bool can_interleave(const StoredRows& rows) {
    if constexpr (Integers::bias == 0) {
      return true;
    } else {
      Words any{};
      const auto scales = Own::scales(rows);
      for (int group = 0; group < static_cast<int>(depth) / Own::group_size; ++group)
        any |= Own::scale(scales, group).template take_bias_inexactly<Integers::bias>();
      std::uint32_t lanes = 0;
      for (Index i = 0; i < row_lanes; ++i) lanes |= any[i];
      return lanes == 0;
    }
  }

 private:
  template <class Rows>
  [[gnu::always_inline]] static auto scale_of(const auto& scales, int group) {
    constexpr bool copied = !std::is_same_v<Rows, StoredRows> && !std::is_same_v<Rows, Interleaver>;
    const auto scale = Own::scale(scales, group);
    if constexpr (copied && Integers::bias != 0) return scale.template take_bias<Integers::bias>();
    else return scale;
  }

  [[gnu::always_inline]] static void floats(const StoredRows& rows, int group, const auto& use) {
    using InLowest = Field<Own::bits, Own::offset, 0>;
    Own::integers(rows, group, [&](int i, const auto& q) {
      use(i, each_part<StoredRows::parts>([&](int p) { return InLowest::values(q.part[p]); }));
    });
  }
  template <Index Panels>
  [[gnu::always_inline]] static void floats(const AskingAhead<Panels>& rows, int group, const auto& use) {
    Integers::floats(rows, Own::place + group * Integers::words * 4, use);
  }
  static void floats(const Interleaver& rows, int group, const auto& /*use*/) {
    Words all[StoredRows::parts][Own::group_size];
    Own::integers(rows.rows, group, [&](int i, const auto& q) {
      for (int p = 0; p < StoredRows::parts; ++p) all[p][i] = q.part[p];
    });
    for (int p = 0; p < StoredRows::parts; ++p)
      Integers::write(all[p], rows.target + (Own::place + group * Integers::words * 4) * panel_rows + p * vector_bytes,
                      4 * panel_rows);
  }
};

}  // namespace calm::inline CALM_ABI::cpu
