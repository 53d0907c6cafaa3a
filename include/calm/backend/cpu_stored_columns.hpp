// StoredColumns: a panel of rows of a stored weight, decoded into vectors that hold one value of each row.
//
// y = x W^T is multiplied from the rows of W as they are stored: a vector must hold value k of several rows. 16 bytes
// of each row are read, transposed as 32-bit words, and each word is taken apart. What a vector then holds has the bits
// that decode() (dtype.hpp) gives: the products of scales and small integers are exact, in any order, and with scales
// that are divided by powers of two; one rounding follows where there is a minimum.
#pragma once

#include <calm/backend/cpu_stored_rows.hpp>

#include <bit>

namespace calm::inline CALM_ABI::cpu {

inline Floats as_floats(Words bits) { return reinterpret_cast<Floats>(bits); }
inline Floats to_floats(Words small) { return __builtin_convertvector(reinterpret_cast<Integers>(small), Floats); }

/// Bit i of each word is that of a where `mask` has it, else that of b.
[[gnu::always_inline]] inline Words choose_bits(std::uint32_t mask, Words a, Words b) {
#if defined(__AVX512F__)
  const auto m = reinterpret_cast<__m512i>(every_lane(mask));
  return reinterpret_cast<Words>(
      _mm512_ternarylogic_epi32(m, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b), 0xCA));
#else
  return (a & mask) | (b & ~mask);
#endif
}

/// Bit `from` of each word becomes bit `to`.
[[gnu::always_inline]] inline Words move_bits(Words words, int from, int to) {
  return from >= to ? words >> (from - to) : words << (to - from);
}

/// The lowest four or five bits of each word, less Offset, as floats. AVX-512 looks into a table of as many values,
/// and heeds no other bits.
template <int Bits, int Offset>
[[gnu::always_inline]] inline Floats floats_of_bits(Words words) {
#if defined(__AVX512F__)
  constexpr auto table = []<int... I>(std::integer_sequence<int, I...>, int first) {
    return Floats{static_cast<float>(first + I)...};
  };
  constexpr auto sixteen = std::make_integer_sequence<int, 16>{};
  constexpr Floats values = table(sixteen, -Offset), more = table(sixteen, 16 - Offset);
  const auto index = reinterpret_cast<__m512i>(words);
  if constexpr (Bits == 4)
    return reinterpret_cast<Floats>(_mm512_permutexvar_ps(index, reinterpret_cast<__m512>(values)));
  else
    return reinterpret_cast<Floats>(
        _mm512_permutex2var_ps(reinterpret_cast<__m512>(values), index, reinterpret_cast<__m512>(more)));
#else
  return to_floats((words & ((1U << Bits) - 1)) - static_cast<unsigned>(Offset));
#endif
}

/// The lowest six bits of each word, less 32, as floats: as the last bits of 2^23, whose distance to the next float
/// is 1.
[[gnu::always_inline]] inline Floats floats_of_six_bits(Words words) {
  return as_floats(choose_bits(63, words, every_lane<std::uint32_t>(0x4B000000))) - 8388640.0F;
}

/// to_float() of the f16 in the lower half of each word.
inline Floats floats_of_f16(Words word) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(word))));
#elif defined(__F16C__) && defined(__AVX2__)
  const auto half = reinterpret_cast<__m256i>(word & 0xFFFFU);
  return reinterpret_cast<Floats>(
      _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1))));
#else
  const Words magnitude = (word & 0x7FFFU) << 13;
  const Words finite = reinterpret_cast<Words>(as_floats(magnitude) * 0x1p112F);  // moves the exponent; exact
  const Words value = magnitude >= 0x0F800000U ? magnitude | 0x7F800000U : finite;
  return as_floats(value | (word & 0x8000U) << 16);
#endif
}

/// fn(i) for i < Count: in a loop where words lie in memory, so that few instructions read in even steps, which the
/// processor foresees; one after the other where they lie in registers.
template <class Rows, int Count>
[[gnu::always_inline]] inline void for_each_word(const auto& fn) {
  if constexpr (Rows::in_memory) {
#pragma GCC unroll 1
    for (int i = 0; i < Count; ++i) fn(i);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) fn(i);
  }
}

/// StoredColumns<Stored>: `depth` values of each row lie in `bytes`. decode() calls use(k, the values of each part) for
/// k from 0 to depth - 1, in this order, and rows.ask() in even steps between them (AskingAhead). `kept`: how many
/// vectors of a part it holds from one value to the next.
template <class Stored>
struct StoredColumns;

