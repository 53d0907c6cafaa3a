// What the golden tests share: the ragged batch and the expected values of a golden.safetensors (see make_goldens.py).
#pragma once

#include <doctest/doctest.h>
#include <calm/backend/cpu.hpp>
#include <calm/backend/reference.hpp>
#include <calm/io/model_folder.hpp>
#include <calm/model/transformer.hpp>
#include <calm/model/zoo/llama.hpp>

#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

namespace golden {

using calm::Index;
using calm::TokenId;

inline std::filesystem::path folder(const std::string& name) { return std::filesystem::path(CALM_TEST_DATA) / name; }

class Expected {
 public:
  explicit Expected(const std::string& name)
      : file_(folder(name) / "golden.safetensors"), ids_(integers<TokenId>("ids")),
        offsets_(integers<Index>("offsets")) {}

  calm::TokenBatch batch() const { return {ids_, offsets_, {}, {}}; }
  std::size_t tensor_count() const { return file_.tensors().size(); }

  calm::Matrix<double> values(const std::string& tensor) const { return file_.matrix(tensor).dense<double>(); }

  /// The largest distance from the expected tensor, and the largest expected value.
  struct Distance {
    double largest_error = 0, largest_value = 0;
    double relative() const { return largest_error / largest_value; }
  };

  /// Infinite where the sizes differ or a value is not a number.
  template <class Scalar>
  Distance distance(const std::string& tensor, calm::MatrixView<Scalar> found) const {
    const calm::Matrix<double> expected = values(tensor);
    constexpr double infinity = std::numeric_limits<double>::infinity();
    Distance result;
    if (expected.rows() != found.rows || expected.cols() != found.cols) return {infinity, 1};
    for (Index r = 0; r < found.rows; ++r)
      for (Index c = 0; c < found.cols; ++c) {
        const double error = std::abs(static_cast<double>(found(r, c)) - expected(r, c));
        result.largest_error = std::isfinite(error) ? std::max(result.largest_error, error) : infinity;
        result.largest_value = std::max(result.largest_value, std::abs(expected(r, c)));
      }
    return result;
  }

 private:
  template <class Integer>
  std::vector<Integer> integers(const std::string& tensor) const {
    std::vector<Integer> result;
    const calm::Matrix<double> stored = values(tensor);
    for (const double x : stored.values()) result.push_back(static_cast<Integer>(x));
    return result;
  }

  calm::SafetensorsFile file_;
  std::vector<TokenId> ids_;
  std::vector<Index> offsets_;
};

/// An observer that holds the stream after each block to hidden.1, hidden.2, ...
struct CompareHidden {
  const Expected& expected;
  double tolerance;  // absolute
  Index seen = 0;

  template <class Scalar>
  void after_block(auto&, Index block, calm::MatrixView<Scalar>& x) {
    CAPTURE(block);
    CHECK(expected.distance("hidden." + std::to_string(block + 1), x).largest_error < tolerance);
    ++seen;
  }
  template <class Scalar>
  void after_block_backward(auto&, Index, calm::MatrixView<Scalar>) const {}
};

/// A backend and the type it computes in.
template <class BackendType, class ScalarType>
struct On {
  using Backend = BackendType;
  using Scalar = ScalarType;
  using Context = calm::Context<Backend>;
  using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, Scalar>;
  static constexpr bool is_double = std::is_same_v<Scalar, double>;
};

}  // namespace golden

// A list for TEST_CASE_TEMPLATE: the expected values are computed in double and stored as float.
#define CALM_GOLDEN_BACKENDS                                                             \
  golden::On<calm::ReferenceBackend, float>, golden::On<calm::ReferenceBackend, double>, \
      golden::On<calm::CpuBackend, float>, golden::On<calm::CpuBackend, double>
