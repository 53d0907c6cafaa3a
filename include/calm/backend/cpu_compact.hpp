// CompactForm: bf16 weights in 12 bits a value, without loss.
//
// Decoding is a read of the weights, and a bf16 weight holds fewer than 16 bits: most of a panel's 256 exponents never
// occur. A value is kept as its 7 bits of mantissa and a code of 5 bits for sign and exponent: 15 exponents in a row,
// those that most values of the panel have, and the exponent of zero. A column of a panel where a value has another
// exponent is kept once more, as it is, and read in place of its codes. The values, so the bits of products, stay the
// same. The same holds for an f32 weight whose values are those of bf16, as where a bf16 checkpoint was stored in f32.
//
// Only where AVX-512 looks 32 codes up at once; elsewhere taking 12 bits apart costs more than reading 16.
// Source of the observation: Zhang et al., "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU
// Inference via Dynamic-Length Float" (2025), which uses Huffman codes.
#pragma once

#include <calm/backend/cpu_fields.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace calm::inline CALM_ABI::cpu {

/// 8 values of each row in 12 bytes, which are three words. A value is `code | mantissa << 5`: two lie in the first 24
/// bits of each word; of the seventh and eighth, the lower 8 bits are the last of words 0 and 1, the upper 4 the last
/// two groups of four bits of word 2.
struct CompactBf16 {
  static constexpr Index depth = 8, bytes = 12;
  static constexpr int kept = 2;
  static constexpr bool available = vector_bytes == 64;
};

/// What belongs to one panel: code c, from 1 to 15, is the exponent base + c; 0 is 0.
struct CompactPanel {
  std::uint32_t base = 0;
  std::vector<Index> columns;                         // that hold a value of another exponent, in order
  std::vector<std::array<float, panel_rows>> values;  // of these columns
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

/// Sign and exponent of each of the 32 codes, in place.
struct CompactTable {
  Words positive, negative;

