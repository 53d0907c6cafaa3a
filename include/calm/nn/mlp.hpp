// GatedMlp: y += W_down (Activation(x W_gate^T) * (x W_up^T)) (Shazeer, "GLU Variants", arXiv 2002.05202), and Mlp, the
// same without a gate.
//
// Contract: forward adds to y (or assigns) and writes the cache; backward overwrites dx and adds to grads.
#pragma once

#include <calm/nn/activation.hpp>
#include <calm/nn/linear.hpp>

#include <array>
#include <type_traits>

namespace calm::inline CALM_ABI {

/// Takes back what is allocated from here on, unless it is to be kept.
template <bool Kept, class Arena>
struct UnlessKept : Arena::Mark {
  using Arena::Mark::Mark;
};
template <class Arena>
struct UnlessKept<true, Arena> {
  explicit UnlessKept(Arena& /*arena*/) {}
};

template <class Activation, class Weights, class Scalar>
class GatedMlp {
 public:
  static constexpr bool trainable = Weights::trainable;
  struct Cache {
    MatrixView<Scalar> gate, up, hidden;  // [T, hidden]; hidden is kept for the gradients of weights alone
  };

  GatedMlp(const std::string& name, Index width, Index hidden, WeightSource auto&& source)
      : gate_(name + ".gate_proj", hidden, width, source), up_(name + ".up_proj", hidden, width, source),
        down_(name + ".down_proj", width, hidden, source) {}

  template <WriteMode Mode = Accumulate>
  [[gnu::cold]] void forward(auto& ctx, MatrixView<const Scalar> x, MatrixView<Scalar> y, Cache& cache,
                             Mode mode = {}) const {
    cache.gate = ctx.arena.template matrix<Scalar>(x.rows, gate_.out());
    cache.up = ctx.arena.template matrix<Scalar>(x.rows, gate_.out());
    const UnlessKept<trainable, std::decay_t<decltype(ctx.arena)>> mark(ctx.arena);
    cache.hidden = ctx.arena.template matrix<Scalar>(x.rows, gate_.out());
    forward_each(ctx, x, std::array{&gate_, &up_}, std::array{cache.gate, cache.up});  // [T, D] -> [T, hidden] each
    ctx.backend.template gated_activation<Activation>(MatrixView<const Scalar>(cache.gate),
                                                      MatrixView<const Scalar>(cache.up), cache.hidden);
    down_.forward(ctx, MatrixView<const Scalar>(cache.hidden), y, mode);  // [T, hidden] -> [T, D]
  }

  /// Values that forward makes of each row.
  Index values_of_row() const { return 3 * up_.out(); }

  template <class... Grads>
  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar> x, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              const Cache& cache, Grads&... grads) const requires(sizeof...(Grads) == 0 || trainable) {
    const auto dhidden = ctx.arena.template matrix<Scalar>(x.rows, gate_.out());
    const auto dgate = ctx.arena.template matrix<Scalar>(x.rows, gate_.out());
    const auto dup = ctx.arena.template matrix<Scalar>(x.rows, gate_.out());
    down_.backward(ctx, MatrixView<const Scalar>(cache.hidden), dy, dhidden, Assign{}, grads...);
    ctx.backend.template gated_activation_backward<Activation>(MatrixView<const Scalar>(dhidden),
                                                               MatrixView<const Scalar>(cache.gate),
                                                               MatrixView<const Scalar>(cache.up), dgate, dup);
    gate_.backward(ctx, x, MatrixView<const Scalar>(dgate), dx, Assign{}, grads...);
    up_.backward(ctx, x, MatrixView<const Scalar>(dup), dx, Accumulate{}, grads...);
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    using Map = Linear<Weights, Scalar>;
    Map::visit(self.gate_, prefix + ".gate_proj", fn);
    Map::visit(self.up_, prefix + ".up_proj", fn);
    Map::visit(self.down_, prefix + ".down_proj", fn);
  }

 private:
  Linear<Weights, Scalar> gate_, up_, down_;
};

template <class Activation, bool Bias, class Weights, class Scalar>
class Mlp {
 public:
  static constexpr bool trainable = Weights::trainable;
  struct Cache {
    MatrixView<Scalar> up, hidden;  // [T, hidden]; hidden is kept for the gradients of weights alone
  };

  Mlp(const std::string& name, Index width, Index hidden, WeightSource auto&& source)
      : up_(name + ".up_proj", hidden, width, source), down_(name + ".down_proj", width, hidden, source) {}

  template <WriteMode Mode = Accumulate>
  [[gnu::cold]] void forward(auto& ctx, MatrixView<const Scalar> x, MatrixView<Scalar> y, Cache& cache,
                             Mode mode = {}) const {
    cache.up = ctx.arena.template matrix<Scalar>(x.rows, up_.out());
    const UnlessKept<trainable, std::decay_t<decltype(ctx.arena)>> mark(ctx.arena);
    cache.hidden = ctx.arena.template matrix<Scalar>(x.rows, up_.out());
    up_.forward(ctx, x, cache.up, Assign{});  // [T, D] -> [T, hidden]
    ctx.backend.template activation<Activation>(MatrixView<const Scalar>(cache.up), cache.hidden);
    down_.forward(ctx, MatrixView<const Scalar>(cache.hidden), y, mode);  // [T, hidden] -> [T, D]
  }

  /// Values that forward makes of each row.
  Index values_of_row() const { return 2 * up_.out(); }

  template <class... Grads>
  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar> x, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              const Cache& cache, Grads&... grads) const requires(sizeof...(Grads) == 0 || trainable) {
    const auto dhidden = ctx.arena.template matrix<Scalar>(x.rows, up_.out());
    down_.backward(ctx, MatrixView<const Scalar>(cache.hidden), dy, dhidden, Assign{}, grads...);
    ctx.backend.template activation_backward<Activation>(MatrixView<const Scalar>(dhidden),
                                                         MatrixView<const Scalar>(cache.up), dhidden);
    up_.backward(ctx, x, MatrixView<const Scalar>(dhidden), dx, Assign{}, grads...);
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    LinearMap<Bias, Weights, Scalar>::visit(self.up_, prefix + ".up_proj", fn);
    LinearMap<Bias, Weights, Scalar>::visit(self.down_, prefix + ".down_proj", fn);
  }

 private:
  LinearMap<Bias, Weights, Scalar> up_, down_;
};

}  // namespace calm::inline CALM_ABI
