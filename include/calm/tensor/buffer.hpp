// Buffer: a matrix whose memory is kept when it is resized, for states that outlive a pass.
#pragma once

#include <calm/tensor/tensor.hpp>

#include <vector>

namespace calm::inline CALM_ABI {

template <class T>
class Buffer {
 public:
  /// rows x cols values, uninitialised where they were not set before. Asks for memory only to grow.
  [[gnu::cold]] MatrixView<T> resize(Index rows, Index cols) {
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

/// `count` items, made anew unless there are as many. std::vector's resize() keeps those that there are, for which a
/// program compiles how to move them.
template <class Item>
void make_as_many(std::vector<Item>& items, std::size_t count) {
  if (items.size() != count) items = std::vector<Item>(count);
}

}  // namespace calm::inline CALM_ABI