template <>
struct StoredColumns<double> {
  static constexpr Index depth = 2, bytes = 16;
  static constexpr int kept = 0;
  template <class Rows>
  [[gnu::always_inline]] static void decode(const Rows& rows, const auto& use) {
    rows.template ask<bytes, 1>(0);
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
    rows.template ask<bytes, 1>(0);
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
    rows.template ask<bytes, 1>(0);
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
    rows.template ask<bytes, 1>(0);
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
      for_each_word<Rows, 4>([&](int t) {
        rows.template ask<bytes, 8>(4 * quarter + t);
        const auto four = map_words<Rows>(words, t, [](int, Words w) { return w; });
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k)
          use(16 * quarter + 4 * t + k,
              each_part<Rows::parts>([&](int p) { return d.part[p] * high_byte(four.part[p], k); }));
      });
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
      for_each_word<Rows, 4>([&](int t) {
        rows.template ask<bytes, 8>(4 * half + t);
        const auto four = map_words<Rows>(words, t, [](int, Words w) { return w; });
        const auto fifths = each_part<Rows::parts>([&](int p) { return high.part[p] >> (16 * half + 4 * t) << 4; });
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          use(16 * half + 4 * t + i, each_part<Rows::parts>([&](int p) {
                Words bits = four.part[p] >> (8 * i + 4 * half);
                if constexpr (Bits == 5) bits = choose_bits(15, bits, fifths.part[p] >> i);
                const Floats q = floats_of_bits<Bits, offset>(bits);
                if constexpr (HasMinimum) return multiply_add<float>(d.part[p], q, minimum.part[p]);
                else return d.part[p] * q;
              }));
      });
    }
  }
};

/// q4_k and q5_k. The first 16 bytes of a block are d, e and the 12 bytes of s and m. Groups are counted at run time,
/// in q6_k, too: 256 values in a row would be more instructions than a processor keeps.
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
#pragma GCC unroll 1
    for (int pair = 0; pair < 4; ++pair) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int group = 2 * pair + half;
        // As Block::scale_and_minimum: byte group % 4 of words 1 to 3.
        const int shift = 8 * (group % 4);
        const auto six_bits = [&](int p, int word, int nibble) {
          const Words own = head.word(p, word) >> shift, third = head.word(p, 3) >> shift;
          return to_floats(pair < 2 ? own & 63U : ((third >> nibble) & 15U) | ((own >> 2) & 48U));
        };
        const auto step = each_part<Rows::parts>([&](int p) { return d.part[p] * six_bits(p, 1, 0); });
        const auto minimum = each_part<Rows::parts>([&](int p) { return e.part[p] * six_bits(p, 2, 4); });
#pragma GCC unroll 2
        for (int quarter = 0; quarter < 2; ++quarter) {
          const Index place = bytes - 128 + 32 * pair + 16 * quarter;
          rows.template ask<bytes, 16>(2 * group + quarter);
          const auto low = rows.words(place), high = rows.words(Bits == 5 ? 16 + 16 * quarter : place);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i)
            use(32 * group + 16 * quarter + i, map_words<Rows>(low, i / 4, [&](int p, Words w) {
                  const int byte = 8 * (i % 4);
                  Words bits = move_bits(w, byte + 4 * half, 0);
                  if constexpr (Bits == 5)
                    bits = choose_bits(15, bits, move_bits(high.word(p, i / 4) >> 2 * pair << 4, byte + half, 0));
                  return multiply_add<float>(step.part[p], floats_of_bits<Bits, 0>(bits), -minimum.part[p]);
                }));
        }
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
#pragma GCC unroll 1
    for (int group = 0; group < 16; ++group) {  // of 16 values
      const int half = group / 8, run = group % 8 / 2, quarter = group % 2;
      const Index low_place = half * 64 + run % 2 * 32 + quarter * 16, high_place = 128 + half * 32 + quarter * 16;
      const auto low = rows.words(low_place), high = rows.words(high_place);
      const auto step =
          map_words<Rows>(s, group / 4, [&](int p, Words w) { return d.part[p] * high_byte(w, group % 4); });
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        rows.template ask<bytes, 64>(4 * group + t);
        const auto low_bits = map_words<Rows>(low, t, [&](int, Words w) { return w >> run / 2 * 4; });
        const auto high_bits = map_words<Rows>(high, t, [&](int, Words w) { return w >> 2 * run << 4; });
#pragma GCC unroll 4
        for (int byte = 0; byte < 4; ++byte)
          use(16 * group + 4 * t + byte, each_part<Rows::parts>([&](int p) {
                const Words bits = choose_bits(15, low_bits.part[p] >> 8 * byte, high_bits.part[p] >> 8 * byte);
                return step.part[p] * floats_of_six_bits(bits);
              }));
      }
    }
  }
};

}  // namespace calm::inline CALM_ABI::cpu
