// What the tests of operations and models share: random values, poisoned buffers, comparisons.
#pragma once

#include <calm/backend/backend.hpp>
#include <calm/core/random.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace calm_test {

using calm::Index;
using calm::Matrix;
using calm::MatrixView;
using calm::TokenId;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool sanitized = true;
#elif defined(__has_feature)
constexpr bool sanitized = __has_feature(address_sanitizer);
#else
constexpr bool sanitized = false;
#endif

/// How often a test repeats what has no memory of its own to misuse: a sanitizer makes it slow and finds no more.
constexpr int rounds(int count) { return sanitized ? count / 8 : count; }

template <class S>
constexpr S not_a_number = std::numeric_limits<S>::quiet_NaN();

template <class S>
Matrix<S> random_matrix(Index rows, Index cols, std::uint64_t seed, double deviation = 1) {
  Matrix<S> m(rows, cols);
  calm::Random random(seed, 77);
  for (S& x : m.values()) x = static_cast<S>(deviation * random.normal());
  return m;
}

template <class S>
Matrix<S> poisoned(Index rows, Index cols) {
  Matrix<S> m(rows, cols);
  std::fill(m.values().begin(), m.values().end(), not_a_number<S>);
  return m;
}

/// A matrix whose rows lie further apart than they are long, with NaN between them.
template <class S>
class Strided {
 public:
  Strided(Index rows, Index cols) : storage_(poisoned<S>(rows, cols + 5)), cols_(cols) {}
  Strided(Index rows, Index cols, std::uint64_t seed) : Strided(rows, cols) {
    const Matrix<S> values = random_matrix<S>(rows, cols, seed);
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < cols; ++j) view()(i, j) = values(i, j);
  }

  MatrixView<S> view() { return storage_.view().middle_cols(2, cols_); }
  MatrixView<const S> in() const { return storage_.view().middle_cols(2, cols_); }

  /// Nothing was written between the rows.
  bool framed() const {
    for (Index i = 0; i < storage_.rows(); ++i)
      for (Index j = 0; j < storage_.cols(); ++j)
        if ((j < 2 || j >= 2 + cols_) && !std::isnan(storage_(i, j))) return false;
    return true;
  }

 private:
  Matrix<S> storage_;
  Index cols_;
};

template <class S>
MatrixView<const S> constant(const Matrix<S>& m) {
  return m.view();
}

/// The largest difference over the largest value of `expected`; infinite where either is no number or they differ in
/// size.
template <class S>
double relative_difference(MatrixView<const S> found, MatrixView<const S> expected) {
  if (found.rows != expected.rows || found.cols != expected.cols) return std::numeric_limits<double>::infinity();
  double difference = 0, largest = 0;
  for (Index i = 0; i < expected.rows; ++i) {
    for (Index j = 0; j < expected.cols; ++j) {
      const double d = std::abs(static_cast<double>(found(i, j)) - static_cast<double>(expected(i, j)));
      if (!std::isfinite(d)) return std::numeric_limits<double>::infinity();
      difference = std::max(difference, d);
      largest = std::max(largest, std::abs(static_cast<double>(expected(i, j))));
    }
  }
  return difference == 0 ? 0 : difference / largest;
}
template <class S>
double relative_difference(const Matrix<S>& found, const Matrix<S>& expected) {
  return relative_difference(found.view(), expected.view());
}

/// Every bit is the same, row by row.
template <class S>
bool same_bits(MatrixView<const S> a, MatrixView<const S> b) {
  if (a.rows != b.rows || a.cols != b.cols) return false;
  for (Index i = 0; i < a.rows; ++i)
    if (std::memcmp(a.row(i), b.row(i), static_cast<std::size_t>(a.cols) * sizeof(S)) != 0) return false;
  return true;
}
template <class S>
bool same_bits(const Matrix<S>& a, const Matrix<S>& b) {
  return same_bits(a.view(), b.view());
}

/// The values themselves, for a view whose memory will be used again.
template <class S>
Matrix<std::remove_const_t<S>> copy_of(MatrixView<S> m) {
  Matrix<std::remove_const_t<S>> result(m.rows, m.cols);
  for (Index i = 0; i < m.rows; ++i) std::copy_n(m.row(i), m.cols, result.view().row(i));
  return result;
}

/// The message of the exception of type E that `call` throws; "" where it throws none.
template <class E>
std::string message_of(auto&& call) {
  try {
    call();
  } catch (const E& error) {
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace calm_test
