// Products of CpuBackend with frozen weights as they are stored, for Context<CpuBackend>(threads, stored_products): no
// form of them is made or kept, and a token that is decoded costs one read of the bytes of the file. Results have the
// bits of the backend's own products, which pack frozen weights and are quicker where thousands of rows are multiplied.
//
// A panel of rows is decoded, for one row of x straight into the sums, for more into the scratch of the thread, which
// register_tile then multiplies. Either way the products of an element are added in the order of k, so that its bits
// depend on its own row and column alone (cpu_product.hpp).
#pragma once

#include <calm/backend/cpu_stored_columns.hpp>

namespace calm::inline CALM_ABI {
namespace cpu {

/// The stored types that are decoded in vectors.
template <class Stored>
inline constexpr bool has_columns = !std::is_same_v<Stored, double>;

/// Calls use(k, values) for all k of a whole panel of rows, and asks for the memory of the panel behind it: into the
/// second cache, which waits for more lines at a time than the first and which a panel fits into.
template <class Columns>
[[gnu::always_inline]] inline void for_each_column(const std::byte* rows, Index row_bytes, Index depth,
                                                   const auto& use) {
  constexpr Index panel_rows = 2 * row_lanes, cache_line = 64;
  const std::byte* next = rows + panel_rows * row_bytes;
  Index k = 0;
  for (; k + Columns::depth <= depth; k += Columns::depth, rows += Columns::bytes) {
    for (Index i = 0; i < panel_rows * Columns::bytes; i += cache_line) __builtin_prefetch(next + i, 0, 2);
    next += panel_rows * Columns::bytes;
    Columns::decode(rows, row_bytes, [&](int j, const PanelFloats& values) { use(k + j, values); });
  }
  if constexpr (Columns::depth < 32) {  // what is no block may end anywhere
    if (k == depth) return;
    std::byte rest[panel_rows * Columns::bytes] = {};
    const Index left = depth - k, left_bytes = left * Columns::bytes / Columns::depth;
    for (Index i = 0; i < panel_rows; ++i) std::copy_n(rows + i * row_bytes, left_bytes, rest + i * Columns::bytes);
    Columns::decode(rest, Columns::bytes, [&](int j, const PanelFloats& values) {
      if (j < left) use(k + j, values);
    });
  }
}

/// y = x W^T for one row x and a panel of rows of W, or added to y.
template <class Columns>
[[gnu::noinline]] void multiply_row(const float* x, const std::byte* rows, Index row_bytes, Index depth, float* y,
                                    Index columns, bool add) {
  float edge[panel_columns<float>] = {};
  float* target = columns == panel_columns<float> ? y : edge;
  if (target == edge) std::copy_n(y, columns, edge);
  PanelFloats sum = {};
  if (add) std::memcpy(&sum, target, sizeof(sum));
  for_each_column<Columns>(rows, row_bytes, depth, [&](Index k, const PanelFloats& values) {
    sum.part[0] += x[k] * values.part[0];
    sum.part[1] += x[k] * values.part[1];
  });
  std::memcpy(target, &sum, sizeof(sum));
  if (target == edge) std::copy_n(edge, columns, y);
}

/// The panel [depth, panel_columns] of cpu_product.hpp.
template <class Columns>
[[gnu::noinline]] void decode_panel(const std::byte* rows, Index row_bytes, Index depth, float* panel) {
  for_each_column<Columns>(rows, row_bytes, depth, [&](Index k, const PanelFloats& values) {
    std::memcpy(panel + k * panel_columns<float>, &values, sizeof(values));
  });
}

/// Panel p of a weight, with room for the rows that an edge lacks.
struct StoredPanel {
  const StoredMatrix& weight;
  Index first, count;  // rows

  StoredPanel(const StoredMatrix& w, Index p)
      : weight(w), first(p * panel_columns<float>), count(std::min(panel_columns<float>, w.rows() - first)) {}

  /// The bytes of panel_columns rows.
  const std::byte* rows(Arena<HostMemory>& arena) const {
    const std::byte* stored = weight.data() + first * weight.row_bytes();
    if (count == panel_columns<float>) return stored;
    auto* copy = arena.allocate<std::byte>(panel_columns<float> * weight.row_bytes());
    std::fill(std::copy_n(stored, count * weight.row_bytes(), copy), copy + panel_columns<float> * weight.row_bytes(),
              std::byte{});
    return copy;
  }

  /// y = x W^T for one row, where no panel need be made. False where the type has no such product.
  bool multiply_row(Arena<HostMemory>& arena, const float* x, float* y, bool add) const {
    return visit_dtype(weight.dtype(), [&]<class Stored>(Stored) {
      if constexpr (has_columns<Stored>)
        cpu::multiply_row<StoredColumns<Stored>>(x, rows(arena), weight.row_bytes(), weight.cols(), y, count, add);
      return has_columns<Stored>;
    });
  }

  /// Values [k, k + depth) of the rows as a panel; k is a multiple of `slice`.
  const float* decoded(Arena<HostMemory>& arena, Index k, Index depth) const {
    float* panel = arena.allocate<float>(panel_columns<float> * depth);
    visit_dtype(weight.dtype(), [&]<class Stored>(Stored) {
      const StoredBlock block = block_of(weight.dtype());
      const Index place = k / block.values * block.bytes;
      if constexpr (has_columns<Stored>) {
        decode_panel<StoredColumns<Stored>>(rows(arena) + place, weight.row_bytes(), depth, panel);
      } else {
        const auto values = arena.matrix<float>(count, depth);
        for (Index i = 0; i < count; ++i)
          decode(weight.dtype(), weight.data() + (first + i) * weight.row_bytes() + place, depth, values.row(i));
        pack_transposed<float>(values, 0, 1, panel);
      }
    });
    return panel;
  }
};

/// Values of a row that are decoded at once: whole blocks of every type, and a panel that stays in the cache.
inline constexpr Index slice = 256;

/// y = x w^T                                                         [T, in], [out, in] -> [T, out]
inline void multiply(ThreadPool& pool, Scratch& scratch, MatrixView<const float> x, const StoredMatrix& w,
                     MatrixView<float> y, bool add) {
  constexpr Index many_rows = 8 * rows_of_tile;  // decoding is paid for by many rows
  const Index panels = panels_of<float>(w.rows()), group = std::clamp<Index>(panels / 64, 1, 8);
  for_each_block(pool, y.rows, many_rows, panels, group, [&](const Block& b, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    for (Index p = b.column; p < b.column + b.columns; ++p) {
      arena.reset();
      const StoredPanel panel(w, p);
      const auto target = y.middle_rows(b.row, b.rows).middle_cols(panel.first, panel.count);
      if (b.rows == 1 && panel.multiply_row(arena, x.row(b.row), target.data, add)) continue;
      for (Index k = 0; k == 0 || k < w.cols(); k += slice) {
        const Arena<HostMemory>::Mark mark(arena);
        const Index depth = std::min(slice, w.cols() - k);
        panel_product<float>(b.rows, depth, {x.row(b.row) + k, x.stride, 1}, panel.decoded(arena, k, depth),
                             panel_columns<float>, target, add || k > 0);
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

class StoredProducts final : public Products {
 public:
  explicit StoredProducts(ThreadPool& pool) : pool_(pool), scratch_(static_cast<std::size_t>(pool.size())) {}

  void multiply(MatrixView<const float> x, const StoredMatrix& w, MatrixView<float> y, bool add) override {
    cpu::multiply(pool_, scratch_, x, w, y, add);
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
  return std::make_unique<cpu::StoredProducts>(pool);
}

}  // namespace calm::inline CALM_ABI
