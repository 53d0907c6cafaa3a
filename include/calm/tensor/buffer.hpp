// Buffer: a matrix whose memory is kept when it is resized, for states that outlive a pass.
#pragma once

#include <calm/tensor/tensor.hpp>

namespace calm::inline CALM_ABI {

template <class T>
class Buffer {
 public:
  /// rows x cols values, uninitialised where they were not set before. Asks for memory only to grow.
  MatrixView<T> resize(Index rows, Index cols) {
    if (rows * cols > storage_.size()) storage_ = Matrix<T>(1, rows * cols);
    rows_ = rows;
    cols_ = cols;
    return view();
  }

  MatrixView<T> view() { return {storage_.data(), rows_, cols_}; }
  MatrixView<const T> view() const { return {storage_.data(), rows_, cols_}; }
  std::size_t bytes() const { return storage_.bytes(); }

 private:
  Matrix<T> storage_;
  Index rows_ = 0, cols_ = 0;
};

}  // namespace calm::inline CALM_ABI
