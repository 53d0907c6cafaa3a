// Matrix products of CpuBackend on fixed tiles.
//
// One register tile serves all products: c[i][j] = sum over k of a(i, k) b(k, j), the products of an element added one
// after the other in the order of k. An element's bits therefore depend on its own row and column alone: not on
// threads, tile sizes, the batch around it, the width of the machine's vectors, or the size of its caches. Eigen's
// product is not used for these reasons, and because it packs both operands anew at each call; cpu.hpp uses Eigen's
// vectorised functions.
#pragma once

#include <calm/backend/backend.hpp>
#include <calm/backend/cpu_transpose.hpp>
#include <calm/core/arithmetic.hpp>
#include <calm/core/parallel.hpp>
#include <calm/tensor/packed_matrix.hpp>

#include <algorithm>
#include <cstring>
#include <memory>

namespace calm::inline CALM_ABI {
namespace cpu {

/// Products of f32 linear maps that a CpuBackend calls in place of its own: y = x w^T and its gradients, as backend.hpp
/// has them; `add` adds to what is written. Behind a pointer, so that a program compiles only those that it asks for.
class Products {
 public:
  virtual ~Products() = default;
  virtual void multiply(MatrixView<const float> x, const StoredMatrix& w, MatrixView<float> y, bool add) = 0;
  virtual void multiply(MatrixView<const float> x, MatrixView<const float> w, MatrixView<float> y, bool add) = 0;
  virtual void multiply_each(MatrixView<const float> x, std::span<const FrozenProduct<float>> products) {
    for (const auto& [weight, y] : products) multiply(x, *weight, y, false);
  }
  virtual void multiply_input_gradient(MatrixView<const float> dy, const StoredMatrix& w, MatrixView<float> dx,
                                       bool add) = 0;
  virtual void multiply_input_gradient(MatrixView<const float> dy, MatrixView<const float> w, MatrixView<float> dx,
                                       bool add) = 0;
  virtual void multiply_weight_gradient(MatrixView<const float> dy, MatrixView<const float> x,
                                        MatrixView<float> dw) = 0;
};

}  // namespace cpu

/// Makes the products of a CpuBackend on its threads; such as bf16_products of cpu_bf16.hpp.
using MakeProducts = std::unique_ptr<cpu::Products> (*)(ThreadPool&);

/// The products of this header, with frozen weights packed in the type of the operands.
inline constexpr MakeProducts own_products = nullptr;

namespace cpu {

inline constexpr Index tile_rows = vector_bytes == 64 ? 8 : 6;  // with two columns of vectors all registers are used

/// Columns of a register tile: two vectors. Panels of this width are what a packed operand is made of.
template <class S>
inline constexpr Index panel_columns = 2 * lanes_of<S>;

/// An operand a(i, k) = data[i * row_step + k * depth_step].
template <class S>
struct Strided {
  const S* data;
  Index row_step, depth_step;
};

/// What one step of k adds to an element. Operands of another type than the sums specialise it (cpu_bf16.hpp).
template <class In>
struct Multiplication {
  static Vector<In> add(Vector<In> sum, In a, Vector<In> b) { return multiply_add<In>(every_lane(a), b, sum); }
};

/// Rows that may be wider than those that they come from: the rest becomes zero.
template <class S>
[[gnu::noinline]] void copy_rows(MatrixView<const S> from, MatrixView<S> to) {
  for (Index i = 0; i < to.rows; ++i)
    std::fill(std::copy_n(from.row(i), from.cols, to.row(i)), to.row(i) + to.cols, S{});
}

/// c [Rows, Vectors of a panel] = a b, or added to c; b has `depth` rows, b_stride apart. c may be narrower: `columns`.
/// In is the type of the operands and as wide as S. `a` by reference: a copy on the stack would be read in wider pieces
/// than it is written in, for which a processor waits until all earlier writes are done. The sums stay in registers:
/// for that they begin in one way, with what is in c or with zeros that are read as if they were c, and the compiler is
/// asked to unroll the loops over them before it places variables. The memory is asked for the rows that come next, and
/// for those that are written: so short rows are not foreseen.
template <Index Rows, Index Vectors, class In, class S>
void register_tile(Index depth, const Strided<In>& a, const In* b, Index b_stride, S* c, Index c_stride, Index columns,
                   bool add) {
  using V = Vector<S>;
  constexpr Index lanes = lanes_of<S>, line = 64 / static_cast<Index>(sizeof(S));
  constexpr Index width = Vectors * lanes;
  static constexpr S zeros[width] = {};
  const bool whole = columns == width;
  S buffer[Rows * width];  // in place of c where that is narrower, all rows at a time: a row alone would be read back
                           // before it is written
  S* const target = whole ? c : buffer;
  const Index stride = whole ? c_stride : width;
  if (add && !whole) copy_rows<S>({c, Rows, columns, c_stride}, {buffer, Rows, width});
  const S* const begin = add ? target : zeros;
  const Index begin_stride = add ? stride : 0;
  const S* const next = c + (add ? Rows : 0) * c_stride;
  V sum[Rows][Vectors];
#pragma GCC unroll 8
  for (Index i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (Index j = 0; j < Vectors; ++j) sum[i][j] = *reinterpret_cast<const V*>(begin + i * begin_stride + j * lanes);
#pragma GCC unroll 2
    for (Index j = 0; j < width; j += line) __builtin_prefetch(next + i * c_stride + j, 1);
  }
  for (Index k = 0; k < depth;) {
    const Index end = std::min(depth, k + line);
#pragma GCC unroll 8
    for (Index i = 0; i < Rows; ++i) __builtin_prefetch(a.data + (Rows + i) * a.row_step + k * a.depth_step);
    for (; k < end; ++k) {
      Vector<In> part[Vectors];
#pragma GCC unroll 2
      for (Index j = 0; j < Vectors; ++j) part[j] = *reinterpret_cast<const Vector<In>*>(b + k * b_stride + j * lanes);
#pragma GCC unroll 8
      for (Index i = 0; i < Rows; ++i) {
        const In value = a.data[i * a.row_step + k * a.depth_step];
#pragma GCC unroll 2
        for (Index j = 0; j < Vectors; ++j) sum[i][j] = Multiplication<In>::add(sum[i][j], value, part[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (Index i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (Index j = 0; j < Vectors; ++j) *reinterpret_cast<V*>(target + i * stride + j * lanes) = sum[i][j];
  if (!whole) copy_rows<S>({buffer, Rows, columns, width}, {c, Rows, columns, c_stride});
}

/// One panel of columns for any number of rows; of a panel that is at most half used half is read and computed.
template <class In, class S>
[[gnu::noinline]] void panel_product(Index rows, Index depth, Strided<In> a, const In* b, Index b_stride,
                                     MatrixView<S> c, bool add) {
  const auto all = [&]<Index Vectors>(std::integral_constant<Index, Vectors>) {
    Index i = 0;
    const auto some = [&]<Index Rows>(std::integral_constant<Index, Rows>) {
      for (; i + Rows <= rows; i += Rows)
        register_tile<Rows, Vectors>(depth, Strided<In>{a.data + i * a.row_step, a.row_step, a.depth_step}, b, b_stride,
                                     c.row(i), c.stride, c.cols, add);
    };
    some(std::integral_constant<Index, tile_rows>{});
    if constexpr (Vectors == 2) {
      if constexpr (tile_rows == 6) some(std::integral_constant<Index, 4>{});
      some(std::integral_constant<Index, 2>{});
    }
    some(std::integral_constant<Index, 1>{});
  };
  if (c.cols <= lanes_of<S>) all(std::integral_constant<Index, 1>{});
  else all(std::integral_constant<Index, 2>{});
}

/// c = a b for b [depth, columns] with contiguous rows, or added to c. `edge` has room for depth * panel_columns
/// values.
template <class S>
void product(Index depth, Strided<S> a, MatrixView<const S> b, MatrixView<S> c, bool add, S* edge) {
  constexpr Index width = panel_columns<S>;
  // Many rows that lie far apart fall on few lines of the first cache: their panel is copied, which pays where a line
  // serves fewer multiplications than with vectors of 64 bytes.
  const bool scattered = vector_bytes < 64 && depth >= 256 && b.stride >= 256 && c.rows >= 4 * tile_rows;
  for (Index j = 0; j < c.cols; j += width) {
    const Index columns = std::min(width, c.cols - j);
    const S* panel = b.data + j;
    Index stride = b.stride;
    if (scattered || columns % lanes_of<S> != 0) {  // of the latter whole vectors would be read beyond the row
      copy_rows<S>(b.middle_cols(j, columns), {edge, depth, width});
      panel = edge;
      stride = width;
    }
    panel_product<S>(c.rows, depth, a, panel, stride, c.middle_cols(j, columns), add);
  }
}

/// w [out, in] as panels of w^T: panel p holds columns [p * width, ...) as [in, width], filled up with zeros.
template <class S>
void pack_transposed(MatrixView<const S> w, Index first_panel, Index panels, S* target) {
  constexpr Index width = panel_columns<S>;
  for (Index p = 0; p < panels; ++p) transpose_rows<width>(w, (first_panel + p) * width, target + p * width * w.cols);
}

template <class S>
Index panels_of(Index columns) {
  return ceil_divide(columns, panel_columns<S>);
}

/// What a thread needs beside the operands; grows to the largest product.
using Scratch = std::vector<Arena<HostMemory>>;

/// One for each thread, each with its first piece of memory: a thread may take its first tile at any time.
inline Scratch scratch_of(const ThreadPool& pool) {
  Scratch scratch(static_cast<std::size_t>(pool.size()));
  for (auto& arena : scratch) arena.allocate<std::byte>(1), arena.reset();
  return scratch;
}

/// c = a b^T, or added to c, for operands that are used once.
template <class S>
void product_abt(Arena<HostMemory>& arena, MatrixView<const S> a, MatrixView<const S> b, MatrixView<S> c, bool add) {
  const Arena<HostMemory>::Mark mark(arena);
  const Index panels = panels_of<S>(b.rows), size = panel_columns<S> * b.cols;
  S* packed = arena.allocate<S>(panels * size);
  pack_transposed(b, 0, panels, packed);
  for (Index p = 0; p < panels; ++p) {
    const Index column = p * panel_columns<S>;
    panel_product<S>(a.rows, a.cols, {a.data, a.stride, 1}, packed + p * size, panel_columns<S>,
                     c.middle_cols(column, std::min(panel_columns<S>, b.rows - column)), add);
  }
}

/// A part of a matrix: rows [row, row + rows) of columns [column, column + columns).
struct Block {
  Index row, rows, column, columns;
};

/// Cuts [rows, columns] into blocks of at most [row_step, column_step] and calls fn(Block, thread) for each.
template <class Fn>
void for_each_block(ThreadPool& pool, Index rows, Index row_step, Index columns, Index column_step, const Fn& fn) {
  const Index across = ceil_divide(columns, column_step);
  pool.for_each_tile(ceil_divide(rows, row_step) * across, [&](Index i, int thread) {
    const Index row = i / across * row_step, column = i % across * column_step;
    fn(Block{row, std::min(row_step, rows - row), column, std::min(column_step, columns - column)}, thread);
  });
}

/// Rows and panels of a tile, from the sizes alone: few rows (decoding) are cut into narrower tiles.
inline constexpr Index rows_of_tile = 96;  // register tiles of any machine divide it
inline Index panels_of_tile(Index rows) { return rows >= 32 ? 4 : 2; }

/// All panels of a weight's transpose: the packed form of a frozen one.
template <class S>
struct PanelForm {
  PackedMatrix<S> values;  // [panels, width * in]
  Index out, in;

  PanelForm(Index rows, Index cols) : values(panels_of<S>(rows), panel_columns<S> * cols), out(rows), in(cols) {}
  std::size_t bytes() const { return values.bytes(); }
};

/// The packed form of a frozen weight, made by all threads; read(arena, first, rows) gives its rows from `first` on.
template <class S>
PanelForm<S> pack_rows(ThreadPool& pool, Scratch& scratch, Index out, Index in, const auto& read) {
  PanelForm<S> form(out, in);
  pool.for_each_tile(form.values.rows(), [&](Index p, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    const Index first = p * panel_columns<S>;
    const MatrixView<S> rows = arena.matrix<S>(std::min(panel_columns<S>, out - first), in);
    read(arena, first, rows);
    pack_transposed<S>(rows, 0, 1, &form.values(p, 0));
  });
  return form;
}

/// Calls fn(row, rows, panel) for the rows and panels of a product; of many panels, which stay in no cache, each tile
/// has all rows, so that they are read once.
template <class Fn>
void for_each_panel(ThreadPool& pool, Index rows, Index panels, const Fn& fn) {
  constexpr Index many_panels = 512;
  const Index row_step = panels < many_panels ? rows_of_tile : 8 * rows_of_tile;
  for_each_block(pool, rows, row_step, panels, panels_of_tile(rows), [&](const Block& b, int) {
    for (Index row = b.row; row < b.row + b.rows; row += rows_of_tile)
      for (Index p = b.column; p < b.column + b.columns; ++p) fn(row, std::min(rows_of_tile, b.row + b.rows - row), p);
  });
}

/// y = x w^T for a packed w                                          [T, in], [out, in] -> [T, out]
template <class S>
void multiply(ThreadPool& pool, MatrixView<const S> x, const PanelForm<S>& w, MatrixView<S> y, bool add) {
  for_each_panel(pool, y.rows, w.values.rows(), [&](Index row, Index rows, Index p) {
    const Index column = p * panel_columns<S>;
    panel_product<S>(rows, w.in, {x.row(row), x.stride, 1}, &w.values(p, 0), panel_columns<S>,
                     y.middle_rows(row, rows).middle_cols(column, std::min(panel_columns<S>, w.out - column)), add);
  });
}

/// y = x w^T for a w that changes: a tile packs what it needs     [T, in], [out, in] -> [T, out]
template <class S>
void multiply(ThreadPool& pool, Scratch& scratch, MatrixView<const S> x, MatrixView<const S> w, MatrixView<S> y,
              bool add) {
  constexpr Index many_rows = 8 * rows_of_tile;  // packing is paid for by many rows
  const Index columns = panels_of_tile(y.rows) * panel_columns<S>;
  for_each_block(pool, y.rows, many_rows, w.rows, columns, [&](const Block& b, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    product_abt(arena, x.middle_rows(b.row, b.rows), w.middle_rows(b.column, b.columns),
                y.middle_rows(b.row, b.rows).middle_cols(b.column, b.columns), add);
  });
}

/// dx = dy w                                                         [T, out], [out, in] -> [T, in]
template <class S>
void multiply_input_gradient(ThreadPool& pool, Scratch& scratch, MatrixView<const S> dy, MatrixView<const S> w,
                             MatrixView<S> dx, bool add) {
  const Index columns = panels_of_tile(dx.rows) * panel_columns<S>;
  for_each_block(pool, dx.rows, rows_of_tile, dx.cols, columns, [&](const Block& b, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    product<S>(dy.cols, {dy.row(b.row), dy.stride, 1}, w.middle_cols(b.column, b.columns),
               dx.middle_rows(b.row, b.rows).middle_cols(b.column, b.columns), add,
               arena.allocate<S>(dy.cols * panel_columns<S>));
  });
}

/// dw += dy^T x                                                      [T, out], [T, in] -> [out, in]
/// The tokens are taken in pieces that stay in the cache.
template <class S>
void multiply_weight_gradient(ThreadPool& pool, Scratch& scratch, MatrixView<const S> dy, MatrixView<const S> x,
                              MatrixView<S> dw) {
  constexpr Index out_tile = 64, token_tile = 512;
  for_each_block(pool, dw.rows, out_tile, dw.cols, 4 * panel_columns<S>, [&](const Block& b, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    S* edge = arena.allocate<S>(token_tile * panel_columns<S>);
    for (Index t = 0; t < x.rows; t += token_tile) {
      const Index tokens = std::min(token_tile, x.rows - t);
      product<S>(tokens, {dy.row(t) + b.row, 1, dy.stride}, x.middle_rows(t, tokens).middle_cols(b.column, b.columns),
                 dw.middle_rows(b.row, b.rows).middle_cols(b.column, b.columns), true, edge);
    }
  });
}

/// The products of this header with weights that change, for classes that multiply frozen ones in a form of their own.
class OwnProducts : public Products {
 public:
  explicit OwnProducts(ThreadPool& pool) : pool_(pool), scratch_(scratch_of(pool)) {}

  using Products::multiply;
  using Products::multiply_input_gradient;

  void multiply(MatrixView<const float> x, MatrixView<const float> w, MatrixView<float> y, bool add) override {
    cpu::multiply(pool_, scratch_, x, w, y, add);
  }
  void multiply_input_gradient(MatrixView<const float> dy, MatrixView<const float> w, MatrixView<float> dx,
                               bool add) override {
    cpu::multiply_input_gradient(pool_, scratch_, dy, w, dx, add);
  }
  void multiply_weight_gradient(MatrixView<const float> dy, MatrixView<const float> x, MatrixView<float> dw) override {
    cpu::multiply_weight_gradient(pool_, scratch_, dy, x, dw);
  }

 protected:
  ThreadPool& pool_;
  Scratch scratch_;  // one for each thread
};

}  // namespace cpu
}  // namespace calm::inline CALM_ABI
