// The rows of a panel of a stored weight as StoredColumns (cpu_stored_columns.hpp) reads them: words and numbers of all
// rows at a time. The bytes lie as in the file (StoredRows), or in a copy in which the same words of all rows lie side
// by side, transposed once (InterleavedRows).
#pragma once

#include <calm/backend/cpu_product.hpp>

#include <array>
#include <utility>

namespace calm::inline CALM_ABI::cpu {

/// A vector for each part of one or two panels: a value of every row.
template <class T, int Parts>
struct PanelVectors {
  Vector<T> part[Parts];
};

/// of(p) for each part. No loop, so that the compiler knows each element from the start and keeps it in a register.
template <int Parts, class Of>
[[gnu::always_inline]] inline auto each_part(const Of& of) {
  return [&]<int... P>(std::integer_sequence<int, P...>) __attribute__((always_inline)) {
    return PanelVectors<std::decay_t<decltype(of(0)[0])>, Parts>{{of(P)...}};
  }
  (std::make_integer_sequence<int, Parts>{});
}

inline Floats as_floats(Words bits) { return reinterpret_cast<Floats>(bits); }
inline Floats to_floats(Words small) { return __builtin_convertvector(reinterpret_cast<Integers>(small), Floats); }

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
  /// An f16 at `place` as a float.
  [[gnu::always_inline]] PanelVectors<float, parts> halves(Index place) const {
    const auto all = numbers<std::uint16_t>(place);
    return each_part<parts>([&](int p) { return floats_of_f16(all.part[p]); });
  }
  /// halves(place) and halves(place + 2).
  [[gnu::always_inline]] std::array<PanelVectors<float, parts>, 2> two_halves(Index place) const {
    const auto all = numbers<std::uint32_t>(place);
    return {each_part<parts>([&](int p) { return floats_of_f16(all.part[p]); }),
            each_part<parts>([&](int p) { return floats_of_f16(all.part[p] >> 16); })};
  }
  /// See AskingAhead.
  template <Index Bytes>
  static void ask(Index /*place*/) {}
  /// The rows from byte `place` on.
  [[gnu::always_inline]] StoredRows from(Index place) const { return {first + place, row_bytes}; }
};

/// Panels with the fields of all their rows side by side: what lies at byte `place` of a row begins at byte
/// place * panel_rows of a panel, words as words() and numbers as numbers() give them. Two panels at a time keep more
/// sums going.
template <Index Panels>
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
  [[gnu::always_inline]] PanelVectors<float, parts> halves(Index place) const {
#if defined(__AVX512F__) || (defined(__F16C__) && defined(__AVX2__))
    return each_part<parts>([&](int p) {
      const std::byte* half = first + p / 2 * panel_bytes + place * panel_rows + p % 2 * vector_bytes / 2;
#if defined(__AVX512F__)
      return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half))));
#else
      return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half))));
#endif
    });
#else
    const auto all = numbers<std::uint16_t>(place);
    return each_part<parts>([&](int p) { return floats_of_f16(all.part[p]); });
#endif
  }
  [[gnu::always_inline]] std::array<PanelVectors<float, parts>, 2> two_halves(Index place) const {
    return {halves(place), halves(place + 2)};
  }
  [[gnu::always_inline]] InterleavedRows from(Index place) const { return {first + place * panel_rows, panel_bytes}; }
};

/// The same, where decode() asks for what lies some way ahead: where much is computed between two lines, and beyond the
/// page that it reads, the processor does not foresee them. Each line once, into the second cache, which waits for more
/// of them at a time than the first. Behind the last of these panels come the next ones.
template <Index Panels>
struct AskingAhead : InterleavedRows<Panels> {
  static constexpr Index distance = 4096;
  const std::byte* end;  // of the first of these panels, if it begins with them

  explicit AskingAhead(const InterleavedRows<Panels>& rows)
      : InterleavedRows<Panels>(rows), end(rows.first + rows.panel_bytes) {}

  /// What lies ahead of bytes [place, place + Bytes). A few at a time: a core waits for so many lines at once and no
  /// more.
  template <Index Bytes>
  [[gnu::always_inline]] void ask(Index place) const {
    constexpr Index cache_line = 64;
    const std::byte* from = this->first + place * panel_rows + distance;
    if constexpr (Panels > 1)
      if (from >= end) from += (Panels - 1) * this->panel_bytes;
    for (Index panel = 0; panel < Panels; ++panel)
      for (Index i = 0; i < Bytes * panel_rows; i += cache_line)
        __builtin_prefetch(from + panel * this->panel_bytes + i, 0, 2);
  }
  void move_on(Index bytes) { this->first += bytes * panel_rows; }
};

/// A source that writes what it is asked for to where InterleavedRows reads it.
struct Interleaver {
  static constexpr int parts = StoredRows::parts;
  StoredRows rows;
  std::byte* target;

  template <Index Bytes>
  static void ask(Index /*place*/) {}

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
  PanelVectors<float, parts> halves(Index place) const {
    numbers<std::uint16_t>(place);
    return rows.halves(place);
  }
  std::array<PanelVectors<float, parts>, 2> two_halves(Index place) const { return {halves(place), halves(place + 2)}; }
};

}  // namespace calm::inline CALM_ABI::cpu
