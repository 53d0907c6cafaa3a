// Linear: y = x W^T, with W [out, in] as PyTorch and safetensors store it; BiasedLinear: y = x W^T + b.
//
// Contract of the family: `forward(ctx, x, y, mode)` writes y, or adds to it; `backward(ctx, x, dy, dx, mode, grads)`
// gives dx by the mode and adds to grads; without grads it gives dx alone. An empty dx is not computed. A frozen Linear
// has no grads parameter: asking for one does not compile.
#pragma once

#include <calm/nn/learned_vector.hpp>

#include <array>
#include <cstddef>
#include <span>
#include <type_traits>

namespace calm::inline CALM_ABI {

template <class Weights, class Scalar>
class Linear;

template <class Scalar>
class Linear<Frozen, Scalar> {
 public:
  static constexpr bool trainable = false;

  Linear(const std::string& name, Index out, Index in, WeightSource auto&& source)
      : weight_(source(name + ".weight", out, in)) {}

  [[gnu::cold]] void forward(auto& ctx, MatrixView<const Scalar> x, MatrixView<Scalar> y, WriteMode auto mode) const {
    ctx.backend.multiply(ctx.backend.template packed<Scalar>(weight_), x, y, mode);  // [T, in] -> [T, out]
  }

  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar>, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              WriteMode auto mode) const {
    if (!dx.empty()) ctx.backend.multiply_input_gradient(ctx.backend.template packed<Scalar>(weight_), dy, dx, mode);
  }

  Index out() const { return weight_.rows(); }
  Index in() const { return weight_.cols(); }
  const StoredMatrix& weight() const { return weight_; }

  static void visit(auto& self, const std::string& prefix, auto&& fn) { fn(prefix + ".weight", self.weight_); }

 private:
  StoredMatrix weight_;
};

template <class Scalar>
class Linear<Trainable, Scalar> {
 public:
  static constexpr bool trainable = true;

  Linear(const std::string& name, Index out, Index in, WeightSource auto&& source)
      : weight_{StoredMatrix(source(name + ".weight", out, in)).template dense<Scalar>()} {}
  explicit Linear(Matrix<Scalar> weight) : weight_{std::move(weight)} {}

  [[gnu::cold]] void forward(auto& ctx, MatrixView<const Scalar> x, MatrixView<Scalar> y, WriteMode auto mode) const {
    ctx.backend.multiply(weight_.value.view(), x, y, mode);  // [T, in] -> [T, out]
  }

  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar>, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              WriteMode auto mode) const {
    if (!dx.empty()) ctx.backend.multiply_input_gradient(weight_.value.view(), dy, dx, mode);
  }
  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar> x, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              WriteMode auto mode, Gradients<Scalar>& grads) const {
    ctx.backend.multiply_weight_gradient(dy, x, grads[weight_]);
    backward(ctx, x, dy, dx, mode);
  }

  Index out() const { return weight_.value.rows(); }
  Index in() const { return weight_.value.cols(); }
  const Parameter<Scalar>& weight() const { return weight_; }
  void mark_as_table() { weight_.table = true; }

  static void visit(auto& self, const std::string& prefix, auto&& fn) { fn(prefix + ".weight", self.weight_); }

 private:
  Parameter<Scalar> weight_;
};

/// y = x W^T + scale (x A^T) B^T with W frozen, A [rank, in] random and B [out, rank] zero at the start. The source
/// says the rank and scale by its members lora_rank and lora_scale, and the seed of A by lora_seed.
template <class Scalar>
class Linear<Lora, Scalar> {
 public:
  static constexpr bool trainable = true;

  template <WeightSource Source>
  Linear(const std::string& name, Index out, Index in, Source&& source)
      : weight_(source(name + ".weight", out, in)), a_{random_linear<Scalar>(source.lora_rank, in, source.lora_seed,
                                                                             name + ".lora_A")},
        b_{Matrix<Scalar>(out, source.lora_rank)}, scale_(source.lora_scale) {
    require<ConfigError>(source.lora_rank >= 1, name, ": LoRA needs a rank of at least 1, found ", source.lora_rank);
  }

