// StoredMatrix: a frozen weight as it lies in memory or in a mapped file, with its storage type as a run-time tag.
//
// The values never change. A backend that cannot multiply the stored form keeps a packed form of its own for a product,
// made when it is first needed and counted by packed_bytes(); copies of a StoredMatrix share it. What was read of a
// mapped file for it is then given back to the system; who reads the stored rows later has them loaded again.
#pragma once

#include <calm/tensor/dtype.hpp>
#include <calm/tensor/tensor.hpp>

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>

namespace calm::inline CALM_ABI {

/// Gives the memory of bytes that can be had again, those of a file, back to the system until they are read.
using ReleaseBytes = void (*)(const std::byte* data, Index bytes);

class StoredMatrix {
 public:
  StoredMatrix() = default;

  /// A view of rows * cols values at `data`; `owner` keeps them alive (a mapped file, a Matrix). Throws ShapeError
  /// where a row is not whole blocks of the type.
  StoredMatrix(std::shared_ptr<const void> owner, const std::byte* data, DType dtype, Index rows, Index cols,
               ReleaseBytes release = nullptr)
      : owner_(std::move(owner)), data_(data), release_(release), dtype_(dtype), rows_(rows), cols_(cols),
        row_bytes_(bytes_of_row(dtype, rows, cols)), packed_(std::make_shared<PackedForms>()) {}

  /// Takes a matrix over, as it is or rounded to `dtype`.
  template <class Scalar>
  static StoredMatrix from(const Matrix<Scalar>& m, DType dtype = dtype_of<Scalar>) {
    auto bytes = std::make_shared<Matrix<std::byte>>(m.rows(), bytes_of_row(dtype, m.rows(), m.cols()));
    encode(dtype, m.data(), m.size(), bytes->data());
    const std::byte* data = bytes->data();
    return {std::move(bytes), data, dtype, m.rows(), m.cols()};
  }

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  Index size() const { return rows_ * cols_; }
  bool empty() const { return size() == 0; }
  DType dtype() const { return dtype_; }
  const std::byte* data() const { return data_; }
  const std::shared_ptr<const void>& owner() const { return owner_; }

  /// Rows [first, first + count) in place.
  StoredMatrix middle_rows(Index first, Index count) const {
    return {owner_, data_ + first * row_bytes_, dtype_, count, cols_, release_};
  }
  Index row_bytes() const { return row_bytes_; }
  Index stored_bytes() const { return rows_ * row_bytes_; }

  /// The values of rows [first, first + count) as Scalar.
  template <class Scalar>
  [[gnu::noinline]] void read_rows(Index first, Index count, Scalar* target) const {
    decode(dtype_, data_ + first * row_bytes_, count * cols_, target);
  }

  template <class Scalar>
  [[gnu::cold]] Matrix<Scalar> dense() const {
    Matrix<Scalar> result(rows_, cols_);
    read_rows(0, rows_, result.data());
    return result;
  }

  /// The values themselves where they can be read in place as Scalar, else nullptr.
  template <class Scalar>
  const Scalar* in_place() const {
    const bool aligned = reinterpret_cast<std::uintptr_t>(data_) % alignof(Scalar) == 0;
    return dtype_ == dtype_of<Scalar> && aligned ? reinterpret_cast<const Scalar*>(data_) : nullptr;
  }

  /// The packed form of type Packed, made by make() at the first call and kept. Packed has `std::size_t bytes() const`.
  /// Safe to call from several threads.
  template <class Packed, class Make>
  const Packed& packed(const Make& make) const {
    const Form* form = packed_->find(&type_tag<Packed>);
    if (!form) form = pack<Packed>(make);
    return static_cast<const FormOf<Packed>*>(form)->packed;
  }

  /// Bytes of all packed forms that exist.
  std::size_t packed_bytes() const {
    std::size_t total = 0;
    if (packed_)
      for (const Form* form = packed_->first.load(std::memory_order_acquire); form; form = form->next)
        total += form->bytes;
    return total;
  }

 private:
  /// Where there are no rows a file may claim any number of columns, also one whose bytes cannot be counted.
  static Index bytes_of_row(DType dtype, Index rows, Index cols) { return rows == 0 ? 0 : bytes_of(dtype, cols); }

  template <class T>
  static constexpr char type_tag = 0;

  struct Form {
    const void* tag;
    std::size_t bytes;
    const Form* next = nullptr;

    Form(const void* type, std::size_t size) : tag(type), bytes(size) {}
    Form(const Form&) = delete;
    Form& operator=(const Form&) = delete;
    virtual ~Form() = default;
  };
  template <class Packed>
  struct FormOf final : Form {
    Packed packed;

    FormOf(const void* type, Packed form) : Form(type, form.bytes()), packed(std::move(form)) {}
  };

  /// A list that only grows, so that it is read without the mutex.
  struct PackedForms {
    std::mutex mutex;
    std::atomic<const Form*> first{nullptr};

    PackedForms() = default;
    PackedForms(const PackedForms&) = delete;
    PackedForms& operator=(const PackedForms&) = delete;
    ~PackedForms() {
      for (const Form* form = first.load(); form;) delete std::exchange(form, form->next);
    }
    const Form* find(const void* tag) const {
      const Form* form = first.load(std::memory_order_acquire);
      while (form && form->tag != tag) form = form->next;
      return form;
    }
    /// Takes the form over. Under the mutex.
    const Form* add(Form* form) {
      form->next = first.load(std::memory_order_relaxed);
      first.store(form, std::memory_order_release);
      return form;
    }
  };

  template <class Packed, class Make>
  [[gnu::cold, gnu::noinline]] const Form* pack(const Make& make) const {
    const void* tag = &type_tag<Packed>;
    const std::lock_guard lock(packed_->mutex);
    if (const Form* form = packed_->find(tag)) return form;
    const Form* form = packed_->add(new FormOf<Packed>(tag, make()));
    if (release_) release_(data_, stored_bytes());
    return form;
  }

  std::shared_ptr<const void> owner_;
  const std::byte* data_ = nullptr;
  ReleaseBytes release_ = nullptr;
  DType dtype_ = DType::f32;
  Index rows_ = 0, cols_ = 0, row_bytes_ = 0;
  std::shared_ptr<PackedForms> packed_;
};

}  // namespace calm::inline CALM_ABI
