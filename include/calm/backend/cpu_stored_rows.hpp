// The rows of a panel of a stored weight as StoredColumns (cpu_stored_columns.hpp) reads them: words and numbers of all
// rows at a time. The bytes lie as in the file (StoredRows), or in a copy in which the same fields of all rows lie side
// by side, transposed once (InterleavedRows).
#pragma once

#include <calm/backend/cpu_product.hpp>

#include <utility>

namespace calm::inline CALM_ABI::cpu {

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
  static constexpr bool in_memory = false;  // of words()
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
  /// See AskingAhead.
  template <Index Bytes, Index Steps>
  static void ask(Index /*step*/) {}
  /// The rows from byte `place` on.
  [[gnu::always_inline]] StoredRows from(Index place) const { return {first + place, row_bytes}; }
};

/// Panels with the fields of all their rows side by side: what lies at byte `place` of a row begins at byte
/// place * panel_rows of a panel, words as words() and numbers as numbers() give them. Two panels at a time keep more
/// sums going.
template <Index Panels>
struct InterleavedRows {
  static constexpr bool in_memory = true;
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
  [[gnu::always_inline]] InterleavedRows from(Index place) const { return {first + place * panel_rows, panel_bytes}; }
};

/// The same, where decode() asks for what lies some way ahead: where much is computed between two lines, and beyond the
/// page that it reads, the processor does not foresee them. Into the second cache, which waits for more lines at a time
/// than the first. Behind the last of these panels come the next ones.
template <Index Panels>
struct AskingAhead : InterleavedRows<Panels> {
  static constexpr Index distance = 4096;
  const std::byte* turn;  // from here on it is the next panels that lie ahead
  Index ahead = distance;

  explicit AskingAhead(const InterleavedRows<Panels>& rows)
      : InterleavedRows<Panels>(rows), turn(rows.first + rows.panel_bytes - distance) {}

  /// Part `step` of Steps of a block. A few lines at a time: a core waits for so many at once and no more.
  template <Index Bytes, Index Steps>
  [[gnu::always_inline]] void ask(Index step) const {
    constexpr Index cache_line = 64, lines = Bytes * panel_rows / cache_line, count = ceil_divide(lines, Steps);
    const std::byte* from = this->first + ahead + step * lines / Steps * cache_line;
    for (Index panel = 0; panel < Panels; ++panel)
      for (Index i = 0; i < count; ++i) __builtin_prefetch(from + panel * this->panel_bytes + i * cache_line, 0, 2);
  }
  void move_on(Index bytes) {
    this->first += bytes * panel_rows;
    if (this->first >= turn) ahead = distance + (Panels - 1) * this->panel_bytes;
  }
};

/// A source that writes all that it is asked for to where InterleavedRows reads it.
struct Interleaver {
  static constexpr bool in_memory = false;
  static constexpr int parts = StoredRows::parts;
  StoredRows rows;
  std::byte* target;

  template <Index Bytes, Index Steps>
  static void ask(Index /*step*/) {}

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

}  // namespace calm::inline CALM_ABI::cpu
