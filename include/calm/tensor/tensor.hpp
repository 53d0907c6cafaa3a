// Matrix: an owned, row-major, 64-byte aligned matrix of values. A vector is a matrix of one row.
#pragma once

#include <calm/core/huge_pages.hpp>
#include <calm/tensor/view.hpp>

#include <algorithm>
#include <memory>
#include <new>
#include <utility>

namespace calm::inline CALM_ABI {

template <class T>
class Matrix {
 public:
  Matrix() = default;

  /// rows x cols zeros.
  Matrix(Index rows, Index cols) : rows_(rows), cols_(cols) {
    require<ShapeError>(rows >= 0 && cols >= 0, "Matrix: negative size ", rows, " x ", cols);
    if (size() == 0) return;
    data_.reset(static_cast<T*>(::operator new (bytes(), std::align_val_t{alignment})));
    ask_for_huge_pages(data_.get(), bytes());
    std::fill_n(data_.get(), size(), T{});
  }

  Matrix(const Matrix& other) : Matrix(other.rows_, other.cols_) {
    std::copy_n(other.data_.get(), other.size(), data_.get());
  }
  Matrix& operator=(const Matrix& other) {
    if (this != &other) *this = Matrix(other);
    return *this;
  }
  Matrix(Matrix&& other) noexcept
      : data_(std::move(other.data_)), rows_(std::exchange(other.rows_, 0)), cols_(std::exchange(other.cols_, 0)) {}
  Matrix& operator=(Matrix&& other) noexcept {
    data_ = std::move(other.data_);
    rows_ = std::exchange(other.rows_, 0);
    cols_ = std::exchange(other.cols_, 0);
    return *this;
  }
  ~Matrix() = default;

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  Index size() const { return rows_ * cols_; }
  std::size_t bytes() const { return static_cast<std::size_t>(size()) * sizeof(T); }
  bool empty() const { return size() == 0; }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator()(Index i, Index j) { return data_[static_cast<std::size_t>(i * cols_ + j)]; }
  const T& operator()(Index i, Index j) const { return data_[static_cast<std::size_t>(i * cols_ + j)]; }

  MatrixView<T> view() { return {data(), rows_, cols_}; }
  MatrixView<const T> view() const { return {data(), rows_, cols_}; }
  std::span<T> values() { return {data(), static_cast<std::size_t>(size())}; }
  std::span<const T> values() const { return {data(), static_cast<std::size_t>(size())}; }

 private:
  static constexpr std::size_t alignment = 64;
  struct Free {
    void operator()(T* p) const { ::operator delete (p, std::align_val_t{alignment}); }
  };

  std::unique_ptr<T[], Free> data_;
  Index rows_ = 0, cols_ = 0;
};

}  // namespace calm::inline CALM_ABI
