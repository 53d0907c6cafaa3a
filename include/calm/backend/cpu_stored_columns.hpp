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

/// The four bits of each word from bit `shift` on, less Offset, as floats.
template <int Offset = 0>
[[gnu::always_inline]] inline Floats floats_of_nibbles(Words word, unsigned shift) {
#if defined(__AVX512F__)
  constexpr float o = Offset;  // a look into sixteen values, which heeds four bits alone
  constexpr Floats values{0 - o, 1 - o, 2 - o,  3 - o,  4 - o,  5 - o,  6 - o,  7 - o,
                          8 - o, 9 - o, 10 - o, 11 - o, 12 - o, 13 - o, 14 - o, 15 - o};
  return reinterpret_cast<Floats>(
      _mm512_permutexvar_ps(reinterpret_cast<__m512i>(word >> shift), reinterpret_cast<__m512>(values)));
#else
  return to_floats(((word >> shift) & 15U) - static_cast<unsigned>(Offset));
#endif
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
