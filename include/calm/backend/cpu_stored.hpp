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
template <class Stored, class S>
inline constexpr bool has_columns = std::is_same_v<S, float> && !std::is_same_v<Stored, double>;

/// Calls use(k, values) for all k of a whole panel of rows, and asks for the memory of the panel behind it.
template <class Columns>
[[gnu::always_inline]] inline void for_each_column(const std::byte* rows, Index row_bytes, Index depth,
                                                   const auto& use) {
  constexpr Index panel_rows = 2 * row_lanes, cache_line = 64;
  const std::byte* next = rows + panel_rows * row_bytes;
  Index k = 0;
  for (; k + Columns::depth <= depth; k += Columns::depth, rows += Columns::bytes) {
    for (Index i = 0; i < panel_rows * Columns::bytes; i += cache_line) __builtin_prefetch(next + i);
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
template <class S>
struct StoredPanel {
  const StoredMatrix& weight;
  Index first, count;  // rows

  StoredPanel(const StoredMatrix& w, Index p)
      : weight(w), first(p * panel_columns<S>), count(std::min(panel_columns<S>, w.rows() - first)) {}

  /// The bytes of panel_columns rows.
  const std::byte* rows(Arena<HostMemory>& arena) const {
    const std::byte* stored = weight.data() + first * weight.row_bytes();
    if (count == panel_columns<S>) return stored;
    auto* copy = arena.allocate<std::byte>(panel_columns<S> * weight.row_bytes());
    std::fill(std::copy_n(stored, count * weight.row_bytes(), copy), copy + panel_columns<S> * weight.row_bytes(),
              std::byte{});
    return copy;
  }

  /// y = x W^T for one row, where no panel need be made. False where the type has no such product.
  bool multiply_row(Arena<HostMemory>& arena, const S* x, S* y, bool add) const {
    return visit_dtype(weight.dtype(), [&]<class Stored>(Stored) {
      if constexpr (has_columns<Stored, S>)
        cpu::multiply_row<StoredColumns<Stored>>(x, rows(arena), weight.row_bytes(), weight.cols(), y, count, add);
      return has_columns<Stored, S>;
    });
  }

  /// Values [k, k + depth) of the rows as a panel; k is a multiple of `slice`.
  const S* decoded(Arena<HostMemory>& arena, Index k, Index depth) const {
    S* panel = arena.allocate<S>(panel_columns<S> * depth);
    visit_dtype(weight.dtype(), [&]<class Stored>(Stored) {
      const StoredBlock block = block_of(weight.dtype());
      const Index place = k / block.values * block.bytes;
      if constexpr (has_columns<Stored, S>) {
        decode_panel<StoredColumns<Stored>>(rows(arena) + place, weight.row_bytes(), depth, panel);
      } else {
        const auto values = arena.matrix<S>(count, depth);
        for (Index i = 0; i < count; ++i)
          decode(weight.dtype(), weight.data() + (first + i) * weight.row_bytes() + place, depth, values.row(i));
        pack_transposed<S>(values, 0, 1, panel);
      }
    });
    return panel;
  }
};

/// Values of a row that are decoded at once: whole blocks of every type, and a panel that stays in the cache.
inline constexpr Index slice = 256;

/// y = x w^T                                                         [T, in], [out, in] -> [T, out]
template <class S>
void multiply(ThreadPool& pool, Scratch& scratch, MatrixView<const S> x, const StoredMatrix& w, MatrixView<S> y,
              bool add) {
  constexpr Index many_rows = 8 * rows_of_tile;  // decoding is paid for by many rows
  const Index panels = panels_of<S>(w.rows()), group = std::clamp<Index>(panels / 64, 1, 8),
              groups = ceil_divide(panels, group);
  pool.for_each_tile(ceil_divide(y.rows, many_rows) * groups, [&](Index i, int thread) {
    const Index first = i % groups * group, row = i / groups * many_rows, rows = std::min(many_rows, y.rows - row);
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    for (Index p = first; p < std::min(first + group, panels); ++p) {
      arena.reset();
      const StoredPanel<S> panel(w, p);
      const auto target = y.middle_rows(row, rows).middle_cols(panel.first, panel.count);
      if (rows == 1 && panel.multiply_row(arena, x.row(row), target.data, add)) continue;
      for (Index k = 0; k == 0 || k < w.cols(); k += slice) {
        const Arena<HostMemory>::Mark mark(arena);
        const Index depth = std::min(slice, w.cols() - k);
        panel_product<S>(rows, depth, {x.row(row) + k, x.stride, 1}, panel.decoded(arena, k, depth), panel_columns<S>,
                         target, add || k > 0);
      }
    }
  });
}

/// dx = dy w                                                         [T, out], [out, in] -> [T, in]
/// The rows of w are decoded in pieces that stay in the cache.
template <class S>
void multiply_input_gradient(ThreadPool& pool, Scratch& scratch, MatrixView<const S> dy, const StoredMatrix& w,
                             MatrixView<S> dx, bool add) {
  constexpr Index many_rows = 4 * rows_of_tile, piece = 128;
  const StoredBlock block = block_of(w.dtype());
  const Index columns = ceil_divide(4 * panel_columns<S>, block.values) * block.values;
  const Index groups = ceil_divide(dx.cols, columns), row_tiles = ceil_divide(dx.rows, many_rows);
  pool.for_each_tile(row_tiles * groups, [&](Index i, int thread) {
    const Index c = i % groups * columns, count = std::min(columns, dx.cols - c);
    const Index r = i / groups * many_rows, rows = std::min(many_rows, dx.rows - r);
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    const Index whole = ceil_divide(count, panel_columns<S>) * panel_columns<S>;
    const auto values = arena.matrix<S>(piece, whole);
    const auto target = dx.middle_rows(r, rows).middle_cols(c, count);
    for (Index o = 0; o < dy.cols; o += piece) {
      const Index depth = std::min(piece, dy.cols - o);
      for (Index k = 0; k < depth; ++k) {
        decode(w.dtype(), w.data() + (o + k) * w.row_bytes() + c / block.values * block.bytes, count, values.row(k));
        std::fill(values.row(k) + count, values.row(k) + whole, S{});
      }
      for (Index j = 0; j < count; j += panel_columns<S>)
        panel_product<S>(rows, depth, {dy.row(r) + o, dy.stride, 1}, values.row(0) + j, values.stride,
                         target.middle_cols(j, std::min(panel_columns<S>, count - j)), add || o > 0);
    }
    if (dy.cols == 0 && !add)
      for (Index t = 0; t < rows; ++t) std::fill_n(target.row(t), count, S{});
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
