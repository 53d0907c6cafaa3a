// Matrix products of CpuBackend: Eigen's general product on fixed tiles, one thread each.
//
// A tile is at most 128 x 128 x 256, so that Eigen packs it on the stack (at most 128 kB) and never allocates.
#pragma once

#include <calm/backend/backend.hpp>
#include <calm/core/arithmetic.hpp>
#include <calm/core/parallel.hpp>

#include <Eigen/Core>

namespace calm::inline CALM_ABI::cpu {

template <class S>
using RowMajor = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class S>
using Map = Eigen::Map<std::conditional_t<std::is_const_v<S>, const RowMajor<std::remove_const_t<S>>, RowMajor<S>>,
                       Eigen::Unaligned, Eigen::OuterStride<>>;

template <class S>
Map<S> map(MatrixView<S> m) {
  return {m.data, m.rows, m.cols, Eigen::OuterStride<>(m.stride)};
}

template <class S>
void set_zero(MatrixView<S> m) {
  for (Index i = 0; i < m.rows; ++i) std::fill_n(m.row(i), m.cols, S{});
}

// The three products that everything is made of, one expression each: Eigen's product is costly to compile.

/// c = a b^T, or added to c.
template <class S>
void product_abt(MatrixView<const S> a, MatrixView<const S> b, MatrixView<S> c, bool accumulate) {
  if (!accumulate) set_zero(c);
  map(c).noalias() += map(a) * map(b).transpose();
}

/// c = a b, or added to c.
template <class S>
void product_ab(MatrixView<const S> a, MatrixView<const S> b, MatrixView<S> c, bool accumulate) {
  if (!accumulate) set_zero(c);
  map(c).noalias() += map(a) * map(b);
}

/// c = a^T b, or added to c.
template <class S>
void product_atb(MatrixView<const S> a, MatrixView<const S> b, MatrixView<S> c, bool accumulate) {
  if (!accumulate) set_zero(c);
  map(c).noalias() += map(a).transpose() * map(b);
}

inline constexpr Index row_tile = 128, col_tile = 128, depth_tile = 256;

/// Calls product(first, size) for ranges of the depth, in order and of nearly equal size; for an empty depth once.
template <class Product>
void over_depth(Index depth, const Product& product) {
  const Index parts = std::max<Index>(1, ceil_divide(depth, depth_tile));
  const Index size = ceil_divide(ceil_divide(depth, parts), 8) * 8;
  product(Index{0}, std::min(size, depth));
  for (Index k = size; k < depth; k += size) product(k, std::min(size, depth - k));
}

/// Calls tile(first row, rows, first column, columns) for a partition of rows x cols that depends on these alone.
template <class Tile>
void for_each_block(ThreadPool& pool, Index rows, Index cols, const Tile& tile) {
  const Index row_size = row_tile, col_size = rows >= 64 ? col_tile : 64;
  const Index row_tiles = ceil_divide(rows, row_size), col_tiles = ceil_divide(cols, col_size);
  pool.for_each_tile(row_tiles * col_tiles, [&](Index i, int) {
    const Index r = i / col_tiles * row_size, c = i % col_tiles * col_size;
    tile(r, std::min(row_size, rows - r), c, std::min(col_size, cols - c));
  });
}

/// y = x w^T                                                         [T, in], [out, in] -> [T, out]
template <class S, WriteMode Mode>
void multiply(ThreadPool& pool, MatrixView<const S> x, MatrixView<const S> w, MatrixView<S> y, Mode) {
  for_each_block(pool, y.rows, y.cols, [&](Index r, Index rows, Index c, Index cols) {
    over_depth(x.cols, [&](Index k, Index depth) {
      product_abt(x.middle_rows(r, rows).middle_cols(k, depth), w.middle_rows(c, cols).middle_cols(k, depth),
                  y.middle_rows(r, rows).middle_cols(c, cols), k > 0 || std::is_same_v<Mode, Accumulate>);
    });
  });
}

/// dx = dy w                                                         [T, out], [out, in] -> [T, in]
template <class S, WriteMode Mode>
void multiply_input_gradient(ThreadPool& pool, MatrixView<const S> dy, MatrixView<const S> w, MatrixView<S> dx, Mode) {
  for_each_block(pool, dx.rows, dx.cols, [&](Index r, Index rows, Index c, Index cols) {
    over_depth(dy.cols, [&](Index k, Index depth) {
      product_ab(dy.middle_rows(r, rows).middle_cols(k, depth), w.middle_rows(k, depth).middle_cols(c, cols),
                 dx.middle_rows(r, rows).middle_cols(c, cols), k > 0 || std::is_same_v<Mode, Accumulate>);
    });
  });
}

/// dw += dy^T x                                                      [T, out], [T, in] -> [out, in]
template <class S>
void multiply_weight_gradient(ThreadPool& pool, MatrixView<const S> dy, MatrixView<const S> x, MatrixView<S> dw) {
  constexpr Index out_tile = 64;
  const Index row_tiles = ceil_divide(dw.rows, out_tile), col_tiles = ceil_divide(dw.cols, col_tile);
  pool.for_each_tile(row_tiles * col_tiles, [&](Index i, int) {
    const Index r = i / col_tiles * out_tile, c = i % col_tiles * col_tile;
    const Index rows = std::min(out_tile, dw.rows - r), cols = std::min(col_tile, dw.cols - c);
    over_depth(x.rows, [&](Index t, Index depth) {
      product_atb(dy.middle_rows(t, depth).middle_cols(r, rows), x.middle_rows(t, depth).middle_cols(c, cols),
                  dw.middle_rows(r, rows).middle_cols(c, cols), true);
    });
  });
}

}  // namespace calm::inline CALM_ABI::cpu
