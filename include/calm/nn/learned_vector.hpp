// LearnedVector: the values of a norm, a bias or another vector [D], frozen or trainable.
//
// The values are read in the scalar type once. A frozen one keeps the stored form beside them, which is what is hashed
// and saved.
#pragma once

#include <calm/nn/parameter.hpp>

namespace calm::inline CALM_ABI {

template <class Weights, class Scalar>
class LearnedVector {
 public:
  static constexpr bool trainable = Weights::trainable;

  LearnedVector(const std::string& name, Index width, WeightSource auto&& source)
      : LearnedVector(StoredMatrix(source(name, 1, width))) {}
  explicit LearnedVector(StoredMatrix stored) : values_{stored.dense<Scalar>(), false} {
    if constexpr (!trainable) stored_ = std::move(stored);
  }
  static LearnedVector constant(Index width, Scalar value) {
    Matrix<Scalar> values(1, width);
    std::fill(values.values().begin(), values.values().end(), value);
    return LearnedVector(StoredMatrix::from(values));
  }

  std::span<const Scalar> values() const { return std::as_const(values_.value).values(); }
  std::span<Scalar> gradient(Gradients<Scalar>& grads) const requires trainable { return flat(grads[values_]); }

  /// Adds a number to every value of a frozen vector, after the stored form: Gemma's norms count from one.
  void shift(Scalar amount) requires(!trainable) {
    for (Scalar& x : values_.value.values()) x += amount;
  }

  static void visit(auto& self, const std::string& name, auto&& fn) {
    if constexpr (trainable) fn(name, self.values_);
    else fn(name, self.stored_);
  }

 private:
  struct Nothing {};
  Parameter<Scalar> values_;
  [[no_unique_address]] std::conditional_t<trainable, Nothing, StoredMatrix> stored_;
};

}  // namespace calm::inline CALM_ABI
