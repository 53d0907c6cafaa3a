// Fields: small integers in the words of vectors, and how they become floats.
#pragma once

#include <calm/backend/cpu_stored_rows.hpp>

namespace calm::inline CALM_ABI::cpu {

/// Bit i of each word is that of a where `mask` has it, else that of b.
[[gnu::always_inline]] inline Words choose_bits(std::uint32_t mask, Words a, Words b) {
#if defined(__AVX512F__)
  const auto m = reinterpret_cast<__m512i>(every_lane(mask));
  return reinterpret_cast<Words>(
      _mm512_ternarylogic_epi32(reinterpret_cast<__m512i>(a), m, reinterpret_cast<__m512i>(b), 0xE2));
#else
  return (a & mask) | (b & ~mask);
#endif
}

/// Bit `from` of each word becomes bit `to`.
[[gnu::always_inline]] inline Words move_bits(Words words, int from, int to) {
  return from >= to ? words >> (from - to) : words << (to - from);
}

/// Integers of Bits bits, less Offset, at `position` of words, as floats: as bits of the mantissa of a power of two,
/// whose exponent is put above them. The bits must lie in a mantissa's 23; no others are heeded. For four lowest bits
/// AVX-512 looks into a table.
template <int Bits, int Offset, int Position>
struct Field {
#if defined(__AVX512F__)
  static constexpr bool from_table = Bits == 4 && Position == 0;
#else
  static constexpr bool from_table = false;
#endif
  /// What is to be taken from floats(): that power of two, and Offset.
  static constexpr int bias = from_table ? 0 : (1 << (23 - Position)) + Offset;

  [[gnu::always_inline]] static Floats floats(Words words) {
#if defined(__AVX512F__)
    if constexpr (from_table) {
      constexpr auto table = []<int... I>(std::integer_sequence<int, I...>) {
        return Floats{static_cast<float>(I - Offset)...};
      };
      constexpr Floats values = table(std::make_integer_sequence<int, 16>{});
      return reinterpret_cast<Floats>(
          _mm512_permutexvar_ps(reinterpret_cast<__m512i>(words), reinterpret_cast<__m512>(values)));
    }
#endif
    constexpr std::uint32_t mask = ((1U << Bits) - 1) << Position, exponent = (127 + 23 - Position) << 23;
    return as_floats(choose_bits(mask, words, every_lane(exponent)));
  }
  [[gnu::always_inline]] static Floats values(Words words) {
    return from_table ? floats(words) : floats(words) - static_cast<float>(bias);
  }
};

/// Count integers of Bits bits in as few words: `in_word` whole ones in each; where that leaves two bits of each word,
/// they hold the last integer or two: integer r of these has its bits 0 and 1 in word 2 r, 2 and 3 in word 2 r + 1, and
/// what is above in the last word.
template <int Bits, int Count, int Offset>
struct Fields {
  /// Where a bias becomes a part of a scale without rounding: the top of a mantissa, and for bytes what takes one shift
  /// less.
  static constexpr int position = Field<Bits, Offset, 0>::from_table ? 0 : Bits == 8 ? 8 : 23 - Bits;
  using Place = Field<Bits, Offset, position>;
  /// Where a machine rounds once, the bias is left in: the instruction that multiplies by the scale takes it away.
  static constexpr bool leaves_bias = fused_multiply_add;
  static constexpr int bias = leaves_bias ? Place::bias : 0;  // what floats() are too large by
  static constexpr int words = Bits * Count / 32, in_word = 32 / Bits, rest = Count - words * in_word;
  static_assert(Bits * Count % 32 == 0 && (rest == 0 || (Bits == 5 && rest == 2) || (Bits == 6 && rest == 1)));

  /// Calls use(i, integer i less Offset of each part, as a float, and bias) for all i in order. Word t begins at byte
  /// place + 4 t of a row.
  template <class Rows>
  [[gnu::always_inline]] static void floats(const Rows& rows, Index place, const auto& use) {
    const auto word = [&](int t) { return rows.template numbers<std::uint32_t>(place + 4 * t); };
#pragma GCC unroll 1
    for (int t = 0; t < words; ++t) {
      rows.template ask<4>(place + 4 * t);
      const auto all = word(t);
#pragma GCC unroll 8
      for (int f = 0; f < in_word; ++f)
        use(t * in_word + f, each_part<Rows::parts>([&](int p) { return as_float(all.part[p], f * Bits); }));
    }
#pragma GCC unroll 2
    for (int r = 0; r < rest; ++r) {
      const auto a = word(2 * r), b = word(2 * r + 1), c = word(words - 1);
      use(words * in_word + r, each_part<Rows::parts>([&](int p) {
            const Words low = choose_bits(3, a.part[p] >> 30, b.part[p] >> 28);
            const Words all = choose_bits(15, low, move_bits(c.part[p], 30 + r, 4));
            return as_float(all, 0);
          }));
    }
  }

  /// Writes the words of one part, `step` bytes apart, from the lowest Bits bits of each of Count integers.
  static void write(const Words* integers, std::byte* target, Index step) {
    Words all[words] = {};
    for (int i = 0; i < words * in_word; ++i)
      all[i / in_word] |= (integers[i] & ((1U << Bits) - 1)) << i % in_word * Bits;
    for (int r = 0; r < rest; ++r) {
      const Words last = integers[words * in_word + r];
      all[2 * r] |= last << 30;
      all[2 * r + 1] |= last >> 2 << 30;
      all[words - 1] |= (Bits == 6 ? last >> 4 << 30 : (last >> 4 & 1U) << (30 + r));
    }
    for (int t = 0; t < words; ++t) std::memcpy(target + t * step, &all[t], sizeof(all[t]));
  }

 private:
  [[gnu::always_inline]] static Floats as_float(Words integers, int from) {
    const Words moved = move_bits(integers, from, position);
    return leaves_bias ? Place::floats(moved) : Place::values(moved);
  }
};

}  // namespace calm::inline CALM_ABI::cpu
