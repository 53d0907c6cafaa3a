// RmsNorm: y = x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich, arXiv 1910.07467).
//
// Contract: forward writes y and the cache; backward(ctx, x, dy, dx, mode, cache, grads) gives dx by the mode and adds
// to grads; an empty dx is not computed. The cache holds views into the context's arena; x must still be there.
#pragma once

#include <calm/nn/parameter.hpp>

namespace calm::inline CALM_ABI {

template <class Weights, class Scalar>
class RmsNorm {
 public:
  static constexpr bool trainable = Weights::trainable;

  struct Cache {
    std::span<Scalar> inverse_rms;  // [T]
  };

  RmsNorm(const std::string& name, Index width, double epsilon, WeightSource auto&& source)
      : RmsNorm(StoredMatrix(source(name + ".weight", 1, width)), epsilon) {}

  /// All weights one.
  RmsNorm(Index width, double epsilon) : RmsNorm(ones(width), epsilon) {}

  void forward(auto& ctx, MatrixView<const Scalar> x, MatrixView<Scalar> y, Cache& cache) const {
    cache.inverse_rms = ctx.arena.template vector<Scalar>(x.rows);
    ctx.backend.rms_norm(x, values(), epsilon_, y, cache.inverse_rms);  // [T, D] -> [T, D]
  }

  template <WriteMode Mode>
  void backward(auto& ctx, MatrixView<const Scalar> x, MatrixView<const Scalar> dy, MatrixView<Scalar> dx, Mode mode,
                const Cache& cache) const {
    if (!dx.empty())
      ctx.backend.rms_norm_input_gradient(dy, x, values(), std::span<const Scalar>(cache.inverse_rms), dx, mode);
  }
  template <WriteMode Mode>
  void backward(auto& ctx, MatrixView<const Scalar> x, MatrixView<const Scalar> dy, MatrixView<Scalar> dx, Mode mode,
                const Cache& cache, Gradients<Scalar>& grads) const requires trainable {
    ctx.backend.rms_norm_weight_gradient(dy, x, std::span<const Scalar>(cache.inverse_rms), flat(grads[weight_]));
    backward(ctx, x, dy, dx, mode, cache);
  }

  double epsilon() const { return epsilon_; }
  std::span<const Scalar> values() const { return std::as_const(weight_.value).values(); }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    if constexpr (trainable) fn(prefix + ".weight", self.weight_);
    else fn(prefix + ".weight", self.stored_);
  }

 private:
  RmsNorm(StoredMatrix weight, double epsilon) : weight_{weight.dense<Scalar>(), false}, epsilon_(epsilon) {
    if constexpr (!trainable) stored_ = std::move(weight);
  }
  static StoredMatrix ones(Index width) {
    Matrix<Scalar> weight(1, width);
    std::fill(weight.values().begin(), weight.values().end(), Scalar{1});
    return StoredMatrix::from(weight);
  }

  struct Nothing {};
  Parameter<Scalar> weight_;
  [[no_unique_address]] std::conditional_t<trainable, Nothing, StoredMatrix> stored_;
  double epsilon_;
};

}  // namespace calm::inline CALM_ABI