  explicit CompactTable(std::uint32_t base) {
    for (Index i = 0; i < row_lanes; ++i) {
      positive[i] = i == 0 ? 0 : (base + static_cast<std::uint32_t>(i)) << 23;
      negative[i] = positive[i] | 0x80000000U;
    }
  }
  /// The values whose codes are the lowest bits of `codes`, and the mantissas bits 16 to 22 of `mantissas`.
  [[gnu::always_inline]] Floats values(Words codes, Words mantissas) const {
#if defined(__AVX512F__)
    const auto upper = _mm512_permutex2var_epi32(reinterpret_cast<__m512i>(positive), reinterpret_cast<__m512i>(codes),
                                                 reinterpret_cast<__m512i>(negative));
    return as_floats(choose_bits(0x007F0000, mantissas, reinterpret_cast<Words>(upper)));
#else
    return as_floats(codes & mantissas);  // never called: CompactBf16::available
#endif
  }
};

/// Calls use(k, the values of each part) for all k of whole panels of rows.
template <class Columns, Index Panels>
[[gnu::always_inline]] inline void for_each_column(const CompactRows<Panels>& rows, Index depth, const auto& use) {
  constexpr int parts = 2 * Panels;
  AskingAhead<Panels> from(rows);
  const auto tables = [&]<std::size_t... I>(std::index_sequence<I...>) {
    return std::array{CompactTable(rows.panel[I].base)...};
  }
  (std::make_index_sequence<static_cast<std::size_t>(Panels)>{});
  Index exception = rows.next_exception(rows.column);
  for (Index k = 0; k < depth; k += Columns::depth, from.move_on(Columns::bytes)) {
    const auto word = [&](int p, int t) {
      return *reinterpret_cast<const Words*>(from.first + p / 2 * from.panel_bytes + (2 * t + p % 2) * vector_bytes);
    };
    const auto column = [&](int j) {
      return each_part<parts>([&](int p) {
        const CompactTable& table = tables[static_cast<std::size_t>(p / 2)];
        if (j < 6)
          return table.values(move_bits(word(p, j / 2), j % 2 * 12, 0), move_bits(word(p, j / 2), j % 2 * 12 + 5, 16));
        const Words v = choose_bits(0xF00, word(p, 2) >> (j == 6 ? 16 : 20), word(p, j - 6) >> 24);
        return table.values(v, v << 11);
      });
    };
    if (k + Columns::depth <= depth && exception >= rows.column + k + Columns::depth) [[likely]] {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        if (j < 3) from.template ask<4>(4 * j);
        use(k + j, column(j));
      }
    } else {
      from.template ask<Columns::bytes>(0);
      PanelVectors<float, parts> all[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) all[j] = column(j);
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
  const Index width = w.dtype() == DType::f32 ? 4 : 2;
  const std::byte* row = w.data() + i * w.row_bytes() + width - 2;
  for (Index k = 0; k < w.cols(); ++k) std::memcpy(target + k, row + k * width, sizeof(*target));
}

/// Writes the codes of a panel to `target` from its values [panel_rows, columns].
inline CompactPanel compact_panel(MatrixView<const std::uint16_t> values, std::byte* target) {
  std::array<Index, 257> up_to{};  // how many values have a smaller exponent
  for (Index i = 0; i < values.rows; ++i)
    for (Index k = 0; k < values.cols; ++k) ++up_to[(values(i, k) >> 7 & 0xFFU) + 1U];
  for (std::size_t e = 1; e < up_to.size(); ++e) up_to[e] += up_to[e - 1];
  CompactPanel panel;
  Index most = -1;
  for (std::uint32_t base = 0; base + 15 < 256; ++base)
    if (const Index count = up_to[base + 16] - up_to[base + 1]; count > most) most = count, panel.base = base;
  for (Index k = 0; k < values.cols; k += CompactBf16::depth) {
    const Index count = std::min(CompactBf16::depth, values.cols - k);
    std::array<bool, CompactBf16::depth> coded;
    coded.fill(true);
    for (Index i = 0; i < values.rows; ++i) {
      std::array<std::uint32_t, CompactBf16::depth> all{};
      for (Index j = 0; j < count; ++j) {
        const std::uint32_t value = values(i, k + j), exponent = value >> 7 & 0xFFU;
        const std::uint32_t code = exponent == 0 ? 0 : exponent - panel.base;
        const auto at = static_cast<std::size_t>(j);
        coded[at] &= (code == 0) == (exponent == 0) && code <= 15;
        all[at] = (code & 15U) | value >> 15 << 4 | (value & 0x7FU) << 5;
      }
      const std::array words{all[0] | all[1] << 12 | all[6] << 24, all[2] | all[3] << 12 | all[7] << 24,
                             all[4] | all[5] << 12 | all[6] >> 8 << 24 | all[7] >> 8 << 28};
      std::byte* const block = target + k / CompactBf16::depth * CompactBf16::bytes * panel_rows + i * 4;
      for (Index t = 0; t < 3; ++t)
        std::memcpy(block + t * 4 * panel_rows, &words[static_cast<std::size_t>(t)], sizeof(words[0]));
    }
    for (Index j = 0; j < count; ++j) {
      if (coded[static_cast<std::size_t>(j)]) continue;
      panel.columns.push_back(k + j);
      auto& column = panel.values.emplace_back();
      for (Index i = 0; i < values.rows; ++i) column[static_cast<std::size_t>(i)] = to_float(bf16{values(i, k + j)});
    }
  }
  return panel;
}

/// The compact form of a weight in bf16, or in f32 with the values of bf16; none where so many columns would be kept
/// twice that it takes more than 7/8 of bf16.
inline std::optional<CompactForm> compact(ThreadPool& pool, Scratch& scratch, const StoredMatrix& w) {
  if (w.empty()) return std::nullopt;
  const Index panels = panels_of<float>(w.rows());
  CompactForm form{{panels, ceil_divide(w.cols(), CompactBf16::depth) * CompactBf16::bytes * panel_rows},
                   std::vector<CompactPanel>(static_cast<std::size_t>(panels))};
  pool.for_each_tile(panels, [&](Index p, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    const auto values = arena.matrix<std::uint16_t>(panel_rows, w.cols());
    for (Index i = 0; i < panel_rows; ++i)
      if (const Index row = p * panel_rows + i; row < w.rows()) read_upper_halves(w, row, values.row(i));
      else std::fill_n(values.row(i), w.cols(), std::uint16_t{});
    form.panel[static_cast<std::size_t>(p)] = compact_panel(values, &form.values(p, 0));
  });
  const auto in_bf16 = static_cast<std::size_t>(panels * panel_rows * w.cols()) * sizeof(std::uint16_t);
  if (form.bytes() > in_bf16 / 8 * 7) return std::nullopt;
  return form;
}

}  // namespace calm::inline CALM_ABI::cpu
