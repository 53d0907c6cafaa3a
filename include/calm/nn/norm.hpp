// RmsNorm: y = x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich, arXiv 1910.07467), GemmaNorm, whose stored
// weight counts from one, and LayerNorm: y = (x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias (Ba et al., arXiv
// 1607.06450).
//
// Contract: forward writes y and the cache; backward(ctx, x, dy, dx, mode, cache, grads) gives dx by the mode and adds
// to grads; an empty dx is not computed. The cache holds views into the context's arena; x must still be there.
#pragma once

#include <calm/nn/learned_vector.hpp>

namespace calm::inline CALM_ABI {

template <class Weights, class Scalar>
class RmsNorm {
 public:
  static constexpr bool trainable = Weights::trainable;

  struct Cache {
    std::span<Scalar> inverse_rms;  // [T]
  };

  RmsNorm(const std::string& name, Index width, double epsilon, WeightSource auto&& source)
      : weight_(name + ".weight", width, source), epsilon_(epsilon) {}

  /// All weights one.
  RmsNorm(Index width, double epsilon)
      : weight_(LearnedVector<Weights, Scalar>::constant(width, Scalar{1})), epsilon_(epsilon) {}

  [[gnu::cold]] void forward(auto& ctx, MatrixView<const Scalar> x, MatrixView<Scalar> y, Cache& cache) const {
    cache.inverse_rms = ctx.arena.template vector<Scalar>(x.rows);
    ctx.backend.rms_norm(x, values(), epsilon_, y, cache.inverse_rms);  // [T, D] -> [T, D]
  }

  template <WriteMode Mode>
  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar> x, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              Mode mode, const Cache& cache) const {
    if (!dx.empty())
      ctx.backend.rms_norm_input_gradient(dy, x, values(), std::span<const Scalar>(cache.inverse_rms), dx, mode);
  }
  template <WriteMode Mode>
  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar> x, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              Mode mode, const Cache& cache, Gradients<Scalar>& grads) const requires trainable {
    ctx.backend.rms_norm_weight_gradient(dy, x, std::span<const Scalar>(cache.inverse_rms), weight_.gradient(grads));
    backward(ctx, x, dy, dx, mode, cache);
  }

  double epsilon() const { return epsilon_; }
  std::span<const Scalar> values() const { return weight_.values(); }
  std::span<Scalar> gradient(Gradients<Scalar>& grads) const requires trainable { return weight_.gradient(grads); }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    decltype(self.weight_)::visit(self.weight_, prefix + ".weight", fn);
  }

 protected:
  LearnedVector<Weights, Scalar> weight_;
  double epsilon_;
};

/// RmsNorm with 1 + weight in place of the weight.
template <class Weights, class Scalar>
class GemmaNorm : public RmsNorm<Weights, Scalar> {
 public:
  static_assert(!Weights::trainable, "Gemma's norms are frozen here: training would have to count them from one");

  GemmaNorm(const std::string& name, Index width, double epsilon, WeightSource auto&& source)
      : RmsNorm<Weights, Scalar>(name, width, epsilon, source) {
    this->weight_.shift(Scalar{1});
  }
};

template <class Weights, class Scalar>
class LayerNorm {
 public:
  static constexpr bool trainable = Weights::trainable;

  struct Cache {
    std::span<Scalar> mean, inverse_deviation;  // [T]
  };

  LayerNorm(const std::string& name, Index width, double epsilon, WeightSource auto&& source)
      : weight_(name + ".weight", width, source), bias_(name + ".bias", width, source), epsilon_(epsilon) {}

  [[gnu::cold]] void forward(auto& ctx, MatrixView<const Scalar> x, MatrixView<Scalar> y, Cache& cache) const {
    cache.mean = ctx.arena.template vector<Scalar>(x.rows);
    cache.inverse_deviation = ctx.arena.template vector<Scalar>(x.rows);
    ctx.backend.layer_norm(x, weight_.values(), bias_.values(), epsilon_, y, cache.mean, cache.inverse_deviation);
  }

  template <WriteMode Mode>
  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar> x, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              Mode mode, const Cache& cache) const {
    if (!dx.empty())
      ctx.backend.layer_norm_input_gradient(dy, x, weight_.values(), std::span<const Scalar>(cache.mean),
                                            std::span<const Scalar>(cache.inverse_deviation), dx, mode);
  }
  template <WriteMode Mode>
  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar> x, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              Mode mode, const Cache& cache, Gradients<Scalar>& grads) const requires trainable {
    ctx.backend.layer_norm_weight_gradient(dy, x, std::span<const Scalar>(cache.mean),
                                           std::span<const Scalar>(cache.inverse_deviation), weight_.gradient(grads));
    ctx.backend.add_columns(dy, bias_.gradient(grads));
    backward(ctx, x, dy, dx, mode, cache);
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    decltype(self.weight_)::visit(self.weight_, prefix + ".weight", fn);
    decltype(self.bias_)::visit(self.bias_, prefix + ".bias", fn);
  }

 private:
  LearnedVector<Weights, Scalar> weight_, bias_;
  double epsilon_;
};

}  // namespace calm::inline CALM_ABI
