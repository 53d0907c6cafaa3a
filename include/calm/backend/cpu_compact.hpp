// CompactForm: bf16 weights in 12 bits a value, without loss.
//
// Decoding is a read of the weights, and a bf16 weight holds fewer than 16 bits: of the 256 upper bytes, which are sign
// and exponent but for its last bit, a panel has 16 in nearly all values. A value is kept as its lower byte and a code
// of 4 bits for the upper one, which an instruction looks up for all bytes of a vector. A column of a panel where a
// value has another upper byte is kept once more, as it is, and read in place of its codes. The values, so the bits of
// products, stay the same. The same holds for an f32 weight whose values are those of bf16, as where a bf16 checkpoint
// was stored in f32.
//
// Only where a machine looks up bytes (AVX2, AVX-512): elsewhere that costs more than reading 16 bits.
// Source of the observation: Zhang et al., "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU
// Inference via Dynamic-Length Float" (2025), which uses Huffman codes.
#pragma once

#include <calm/backend/cpu_stored_rows.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

namespace calm::inline CALM_ABI::cpu {

/// Elements `of(i)` of the bytes of a and b, one behind the other.
template <class Of>
[[gnu::always_inline]] inline Words chosen_bytes(Words a, Words b, Of of) {
  using Bytes = Vector<std::uint8_t>;
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return reinterpret_cast<Words>(
        __builtin_shufflevector(reinterpret_cast<Bytes>(a), reinterpret_cast<Bytes>(b), of(I)...));
  }
  (std::make_integer_sequence<int, static_cast<int>(vector_bytes)>{});
}

/// 8 values of each row in 12 bytes, which are three words: the lower bytes of values 0 to 3, of 4 to 7, and in byte j
/// the codes of values j and 4 + j. Of each 16 bytes of a vector, which are the words of four rows, the first 8 are
/// bytes 0 and 1 of each row, so that two come into one word with their upper bytes.
struct CompactBf16 {
  static constexpr Index depth = 8, bytes = 12;
#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
  static constexpr bool available = true;
#else
  static constexpr bool available = false;
#endif

  /// Words in this order.
  static Words ordered(Words words) {
    return chosen_bytes(words, words, [](int i) { return i / 16 * 16 + i % 8 / 2 * 4 + i % 16 / 8 * 2 + i % 2; });
  }

  /// Values 2 pair and 2 pair + 1 of each row, the upper halves of floats. `table` has the upper bytes, by their codes,
  /// in each 16 bytes.
  [[gnu::always_inline]] static Words two(const auto& word, Words table, int pair) {
    const Words lower = word(pair / 2), upper = look_up(table, (word(2) >> pair / 2 * 4) & 0x0F0F0F0FU);
    constexpr int end = static_cast<int>(vector_bytes);
    if (pair % 2 == 0) return chosen_bytes(lower, upper, [](int i) { return i / 16 * 16 + i % 16 / 2 + i % 2 * end; });
    return chosen_bytes(lower, upper, [](int i) { return i / 16 * 16 + 8 + i % 16 / 2 + i % 2 * end; });
  }

