// Views of row-major matrices. A view owns nothing; rows may lie further apart than they are long.
#pragma once

#include <calm/core/error.hpp>

#include <span>
#include <type_traits>

namespace calm::inline CALM_ABI {

template <class T>
struct MatrixView {
  T* data = nullptr;
  Index rows = 0, cols = 0;
  Index stride = 0;  // elements from one row to the next

  MatrixView() = default;
  MatrixView(T* first, Index row_count, Index col_count) : MatrixView(first, row_count, col_count, col_count) {}
  MatrixView(T* first, Index row_count, Index col_count, Index row_stride)
      : data(first), rows(row_count), cols(col_count), stride(row_stride) {}

  /// A view of mutable values is also a view of constant ones.
  operator MatrixView<const T>() const requires(!std::is_const_v<T>) { return {data, rows, cols, stride}; }

  T* row(Index i) const { return data + i * stride; }
  T& operator()(Index i, Index j) const { return data[i * stride + j]; }
  bool empty() const { return rows == 0 || cols == 0; }

  MatrixView middle_rows(Index first, Index count) const { return {data + first * stride, count, cols, stride}; }
  MatrixView middle_cols(Index first, Index count) const {
    return {rows == 0 ? data : data + first, rows, count, stride};  // a matrix without rows may have no memory at all
  }
};

/// The values of a matrix whose rows follow each other without gaps.
template <class T>
std::span<T> flat(MatrixView<T> m) {
  require<ShapeError>(m.stride == m.cols || m.rows <= 1, "flat: the rows of this matrix are not contiguous");
  return {m.data, static_cast<std::size_t>(m.rows * m.cols)};
}

}  // namespace calm::inline CALM_ABI
