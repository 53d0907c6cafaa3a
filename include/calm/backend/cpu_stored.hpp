// Products of CpuBackend with frozen weights as they are stored: no f32 form of them is made or kept. Results have the
// bits of the backend's own products, which pack frozen weights and are quicker where thousands of rows are multiplied.
//
//   Context<CpuBackend>(threads, stored_products)        reads the rows of the file and keeps nothing: ready at once
//   Context<CpuBackend>(threads, interleaved_products)   keeps a copy of as many bytes, in which the rows of a panel
//   are
//                                                        transposed: best for decoding, where the copy pays for itself
//                                                        within a few tokens
//
// A panel of rows is decoded, for one row of x straight into the sums, for more into the scratch of the thread, which
// register_tile then multiplies. Either way the products of an element are added in the order of k, so that its bits
// depend on its own row and column alone (cpu_product.hpp).
#pragma once

#include <calm/backend/cpu_stored_columns.hpp>

namespace calm::inline CALM_ABI {
namespace cpu {

/// Calls fn(k, count, rows) for pieces of `count` columns from k on. Ahead of a piece the memory is asked for that
/// of the panel behind: into the second cache, which waits for more lines at a time than the first and which a panel
/// fits into.
template <class Columns>
[[gnu::always_inline]] inline void for_each_piece(StoredRows rows, Index depth, const auto& fn) {
  constexpr Index cache_line = 64;
  const std::byte* next = rows.first + panel_rows * rows.row_bytes;
  Index k = 0;
  for (; k + Columns::depth <= depth; k += Columns::depth, rows = rows.from(Columns::bytes)) {
    for (Index i = 0; i < panel_rows * Columns::bytes; i += cache_line) __builtin_prefetch(next + i, 0, 2);
    next += panel_rows * Columns::bytes;
    fn(k, std::integral_constant<Index, Columns::depth>{}, rows);
  }
  if constexpr (Columns::depth < 32) {  // what is no block may end anywhere
    if (k == depth) return;
    std::byte rest[panel_rows * Columns::bytes] = {};
    const Index left = depth - k, bytes = left * Columns::bytes / Columns::depth;
    for (Index i = 0; i < panel_rows; ++i)
      std::copy_n(rows.first + i * rows.row_bytes, bytes, rest + i * Columns::bytes);
    fn(k, left, StoredRows{rest, Columns::bytes});
  }
}
template <class Columns>
[[gnu::always_inline]] inline void for_each_piece(InterleavedRows rows, Index depth, const auto& fn) {
  Index k = 0;
  for (; k + Columns::depth <= depth; k += Columns::depth, rows = rows.from(Columns::bytes))
    fn(k, std::integral_constant<Index, Columns::depth>{}, rows);
  if (k < depth) fn(k, depth - k, rows);
}

/// Calls use(k, values) for all k of a whole panel of rows.
template <class Columns>
[[gnu::always_inline]] inline void for_each_column(auto rows, Index depth, const auto& use) {
  for_each_piece<Columns>(rows, depth, [&](Index k, auto count, auto block) {
    Columns::decode(block, [&](int j, const PanelFloats& values) {
      if (j < count) use(k + j, values);
    });
  });
}

/// y = x W^T for one row x and a panel of rows of W, or added to y.
template <class Columns>
[[gnu::noinline]] void multiply_row(const float* x, auto rows, Index depth, float* y, Index columns, bool add) {
  float edge[panel_columns<float>] = {};
  float* target = columns == panel_columns<float> ? y : edge;
  if (target == edge) std::copy_n(y, columns, edge);
  auto* const parts = reinterpret_cast<Floats*>(target);
  Floats first = {}, second = {};
  if (add) first = parts[0], second = parts[1];
  for_each_column<Columns>(rows, depth, [&](Index k, const PanelFloats& values) {
    first += x[k] * values.part[0];
    second += x[k] * values.part[1];
  });
  parts[0] = first, parts[1] = second;
  if (target == edge) std::copy_n(edge, columns, y);
}

/// The panel [depth, panel_columns] of cpu_product.hpp.
template <class Columns>
[[gnu::noinline]] void decode_panel(auto rows, Index depth, float* panel) {
  for_each_column<Columns>(rows, depth, [&](Index k, const PanelFloats& values) {
    std::memcpy(panel + k * panel_columns<float>, &values, sizeof(values));
  });
}

/// The rows of panel p of a weight, in the scratch of the thread where it has fewer than a panel.
inline StoredRows rows_of_panel(Arena<HostMemory>& arena, const StoredMatrix& w, Index p) {
  const Index first = p * panel_rows, count = std::min(panel_rows, w.rows() - first), bytes = w.row_bytes();
  const std::byte* stored = w.data() + first * bytes;
  if (count == panel_rows) return {stored, bytes};
  auto* copy = arena.allocate<std::byte>(panel_rows * bytes);
  std::fill(std::copy_n(stored, count * bytes, copy), copy + panel_rows * bytes, std::byte{});
  return {copy, bytes};
}

/// A weight whose panels are interleaved, in the stored type. The last blocks of rows that are none are filled up.
struct InterleavedForm {
  Matrix<std::byte> values;  // a panel a row