 private:
  [[gnu::always_inline]] static Words look_up(Words table, Words codes) {
#if defined(__AVX512BW__)
    return reinterpret_cast<Words>(
        _mm512_shuffle_epi8(reinterpret_cast<__m512i>(table), reinterpret_cast<__m512i>(codes)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return reinterpret_cast<Words>(
        _mm256_shuffle_epi8(reinterpret_cast<__m256i>(table), reinterpret_cast<__m256i>(codes)));
#else
    return table & codes;  // never called
#endif
  }
};

/// What belongs to one panel.
struct CompactPanel {
  std::array<std::uint8_t, 16> upper{};               // bytes, by their codes
  std::vector<Index> columns;                         // in which some value has another upper byte, in order
  std::vector<std::array<float, panel_rows>> values;  // of these columns

  Words table() const {
    Words all;
    for (Index i = 0; i < vector_bytes; i += 16) std::memcpy(reinterpret_cast<std::byte*>(&all) + i, upper.data(), 16);
    return all;
  }
};

template <Index Panels>
struct CompactRows : InterleavedRows<Panels> {
  const CompactPanel* panel;  // the first of Panels
  Index column = 0;           // at which the rows begin

  [[gnu::always_inline]] CompactRows from(Index place) const {
    return {InterleavedRows<Panels>::from(place), panel, column + place / CompactBf16::bytes * CompactBf16::depth};
  }

  /// The first column from k on that a panel has kept once more; or one that is never reached.
  Index next_exception(Index k) const {
    Index next = std::numeric_limits<Index>::max();
    for (Index p = 0; p < Panels; ++p) {
      const auto& columns = panel[p].columns;
      const auto found = std::lower_bound(columns.begin(), columns.end(), k);
      if (found != columns.end()) next = std::min(next, *found);
    }
    return next;
  }

  /// Puts the values of column k in place where a panel has kept them.
  [[gnu::noinline]] void correct(Index k, PanelVectors<float, 2 * Panels>& values) const {
    for (Index p = 0; p < Panels; ++p) {
      const auto& columns = panel[p].columns;
      const auto found = std::lower_bound(columns.begin(), columns.end(), k);
      if (found != columns.end() && *found == k)
        std::memcpy(&values.part[2 * p], &panel[p].values[static_cast<std::size_t>(found - columns.begin())],
                    sizeof(panel[p].values[0]));
    }
  }
};

/// Calls use(k, the values of each part) for all k of whole panels of rows.
template <class Columns, Index Panels>
[[gnu::always_inline]] inline void for_each_column(const CompactRows<Panels>& rows, Index depth, const auto& use) {
  constexpr int parts = 2 * Panels;
  AskingAhead<Panels> from(rows);
  const auto table = each_part<parts>([&](int p) { return rows.panel[p / 2].table(); });
  Index exception = rows.next_exception(rows.column);
  for (Index k = 0; k < depth; k += Columns::depth, from.move_on(Columns::bytes)) {
    const auto two_columns = [&](int pair, const auto& take) {
      const auto two = each_part<parts>([&](int p) {
        const std::byte* words = from.first + p / 2 * from.panel_bytes + p % 2 * vector_bytes;
        return Columns::two([&](int t) { return reinterpret_cast<const Words*>(words)[2 * t]; }, table.part[p], pair);
      });
      take(2 * pair, each_part<parts>([&](int p) { return as_floats(two.part[p] << 16); }));
      take(2 * pair + 1, each_part<parts>([&](int p) { return as_floats(two.part[p] & 0xFFFF0000U); }));
    };
    if (k + Columns::depth <= depth && exception >= rows.column + k + Columns::depth) [[likely]] {
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; ++pair) {
        if (pair < 3) from.template ask<4>(4 * pair);
        two_columns(pair, [&](int j, const auto& values) { use(k + j, values); });
      }
    } else {
      from.template ask<Columns::bytes>(0);
      PanelVectors<float, parts> all[8];
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; ++pair) two_columns(pair, [&](int j, const auto& values) { all[j] = values; });
      for (Index j = 0; j < std::min(Columns::depth, depth - k); ++j) {
        if (const Index at = rows.column + k + j; at == exception) {
          rows.correct(at, all[j]);
          exception = rows.next_exception(at + 1);
        }
        use(k + j, all[j]);
      }
    }
  }
}

struct CompactForm {
  PackedMatrix<std::byte> values;  // a panel a row
  std::vector<CompactPanel> panel;

  template <class Columns>
  static constexpr Index most = 2;  // at a time

  std::size_t bytes() const {
    std::size_t total = values.bytes();
    for (const CompactPanel& p : panel) total += p.columns.size() * (sizeof(p.columns[0]) + sizeof(p.values[0]));
    return total;
  }
  template <Index Panels>
  CompactRows<Panels> panels(Arena<HostMemory>& /*arena*/, Index first) const {
    return {{&values(first, 0), values.cols()}, &panel[static_cast<std::size_t>(first)]};
  }
};

/// Where the values of an f32 weight are those of bf16.
inline bool is_bf16(ThreadPool& pool, const StoredMatrix& w) {
  std::atomic<bool> all = true;
  pool.for_each_tile(w.rows(), [&](Index i, int) {
    const std::byte* row = w.data() + i * w.row_bytes();
    std::uint32_t lower = 0;
    for (Index k = 0; k < w.cols(); ++k) {
      std::uint32_t bits;
      std::memcpy(&bits, row + k * 4, sizeof(bits));
      lower |= bits & 0xFFFFU;
    }
    if (lower != 0) all = false;
  });
  return all;
}

/// Row i of a weight in bf16, or in f32 with the values of bf16: the upper halves of f32.
inline void read_upper_halves(const StoredMatrix& w, Index i, std::uint16_t* target) {
  const std::byte* row = w.data() + i * w.row_bytes();
  if (w.dtype() == DType::bf16) std::memcpy(target, row, static_cast<std::size_t>(w.row_bytes()));
  else
    for (Index k = 0; k < w.cols(); ++k) std::memcpy(target + k, row + 4 * k + 2, sizeof(*target));
}

