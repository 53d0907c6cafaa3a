// KeyValueMap: the keys and values that a bridge makes of an augment's states.
//
//   K = norm_A(A) W_proj^T W_K^T,  V = norm_A(A) W_proj^T W_V^T
//
// Either map by map, or, where it is cheaper, on the folded weights W_K W_proj diag(w) and W_V W_proj diag(w), with the
// norm's weight w: then each position meets two maps in place of three, and its gradients two in place of six. Which
// of the two follows from the sizes and from the number of anchor tokens: that of the augment's depends on the text, so
// that a late token could change the bits of early ones.
#pragma once

#include <calm/compose/projection.hpp>
#include <calm/nn/norm.hpp>

namespace calm::inline CALM_ABI {

/// Of one map [to, from], or of two through a rank.
inline Index weights_of_projection(Index to, Index from, Index rank) {
  return rank > 0 ? rank * (to + from) : to * from;
}

/// Whether so many positions pay for two products of weights, [to, to] x [to, from]; their gradients then
/// gain more than they do.
inline bool folding_pays(Index to, Index from, Index rank, Index rows) {
  const Index saved = 2 * to * to - to * from;  // by each position
  return rank == 0 && saved > 0 && rows > 2 * to * to * from / saved;
}

template <class Scalar>
class KeyValueMap {
 public:
  using View = MatrixView<Scalar>;
  using ConstView = MatrixView<const Scalar>;
  using Norm = RmsNorm<Trainable, Scalar>;
  using Direction = RmsNorm<Frozen, Scalar>;
  using Map = Linear<Trainable, Scalar>;

  /// What backward needs; `projected` map by map, the other two folded.
  struct Cache {
    ConstView input;       // [Ta, D_A] what the first map reads
    View projected;        // [Ta, D_B]
    ConstView projection;  // [D_B, D_A] W_proj diag(w)
    typename Norm::Cache norm;
    typename Projection<Scalar>::Cache low_rank;
    bool folded = false;
  };

  /// What decoding multiplies by: W_K W_proj and W_V W_proj where that is cheaper, else nothing.
  struct Folded {
    Matrix<Scalar> k, v;  // [D_B, D_A]
  };

  KeyValueMap(const std::string& name, Index anchor_width, Index augment_width, bool norm, Index rank,
              std::uint64_t seed)
      : projection_(anchor_width, augment_width, rank, seed, name + ".projection"),
        k_(random_linear<Scalar>(anchor_width, anchor_width, seed, name + ".k_proj")),
        v_(random_linear<Scalar>(anchor_width, anchor_width, seed, name + ".v_proj")) {
    if (!norm) return;
    norm_.emplace(augment_width, 1e-6);
    direction_.emplace(augment_width, 1e-6);
  }

  /// Overwrites k and v, for a batch of so many tokens of the anchor.    a [Ta, D_A] -> [Ta, D_B]
  [[gnu::cold]] void forward(auto& ctx, Index anchor_tokens, ConstView a, View k, View v, Cache& cache) const {
    cache.folded = folding_pays(to(), from(), rank(), anchor_tokens);
    if (!cache.folded) {
      cache.input = normed(ctx, norm_, a, cache.norm);
      return separate(ctx, k, v, cache);
    }
    typename Direction::Cache unused;
    cache.input = normed(ctx, direction_, a, unused);
    cache.projection = weighted_projection(ctx);
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    const View folded = ctx.arena.template matrix<Scalar>(to(), from());
    for (const auto& [map, y] : {std::pair(&k_, k), std::pair(&v_, v)}) {
      ctx.backend.multiply_input_gradient(cache.projection, map->weight().value.view(), folded, Assign{});
      ctx.backend.multiply(ConstView(folded), cache.input, y, Assign{});
    }
  }

  /// Adds to grads, from the gradients of k and v.
  [[gnu::cold]] void backward(auto& ctx, ConstView a, ConstView dk, ConstView dv, const Cache& cache,
                              Gradients<Scalar>& grads) const {
    if (!cache.folded) return separate_backward(ctx, a, dk, dv, cache, grads);
    const View dfolded = ctx.arena.template matrix<Scalar>(to(), from()),
               dprojection = ctx.arena.template matrix<Scalar>(to(), from());
    ctx.backend.set_zero(dprojection);
    for (const auto& [map, dy] : {std::pair(&k_, dk), std::pair(&v_, dv)}) {
      ctx.backend.set_zero(dfolded);
      ctx.backend.multiply_weight_gradient(dy, cache.input, dfolded);
      ctx.backend.multiply(cache.projection, ConstView(dfolded), grads[map->weight()], Accumulate{});
      ctx.backend.multiply_weight_gradient(map->weight().value.view(), ConstView(dfolded), dprojection);
    }
    const Parameter<Scalar>& projection = *projection_.full();
    if (!norm_) return ctx.backend.add(ConstView(dprojection), grads[projection]);
    ctx.backend.scale_columns(ConstView(dprojection), norm_->values(), grads[projection], Accumulate{});
    ctx.backend.add_column_products(projection.value.view(), ConstView(dprojection), norm_->gradient(grads));
  }