  std::size_t bytes() const { return values.bytes(); }
  InterleavedRows panel(Index p) const { return {&values(p, 0)}; }
};

template <class Stored>
InterleavedForm interleaved(ThreadPool& pool, Scratch& scratch, const StoredMatrix& w) {
  using Columns = StoredColumns<Stored>;
  const Index panels = panels_of<float>(w.rows()), blocks = ceil_divide(w.cols(), Columns::depth);
  InterleavedForm form{Matrix<std::byte>(panels, blocks * Columns::bytes * panel_rows)};
  pool.for_each_tile(panels, [&](Index p, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    for_each_piece<Columns>(rows_of_panel(arena, w, p), w.cols(), [&](Index k, auto, StoredRows rows) {
      std::byte* const target = &form.values(p, k / Columns::depth * Columns::bytes * panel_rows);
      Columns::decode(Interleaver{rows, target}, [](int, const PanelFloats&) {});
    });
  });
  return form;
}

/// Values of a row that are decoded at once: whole blocks of every type, and a panel that stays in the cache.
inline constexpr Index slice = 256;

/// y = x w^T, for panel(arena, p): the rows of panel p of w            [T, in], [out, in] -> [T, out]
template <class Columns>
void multiply_columns(ThreadPool& pool, Scratch& scratch, MatrixView<const float> x, Index out, MatrixView<float> y,
                      bool add, const auto& panel) {
  constexpr Index many_rows = 8 * rows_of_tile;  // decoding is paid for by many rows
  const Index panels = panels_of<float>(out), group = std::clamp<Index>(panels / 64, 1, 8);
  for_each_block(pool, y.rows, many_rows, panels, group, [&](const Block& b, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    for (Index p = b.column; p < b.column + b.columns; ++p) {
      arena.reset();
      const auto rows = panel(arena, p);
      const Index first = p * panel_rows, count = std::min(panel_rows, out - first);
      const auto target = y.middle_rows(b.row, b.rows).middle_cols(first, count);
      if (b.rows == 1) {
        multiply_row<Columns>(x.row(b.row), rows, x.cols, target.data, count, add);
        continue;
      }
      float* const values = arena.allocate<float>(slice * panel_columns<float>);
      for (Index k = 0; k == 0 || k < x.cols; k += slice) {
        const Index depth = std::min(slice, x.cols - k);
        decode_panel<Columns>(rows.from(k / Columns::depth * Columns::bytes), depth, values);
        panel_product<float>(b.rows, depth, {x.row(b.row) + k, x.stride, 1}, values, panel_columns<float>, target,
                             add || k > 0);
      }
    }
  });
}

/// dx = dy w                                                         [T, out], [out, in] -> [T, in]
/// The rows of w are decoded in pieces that stay in the cache.
inline void multiply_input_gradient(ThreadPool& pool, Scratch& scratch, MatrixView<const float> dy,
                                    const StoredMatrix& w, MatrixView<float> dx, bool add) {
  constexpr Index many_rows = 4 * rows_of_tile, piece = 128, width = panel_columns<float>;
  const StoredBlock block = block_of(w.dtype());
  const Index columns = ceil_divide(4 * width, block.values) * block.values;
  for_each_block(pool, dx.rows, many_rows, dx.cols, columns, [&](const Block& b, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    const Index whole = ceil_divide(b.columns, width) * width;
    const auto values = arena.matrix<float>(piece, whole);
    const auto target = dx.middle_rows(b.row, b.rows).middle_cols(b.column, b.columns);
    for (Index o = 0; o < dy.cols; o += piece) {
      const Index depth = std::min(piece, dy.cols - o);
      for (Index k = 0; k < depth; ++k) {
        decode(w.dtype(), w.data() + (o + k) * w.row_bytes() + b.column / block.values * block.bytes, b.columns,
               values.row(k));
        std::fill(values.row(k) + b.columns, values.row(k) + whole, 0.0F);
      }
      for (Index j = 0; j < b.columns; j += width)
        panel_product<float>(b.rows, depth, {dy.row(b.row) + o, dy.stride, 1}, values.row(0) + j, values.stride,
                             target.middle_cols(j, std::min(width, b.columns - j)), add || o > 0);
    }
    if (dy.cols == 0 && !add)
      for (Index t = 0; t < b.rows; ++t) std::fill_n(target.row(t), b.columns, 0.0F);
  });
}

enum class StoredForm { rows, interleaved };

template <StoredForm Form>
class StoredProducts final : public Products {
 public:
  explicit StoredProducts(ThreadPool& pool) : pool_(pool), scratch_(static_cast<std::size_t>(pool.size())) {}