/// The 16 upper bytes that most of the values have, whole blocks of columns.
inline std::array<std::uint8_t, 16> frequent_upper_bytes(MatrixView<const std::uint16_t> values) {
  std::array<std::array<Index, 256>, 4> counts{};  // so that one count need not wait for the one before
  for (Index i = 0; i < values.rows; ++i)
    for (Index k = 0; k < values.cols; k += 4)
      for (std::size_t j = 0; j < 4; ++j) ++counts[j][values.row(i)[k + static_cast<Index>(j)] >> 8U];
  auto& count = counts[0];
  for (std::size_t byte = 0; byte < count.size(); ++byte)
    count[byte] += counts[1][byte] + counts[2][byte] + counts[3][byte];
  std::array<std::uint8_t, 256> bytes;
  std::iota(bytes.begin(), bytes.end(), std::uint8_t{0});
  std::partial_sort(bytes.begin(), bytes.begin() + 16, bytes.end(),
                    [&](auto a, auto b) { return count[a] != count[b] ? count[a] > count[b] : a < b; });
  std::array<std::uint8_t, 16> upper;
  std::copy_n(bytes.begin(), upper.size(), upper.begin());
  return upper;
}

/// Writes a panel to `target` from its values [panel_rows, whole blocks of columns]. Only the first `columns` belong to
/// the weight.
inline CompactPanel compact_panel(Arena<HostMemory>& arena, MatrixView<const std::uint16_t> values, Index columns,
                                  std::byte* target) {
  CompactPanel panel{frequent_upper_bytes(values), {}, {}};
  constexpr std::uint8_t none = 16;
  std::array<std::uint8_t, 256> code_of;
  code_of.fill(none);
  for (std::uint8_t code = 0; code < none; ++code) code_of[panel.upper[code]] = code;
  const auto lower = arena.matrix<std::uint8_t>(values.rows, values.cols);
  const auto codes = arena.matrix<std::uint8_t>(values.rows, values.cols);
  const auto any = arena.matrix<std::uint8_t>(1, values.cols);  // all bits of the codes of a column
  std::fill_n(any.data, values.cols, std::uint8_t{0});
  for (Index i = 0; i < values.rows; ++i) {
    const std::uint16_t* row = values.row(i);
    std::uint8_t *const lower_of_row = lower.row(i), *const codes_of_row = codes.row(i);
    for (Index k = 0; k < values.cols; ++k) lower_of_row[k] = static_cast<std::uint8_t>(row[k]);
#pragma GCC unroll 8
    for (Index k = 0; k < values.cols; ++k) codes_of_row[k] = code_of[row[k] >> 8U];
    for (Index k = 0; k < values.cols; ++k) any.data[k] |= codes_of_row[k];
  }
  for (Index k = 0; k < values.cols; k += CompactBf16::depth, target += CompactBf16::bytes * panel_rows) {
    std::uint32_t words[3][panel_rows];
    for (Index i = 0; i < panel_rows; ++i) {
      std::uint32_t four_codes[2];
      std::memcpy(&words[0][i], &lower(i, k), 4);
      std::memcpy(&words[1][i], &lower(i, k + 4), 4);
      std::memcpy(four_codes, &codes(i, k), 8);
      words[2][i] = (four_codes[0] & 0x0F0F0F0FU) | (four_codes[1] & 0x0F0F0F0FU) << 4;
    }
    for (Index v = 0; v < 6; ++v) {
      const Words ordered = CompactBf16::ordered(*reinterpret_cast<const Words*>(words[v / 2] + v % 2 * row_lanes));
      std::memcpy(target + v * vector_bytes, &ordered, sizeof(ordered));
    }
  }
  for (Index k = 0; k < columns; ++k) {
    if (any.data[k] < none) continue;
    panel.columns.push_back(k);
    auto& column = panel.values.emplace_back();
    for (Index i = 0; i < values.rows; ++i) column[static_cast<std::size_t>(i)] = to_float(bf16{values(i, k)});
  }
  return panel;
}

/// The compact form of a weight in bf16, or in f32 with the values of bf16; none where so many columns would be kept
/// twice that it takes more than 7/8 of bf16.
inline std::optional<CompactForm> compact(ThreadPool& pool, Scratch& scratch, const StoredMatrix& w) {
  if (w.empty()) return std::nullopt;
  const Index panels = panels_of<float>(w.rows()), blocks = ceil_divide(w.cols(), CompactBf16::depth);
  CompactForm form{{panels, blocks * CompactBf16::bytes * panel_rows},
                   std::vector<CompactPanel>(static_cast<std::size_t>(panels))};
  pool.for_each_tile(panels, [&](Index p, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    const auto values = arena.matrix<std::uint16_t>(panel_rows, blocks * CompactBf16::depth);
    for (Index i = 0; i < panel_rows; ++i) {  // the last row again where there are fewer
      read_upper_halves(w, std::min(p * panel_rows + i, w.rows() - 1), values.row(i));
      std::fill(values.row(i) + w.cols(), values.row(i) + values.cols, values(i, 0));
    }
    form.panel[static_cast<std::size_t>(p)] = compact_panel(arena, values, w.cols(), &form.values(p, 0));
  });
  const auto in_bf16 = static_cast<std::size_t>(panels * panel_rows * w.cols()) * sizeof(std::uint16_t);
  if (form.bytes() > in_bf16 / 8 * 7) return std::nullopt;
  return form;
}

}  // namespace calm::inline CALM_ABI::cpu
