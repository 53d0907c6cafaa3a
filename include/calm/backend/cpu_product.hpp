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

inline constexpr Index row_tile = 128, col_tile = 128, depth_tile = 256;

/// `y = sum over depth of product(depth range)`, the ranges in order and of nearly equal size.
template <class Product>
void over_depth(Index depth, bool assign, const Product& product) {
  const Index parts = std::max<Index>(1, ceil_divide(depth, depth_tile));
  const Index size = ceil_divide(ceil_divide(depth, parts), 8) * 8;
  for (Index k = 0; k < depth; k += size) product(k, std::min(size, depth - k), assign && k == 0);
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
    auto target = map(y.middle_rows(r, rows).middle_cols(c, cols));
    over_depth(x.cols, std::is_same_v<Mode, Assign>, [&](Index k, Index depth, bool assign) {
      const auto a = map(x.middle_rows(r, rows).middle_cols(k, depth));
      const auto b = map(w.middle_rows(c, cols).middle_cols(k, depth));
      if (assign) target.noalias() = a * b.transpose();
      else target.noalias() += a * b.transpose();
    });
  });
}

/// dx = dy w                                                         [T, out], [out, in] -> [T, in]
template <class S, WriteMode Mode>
void multiply_input_gradient(ThreadPool& pool, MatrixView<const S> dy, MatrixView<const S> w, MatrixView<S> dx, Mode) {
  for_each_block(pool, dx.rows, dx.cols, [&](Index r, Index rows, Index c, Index cols) {
    auto target = map(dx.middle_rows(r, rows).middle_cols(c, cols));
    over_depth(dy.cols, std::is_same_v<Mode, Assign>, [&](Index k, Index depth, bool assign) {
      const auto a = map(dy.middle_rows(r, rows).middle_cols(k, depth));
      const auto b = map(w.middle_rows(k, depth).middle_cols(c, cols));
      if (assign) target.noalias() = a * b;
      else target.noalias() += a * b;
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
    auto target = map(dw.middle_rows(r, rows).middle_cols(c, cols));
    over_depth(x.rows, false, [&](Index t, Index depth, bool) {
      target.noalias() += map(dy.middle_rows(t, depth).middle_cols(r, rows)).transpose() *
                          map(x.middle_rows(t, depth).middle_cols(c, cols));
    });
  });
}

}  // namespace calm::inline CALM_ABI::cpu