  /// The weights that forward_folded() multiplies by; they must be folded again after a weight has changed.
  [[gnu::cold]] Folded fold(auto& ctx) const {
    if (2 * to() * from() >= weights_of_projection(to(), from(), rank()) + 2 * to() * to()) return {};
    return {projection_.folded_under(ctx, k_.weight().value.view()),
            projection_.folded_under(ctx, v_.weight().value.view())};
  }

  /// forward() for new positions while the weights stand still.
  [[gnu::cold]] void forward_folded(auto& ctx, const Folded& folded, ConstView a, View k, View v) const {
    Cache cache;
    cache.input = normed(ctx, norm_, a, cache.norm);
    if (folded.k.empty()) return separate(ctx, k, v, cache);
    ctx.backend.multiply(folded.k.view(), cache.input, k, Assign{});
    ctx.backend.multiply(folded.v.view(), cache.input, v, Assign{});
  }

  Index from() const { return projection_.from(); }
  Index to() const { return projection_.to(); }
  Index rank() const { return projection_.rank(); }

  // In three parts: a bridge has weights of its own between them.
  static void visit_projection(auto& self, const std::string& prefix, auto&& fn) {
    Projection<Scalar>::visit(self.projection_, prefix + ".projection", fn);
  }
  static void visit_maps(auto& self, const std::string& prefix, auto&& fn) {
    Map::visit(self.k_, prefix + ".k_proj", fn);
    Map::visit(self.v_, prefix + ".v_proj", fn);
  }
  static void visit_norm(auto& self, const std::string& prefix, auto&& fn) {
    if (self.norm_) Norm::visit(*self.norm_, prefix + ".norm_augment", fn);
  }

 private:
  [[gnu::cold]] ConstView weighted_projection(auto& ctx) const {  // W_proj diag(w)
    const ConstView projection = projection_.full()->value.view();
    if (!norm_) return projection;
    const View weighted = ctx.arena.template matrix<Scalar>(to(), from());
    ctx.backend.scale_columns(projection, norm_->values(), weighted, Assign{});
    return weighted;
  }

  template <class AnyNorm>
  [[gnu::cold]] static ConstView normed(auto& ctx, const std::optional<AnyNorm>& norm, ConstView a,
                                        typename AnyNorm::Cache& cache) {
    if (!norm) return a;
    const View y = ctx.arena.template matrix<Scalar>(a.rows, a.cols);
    norm->forward(ctx, a, y, cache);
    return y;
  }

  [[gnu::cold]] void separate(auto& ctx, View k, View v, Cache& cache) const {
    cache.projected = ctx.arena.template matrix<Scalar>(k.rows, to());
    projection_.forward(ctx, cache.input, cache.projected, cache.low_rank);
    k_.forward(ctx, ConstView(cache.projected), k, Assign{});
    v_.forward(ctx, ConstView(cache.projected), v, Assign{});
  }

  [[gnu::cold]] void separate_backward(auto& ctx, ConstView a, ConstView dk, ConstView dv, const Cache& cache,
                                       Gradients<Scalar>& grads) const {
    const View dprojected = ctx.arena.template matrix<Scalar>(a.rows, to());
    k_.backward(ctx, ConstView(cache.projected), dk, dprojected, Assign{}, grads);
    v_.backward(ctx, ConstView(cache.projected), dv, dprojected, Accumulate{}, grads);
    const View dnormed = norm_ ? ctx.arena.template matrix<Scalar>(a.rows, a.cols) : View{};
    projection_.backward(ctx, cache.input, ConstView(dprojected), dnormed, cache.low_rank, grads);
    if (norm_) norm_->backward(ctx, a, ConstView(dnormed), View{}, Assign{}, cache.norm, grads);
  }

  Projection<Scalar> projection_;
  Map k_, v_;
  std::optional<Norm> norm_;
  std::optional<Direction> direction_;  // the norm without its weight, where that is folded
};

}  // namespace calm::inline CALM_ABI
