// PackedMatrix: the memory of a packed form of a weight, row-major, 64-byte aligned, in huge pages.
#pragma once

#include <calm/core/huge_pages.hpp>
#include <calm/tensor/view.hpp>

#include <algorithm>
#include <memory>

namespace calm::inline CALM_ABI {

template <class T>
class PackedMatrix {
 public:
  /// rows x cols zeros.
  PackedMatrix(Index rows, Index cols) : rows_(rows), cols_(cols), memory_(allocate_in_huge_pages(bytes())) {
    std::fill_n(data(), rows * cols, T{});
  }

  PackedMatrix(const PackedMatrix&) = delete;  // it would share what it holds
  PackedMatrix& operator=(const PackedMatrix&) = delete;
  PackedMatrix(PackedMatrix&&) = default;
  PackedMatrix& operator=(PackedMatrix&&) = default;
  ~PackedMatrix() = default;

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  std::size_t bytes() const { return static_cast<std::size_t>(rows_ * cols_) * sizeof(T); }

  T* data() { return reinterpret_cast<T*>(memory_.get()); }
  const T* data() const { return reinterpret_cast<const T*>(memory_.get()); }
  T& operator()(Index i, Index j) { return data()[i * cols_ + j]; }
  const T& operator()(Index i, Index j) const { return data()[i * cols_ + j]; }

 private:
  Index rows_, cols_;
  std::shared_ptr<std::byte> memory_;
};

}  // namespace calm::inline CALM_ABI