  [[gnu::cold]] void forward(auto& ctx, MatrixView<const Scalar> x, MatrixView<Scalar> y, WriteMode auto mode) const {
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    const auto down = narrow(ctx, x);                                                // [T, rank]
    ctx.backend.multiply(ctx.backend.template packed<Scalar>(weight_), x, y, mode);  // [T, in] -> [T, out]
    ctx.backend.multiply(b_.value.view(), MatrixView<const Scalar>(down), y, Accumulate{});
  }

  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar>, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              WriteMode auto mode) const {
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    to_input(ctx, dy, widen_gradient(ctx, dy), dx, mode);
  }
  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar> x, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              WriteMode auto mode, Gradients<Scalar>& grads) const {
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    const MatrixView<const Scalar> down = narrow(ctx, x);  // computed again rather than kept
    ctx.backend.multiply_weight_gradient(dy, down, grads[b_]);
    const MatrixView<const Scalar> ddown = widen_gradient(ctx, dy);
    ctx.backend.multiply_weight_gradient(ddown, x, grads[a_]);
    to_input(ctx, dy, ddown, dx, mode);
  }

  Index out() const { return weight_.rows(); }
  Index in() const { return weight_.cols(); }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    fn(prefix + ".weight", self.weight_);
    fn(prefix + ".lora_A.weight", self.a_);
    fn(prefix + ".lora_B.weight", self.b_);
  }

 private:
  [[gnu::cold]] MatrixView<Scalar> narrow(auto& ctx, MatrixView<const Scalar> x) const {  // scale x A^T
    const auto down = ctx.arena.template matrix<Scalar>(x.rows, a_.value.rows());
    ctx.backend.multiply(a_.value.view(), x, down, Assign{});
    ctx.backend.scale(MatrixView<const Scalar>(down), scale_, down);
    return down;
  }
  [[gnu::cold]] MatrixView<Scalar> widen_gradient(auto& ctx, MatrixView<const Scalar> dy) const {  // scale dy B
    const auto ddown = ctx.arena.template matrix<Scalar>(dy.rows, a_.value.rows());
    ctx.backend.multiply_input_gradient(b_.value.view(), dy, ddown, Assign{});
    ctx.backend.scale(MatrixView<const Scalar>(ddown), scale_, ddown);
    return ddown;
  }
  [[gnu::cold]] void to_input(auto& ctx, MatrixView<const Scalar> dy, MatrixView<const Scalar> ddown,
                              MatrixView<Scalar> dx, WriteMode auto mode) const {
    if (dx.empty()) return;
    ctx.backend.multiply_input_gradient(ctx.backend.template packed<Scalar>(weight_), dy, dx, mode);
    ctx.backend.multiply_input_gradient(a_.value.view(), ddown, dx, Accumulate{});
  }

  StoredMatrix weight_;
  Parameter<Scalar> a_, b_;
  double scale_ = 1;
};

template <class Weights, class Scalar>
class BiasedLinear {
 public:
  static constexpr bool trainable = Weights::trainable;

  BiasedLinear(const std::string& name, Index out, Index in, WeightSource auto&& source)
      : map_(name, out, in, source), bias_(name + ".bias", out, source) {}

  [[gnu::cold]] void forward(auto& ctx, MatrixView<const Scalar> x, MatrixView<Scalar> y, WriteMode auto mode) const {
    map_.forward(ctx, x, y, mode);
    add_bias(ctx, y);
  }

  template <class... Grads>
  [[gnu::cold]] void backward(auto& ctx, MatrixView<const Scalar> x, MatrixView<const Scalar> dy, MatrixView<Scalar> dx,
                              WriteMode auto mode, Grads&... grads) const {
    if constexpr (Weights::Other::trainable) (ctx.backend.add_columns(dy, bias_.gradient(grads)), ...);
    map_.backward(ctx, x, dy, dx, mode, grads...);
  }

  Index out() const { return map_.out(); }
  Index in() const { return map_.in(); }
  const Linear<Weights, Scalar>& map() const { return map_; }
  void add_bias(auto& ctx, MatrixView<Scalar> y) const { ctx.backend.add_bias(bias_.values(), y); }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    decltype(self.map_)::visit(self.map_, prefix, fn);
    decltype(self.bias_)::visit(self.bias_, prefix + ".bias", fn);
  }

 private:
  Linear<Weights, Scalar> map_;
  LearnedVector<typename Weights::Other, Scalar> bias_;
};

/// The linear map of an architecture that has a bias there, or has none.
template <bool Bias, class Weights, class Scalar>
using LinearMap = std::conditional_t<Bias, BiasedLinear<Weights, Scalar>, Linear<Weights, Scalar>>;

/// Several maps of the same x, which overwrite their y; frozen ones in one call of the backend.
template <class Map, class Scalar, std::size_t N>
[[gnu::cold]] void forward_each(auto& ctx, MatrixView<const Scalar> x, const std::array<const Map*, N>& maps,
                                const std::array<MatrixView<Scalar>, N>& ys) {
  if constexpr (Map::trainable) {
    for (std::size_t i = 0; i < N; ++i) maps[i]->forward(ctx, x, ys[i], Assign{});
  } else if constexpr (requires { maps[0]->map(); }) {
    std::array<const std::decay_t<decltype(maps[0]->map())>*, N> linear;
    for (std::size_t i = 0; i < N; ++i) linear[i] = &maps[i]->map();
    forward_each(ctx, x, linear, ys);
    for (std::size_t i = 0; i < N; ++i) maps[i]->add_bias(ctx, ys[i]);
  } else {
    std::array<FrozenProduct<Scalar>, N> products;
    for (std::size_t i = 0; i < N; ++i) products[i] = {&maps[i]->weight(), ys[i]};
    ctx.backend.multiply_each(x, std::span<const FrozenProduct<Scalar>>(products));
  }
}

}  // namespace calm::inline CALM_ABI