  void multiply(MatrixView<const float> x, const StoredMatrix& w, MatrixView<float> y, bool add) override {
    visit_dtype(w.dtype(), [&]<class Stored>(Stored) {
      using Columns = StoredColumns<Stored>;
      const auto product = [&](const auto& panel) {
        multiply_columns<Columns>(pool_, scratch_, x, w.rows(), y, add, panel);
      };
      if constexpr (Form == StoredForm::interleaved) {
        const auto& form = w.packed<InterleavedForm>([&] { return cpu::interleaved<Stored>(pool_, scratch_, w); });
        product([&](auto&, Index p) { return form.panel(p); });
      } else {
        product([&](auto& arena, Index p) { return rows_of_panel(arena, w, p); });
      }
    });
  }
  void multiply(MatrixView<const float> x, MatrixView<const float> w, MatrixView<float> y, bool add) override {
    cpu::multiply(pool_, scratch_, x, w, y, add);
  }
  void multiply_input_gradient(MatrixView<const float> dy, const StoredMatrix& w, MatrixView<float> dx,
                               bool add) override {
    cpu::multiply_input_gradient(pool_, scratch_, dy, w, dx, add);
  }
  void multiply_input_gradient(MatrixView<const float> dy, MatrixView<const float> w, MatrixView<float> dx,
                               bool add) override {
    cpu::multiply_input_gradient(pool_, scratch_, dy, w, dx, add);
  }
  void multiply_weight_gradient(MatrixView<const float> dy, MatrixView<const float> x, MatrixView<float> dw) override {
    cpu::multiply_weight_gradient(pool_, scratch_, dy, x, dw);
  }

 private:
  ThreadPool& pool_;
  Scratch scratch_;  // one for each thread
};

}  // namespace cpu

inline std::unique_ptr<cpu::Products> stored_products(ThreadPool& pool) {
  return std::make_unique<cpu::StoredProducts<cpu::StoredForm::rows>>(pool);
}
inline std::unique_ptr<cpu::Products> interleaved_products(ThreadPool& pool) {
  return std::make_unique<cpu::StoredProducts<cpu::StoredForm::interleaved>>(pool);
}

}  // namespace calm::inline CALM_ABI
