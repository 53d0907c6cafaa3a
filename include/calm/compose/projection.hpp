// Projection: the learned linear map R^{D_A} -> R^{D_B} (f_proj in the paper), of full or low rank.
//
// Contract: forward writes y; backward adds to grads and overwrites dx unless that is empty.
#pragma once

#include <calm/nn/linear.hpp>

#include <optional>

namespace calm::inline CALM_ABI {

template <class Scalar>
class Projection {
 public:
  using View = MatrixView<Scalar>;
  using ConstView = MatrixView<const Scalar>;
  struct Cache {
    View down;  // [T, rank], low rank only
  };

  /// `rank` 0: one map [to, from]; else down [rank, from], then up [to, rank].
  Projection(Index to, Index from, Index rank, std::uint64_t seed, const std::string& name) {
    require<ConfigError>(rank >= 0 && rank <= std::min(to, from), name, ": rank ", rank, " of a map [", to, ", ", from,
                         "]");
    if (rank == 0) {
      full_.emplace(random_linear<Scalar>(to, from, seed, name));
    } else {
      down_.emplace(random_linear<Scalar>(rank, from, seed, name + ".down"));
      up_.emplace(random_linear<Scalar>(to, rank, seed, name + ".up"));
    }
  }

  [[gnu::cold]] void forward(auto& ctx, ConstView x, View y, Cache& cache) const {
    if (full_) return full_->forward(ctx, x, y, Assign{});  // [T, D_A] -> [T, D_B]
    cache.down = ctx.arena.template matrix<Scalar>(x.rows, down_->out());
    down_->forward(ctx, x, cache.down, Assign{});           // [T, D_A] -> [T, rank]
    up_->forward(ctx, ConstView(cache.down), y, Assign{});  // [T, rank] -> [T, D_B]
  }

  [[gnu::cold]] void backward(auto& ctx, ConstView x, ConstView dy, View dx, const Cache& cache,
                              Gradients<Scalar>& grads) const {
    if (full_) return full_->backward(ctx, x, dy, dx, Assign{}, grads);
    const View ddown = ctx.arena.template matrix<Scalar>(x.rows, down_->out());
    up_->backward(ctx, ConstView(cache.down), dy, ddown, Assign{}, grads);
    down_->backward(ctx, x, ConstView(ddown), dx, Assign{}, grads);
  }

  /// W [n, to] after the projection, as one map [n, from].
  [[gnu::cold]] Matrix<Scalar> folded_under(auto& ctx, ConstView w) const {
    Matrix<Scalar> result(w.rows, from());
    if (full_) {
      ctx.backend.multiply_input_gradient(full_->weight().value.view(), w, result.view(), Assign{});
      return result;
    }
    Matrix<Scalar> narrow(w.rows, rank());
    ctx.backend.multiply_input_gradient(up_->weight().value.view(), w, narrow.view(), Assign{});
    ctx.backend.multiply_input_gradient(down_->weight().value.view(), ConstView(narrow.view()), result.view(),
                                        Assign{});
    return result;
  }

  /// The one map of a projection of full rank, else nullptr.
  const Parameter<Scalar>* full() const { return full_ ? &full_->weight() : nullptr; }

  Index from() const { return full_ ? full_->in() : down_->in(); }
  Index to() const { return full_ ? full_->out() : up_->out(); }
  Index rank() const { return full_ ? 0 : down_->out(); }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    using Map = Linear<Trainable, Scalar>;
    if (self.full_) Map::visit(*self.full_, prefix, fn);
    if (self.down_) Map::visit(*self.down_, prefix + ".down", fn);
    if (self.up_) Map::visit(*self.up_, prefix + ".up", fn);
  }

 private:
  std::optional<Linear<Trainable, Scalar>> full_, down_, up_;
};

}  // namespace calm::inline CALM_ABI
