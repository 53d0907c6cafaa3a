// CrossAttentionBridge: what one link adds to the anchor's stream (f_proj and f_cross; arXiv 2401.02412, section 3.1).
//
//   P = norm_A(A) W_proj^T,  Q = norm_B(X) W_Q^T,  K = P W_K^T,  V = P W_V^T
//   delta[t] = sum over s < visible[t] of softmax_s(Q[t] K[s]^T / sqrt(head width)) V[s] W_O^T,  times the gate
//
// The sizes of options are numbers. All weights are trainable; a caller without gradients uses the bridge as a frozen
// one.
#pragma once

#include <calm/compose/projection.hpp>
#include <calm/nn/attention.hpp>
#include <calm/nn/norm.hpp>

namespace calm::inline CALM_ABI {

enum class Gate : std::uint8_t {
  one,   // constant
  tanh,  // tanh of a trained number that starts at zero
};

struct BridgeOptions {
  Index heads = 0;          // 0: as many as the anchor has
  bool norms = true;        // RMS norms (weight, epsilon 1e-6) on both inputs
  bool zero_output = true;  // W_O starts as zero, so that a fresh bridge changes nothing
  Gate gate = Gate::one;
  bool rotary = false;  // rotary positions on Q and K, base 10000
  Index rank = 0;       // of the projection; 0: full
  std::uint64_t seed = 0;

  friend bool operator==(const BridgeOptions&, const BridgeOptions&) = default;
};

namespace preset {

/// The text of the paper: no norms, no gate, random W_O. It does not start as the anchor.
inline BridgeOptions paper() { return {.norms = false, .zero_output = false}; }

}  // namespace preset

/// Where the tokens of a batch stand, for the bridges of one augment.
template <class Scalar>
struct BridgePlan {
  std::span<const Index> query_offsets, key_offsets;  // [sequences + 1]
  std::span<const VisibleRange> visible;              // [anchor tokens]
  RotaryAngles<Scalar> query_angles, key_angles;      // empty without rotary positions
};

template <class ScalarType>
class CrossAttentionBridge {
 public:
  using Scalar = ScalarType;
  using View = MatrixView<Scalar>;
  using ConstView = MatrixView<const Scalar>;

  struct Cache {
    View normed_augment, projected, normed_anchor;  // [Ta, D_A], [Ta, D_B], [Tb, D_B]
    typename RmsNorm<Trainable, Scalar>::Cache norm_augment, norm_anchor;
    typename Projection<Scalar>::Cache projection;
    AttentionCoreCache<Scalar> attention;
    View delta;  // [Tb, D_B] before the gate
  };

  /// What decoding multiplies by: W_K W_proj and W_V W_proj where that is cheaper, else nothing.
  struct Folded {
    Matrix<Scalar> k, v;  // [D_B, D_A]
  };

  CrossAttentionBridge(const std::string& name, Index anchor_width, Index augment_width, const BridgeOptions& options)
      : options_(options), projection_(anchor_width, augment_width, options.rank, options.seed, name + ".projection"),
        q_(random_linear<Scalar>(anchor_width, anchor_width, options.seed, name + ".q_proj")),
        k_(random_linear<Scalar>(anchor_width, anchor_width, options.seed, name + ".k_proj")),
        v_(random_linear<Scalar>(anchor_width, anchor_width, options.seed, name + ".v_proj")),
        o_(starts_as_zero(options)
               ? Matrix<Scalar>(anchor_width, anchor_width)
               : random_linear<Scalar>(anchor_width, anchor_width, options.seed, name + ".o_proj")) {
    require<ConfigError>(options.heads > 0 && anchor_width % options.heads == 0, name, ": ", options.heads,
                         " heads do not divide the anchor's width ", anchor_width);
    require<ConfigError>(!options.rotary || anchor_width / options.heads % 2 == 0, name,
                         ": rotary positions need an even head width, found ", anchor_width / options.heads);
    if (options.norms) {
      norm_augment_.emplace(augment_width, 1e-6);
      norm_anchor_.emplace(anchor_width, 1e-6);
    }
    if (options.gate == Gate::tanh) gate_.emplace(Parameter<Scalar>{Matrix<Scalar>(1, 1), false});
  }

  /// total += gate * delta.                          a [Ta, D_A], x [Tb, D_B] -> [Tb, D_B]
  void forward(auto& ctx, const BridgePlan<Scalar>& plan, ConstView a, ConstView x, View total, Cache& cache) const {
    cache.projected = ctx.arena.template matrix<Scalar>(a.rows, projection_.to());
    cache.normed_augment = normed(ctx, norm_augment_, a, cache.norm_augment);
    projection_.forward(ctx, ConstView(cache.normed_augment), cache.projected, cache.projection);
    AttentionCoreCache<Scalar>& attention = cache.attention;
    attention.k = ctx.arena.template matrix<Scalar>(a.rows, projection_.to());
    attention.v = ctx.arena.template matrix<Scalar>(a.rows, projection_.to());
    k_.forward(ctx, ConstView(cache.projected), attention.k, Assign{});  // [Ta, D_B]
    v_.forward(ctx, ConstView(cache.projected), attention.v, Assign{});  // [Ta, D_B]
    if (options_.rotary) Rotary<Scalar>::forward(ctx, attention.k, plan.key_angles, options_.heads);
    query(ctx, plan, x, cache);
    attend(ctx, attention, plan.query_offsets, plan.key_offsets, plan.visible, heads());
    output(ctx, ConstView(attention.y), total, cache);
  }

  /// dx += the gradient through the queries (an empty dx is not computed); with grads also adds to these.
  template <class... Grads>
  void backward(auto& ctx, const BridgePlan<Scalar>& plan, ConstView a, ConstView x, ConstView dtotal, View dx,
                const Cache& cache, Grads&... grads) const {
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    const auto like = [&](ConstView m) { return ctx.arena.template matrix<Scalar>(m.rows, m.cols); };
    const ConstView ddelta = through_gate(ctx, dtotal, cache, grads...);
    const View dy = like(ddelta), dq = like(ddelta), dk = like(cache.attention.k), dv = like(cache.attention.v);
    o_.backward(ctx, ConstView(cache.attention.y), ddelta, dy, Assign{}, grads...);
    attend_backward(ctx, cache.attention, plan.query_offsets, plan.key_offsets, plan.visible, heads(), ConstView(dy),
                    dq, dk, dv);
    if (options_.rotary) {
      Rotary<Scalar>::backward(ctx, dq, plan.query_angles, options_.heads);
      Rotary<Scalar>::backward(ctx, dk, plan.key_angles, options_.heads);
    }
    if (norm_anchor_) {
      const View dnormed = dx.empty() && sizeof...(Grads) == 0 ? View{} : like(dq);
      q_.backward(ctx, ConstView(cache.normed_anchor), ConstView(dq), dnormed, Assign{}, grads...);
      norm_anchor_->backward(ctx, x, ConstView(dnormed), dx, Accumulate{}, cache.norm_anchor, grads...);
    } else {
      q_.backward(ctx, x, ConstView(dq), dx, Accumulate{}, grads...);
    }
    if constexpr (sizeof...(Grads) == 1) augment_backward(ctx, a, ConstView(dk), ConstView(dv), cache, grads...);
  }

  /// The weights that append() multiplies by; they must be folded again after a weight has changed.
  Folded fold(auto& ctx) const {
    const Index rank_or_width = projection_.rank() > 0 ? projection_.rank() : projection_.to();
    const Index narrow = projection_.rank() > 0 ? projection_.from() * rank_or_width : 0;
    const Index separate = narrow + rank_or_width * (projection_.rank() > 0 ? projection_.to() : projection_.from()) +
                           2 * projection_.to() * projection_.to();
    if (2 * projection_.to() * projection_.from() >= separate) return {};
    return {projection_.folded_under(ctx, k_.weight().value.view()),
            projection_.folded_under(ctx, v_.weight().value.view())};
  }

  /// Appends the keys and values of new augment positions to the slots of a cache.
  void append(auto& ctx, const BridgePlan<Scalar>& plan, const Folded& folded, const KvRows<Scalar>& rows, ConstView a,
              std::span<const Index> slots, std::span<const Index> past) const {
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    Cache cache;
    const ConstView normed_augment = normed(ctx, norm_augment_, a, cache.norm_augment);
    const View k = ctx.arena.template matrix<Scalar>(a.rows, projection_.to()),
               v = ctx.arena.template matrix<Scalar>(a.rows, projection_.to());
    if (!folded.k.empty()) {
      ctx.backend.multiply(folded.k.view(), normed_augment, k, Assign{});
      ctx.backend.multiply(folded.v.view(), normed_augment, v, Assign{});
    } else {
      const View projected = ctx.arena.template matrix<Scalar>(a.rows, projection_.to());
      projection_.forward(ctx, normed_augment, projected, cache.projection);
      k_.forward(ctx, ConstView(projected), k, Assign{});
      v_.forward(ctx, ConstView(projected), v, Assign{});
    }
    if (options_.rotary) Rotary<Scalar>::forward(ctx, k, plan.key_angles, options_.heads);
    append_rows(ctx, rows, ConstView(k), ConstView(v), plan.key_offsets, slots, past);
  }

  /// total += gate * delta for new anchor positions, over what the slots hold (key_counts positions each).
  void forward_cached(auto& ctx, const BridgePlan<Scalar>& plan, const KvRows<Scalar>& rows, ConstView x,
                      std::span<const Index> slots, std::span<const Index> key_counts, View total) const {
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    Cache cache;
    query(ctx, plan, x, cache);
    const View y = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
    attend_cached(ctx, rows, ConstView(cache.attention.q), plan.query_offsets, slots, key_counts, plan.visible, heads(),
                  y);
    output(ctx, ConstView(y), total, cache);
  }

  const BridgeOptions& options() const { return options_; }
  /// What the delta is multiplied by: 1, or tanh of the trained gate.
  double gate_value() const { return gate_ ? std::tanh(static_cast<double>(gate_->value(0, 0))) : 1; }
  Index anchor_width() const { return projection_.to(); }
  Index augment_width() const { return projection_.from(); }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    using Map = Linear<Trainable, Scalar>;
    using Norm = RmsNorm<Trainable, Scalar>;
    Projection<Scalar>::visit(self.projection_, prefix + ".projection", fn);
    Map::visit(self.q_, prefix + ".q_proj", fn);
    Map::visit(self.k_, prefix + ".k_proj", fn);
    Map::visit(self.v_, prefix + ".v_proj", fn);
    Map::visit(self.o_, prefix + ".o_proj", fn);
    if (self.norm_anchor_) Norm::visit(*self.norm_anchor_, prefix + ".norm_anchor", fn);
    if (self.norm_augment_) Norm::visit(*self.norm_augment_, prefix + ".norm_augment", fn);
    if (self.gate_) fn(prefix + ".gate", *self.gate_);
  }

 private:
  using OptionalNorm = std::optional<RmsNorm<Trainable, Scalar>>;

  static bool starts_as_zero(const BridgeOptions& options) { return options.zero_output && options.gate == Gate::one; }

  HeadShape heads() const { return {options_.heads, options_.heads, q_.out() / options_.heads}; }

  static View normed(auto& ctx, const OptionalNorm& norm, ConstView x,
                     typename RmsNorm<Trainable, Scalar>::Cache& cache) {
    const View y = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
    if (norm) norm->forward(ctx, x, y, cache);
    else ctx.backend.scale(x, 1, y);
    return y;
  }

  void query(auto& ctx, const BridgePlan<Scalar>& plan, ConstView x, Cache& cache) const {
    cache.normed_anchor = normed(ctx, norm_anchor_, x, cache.norm_anchor);
    cache.attention.q = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
    q_.forward(ctx, ConstView(cache.normed_anchor), cache.attention.q, Assign{});  // [Tb, D_B]
    if (options_.rotary) Rotary<Scalar>::forward(ctx, cache.attention.q, plan.query_angles, options_.heads);
  }

  void output(auto& ctx, ConstView y, View total, Cache& cache) const {
    cache.delta = ctx.arena.template matrix<Scalar>(y.rows, y.cols);
    o_.forward(ctx, y, cache.delta, Assign{});  // [Tb, D_B]
    if (gate_) ctx.backend.add_gated(std::as_const(gate_->value).values(), ConstView(cache.delta), total);
    else ctx.backend.add(ConstView(cache.delta), total);
  }

  template <class... Grads>
  ConstView through_gate(auto& ctx, ConstView dtotal, const Cache& cache, Grads&... grads) const {
    if (!gate_) return dtotal;
    const View ddelta = ctx.arena.template matrix<Scalar>(dtotal.rows, dtotal.cols);
    std::span<Scalar> dgate;
    if constexpr (sizeof...(Grads) == 1) dgate = flat((grads[*gate_], ...));
    ctx.backend.gate_gradient(gate_->value.values(), ConstView(cache.delta), dtotal, ddelta, dgate);
    return ddelta;
  }

  void augment_backward(auto& ctx, ConstView a, ConstView dk, ConstView dv, const Cache& cache,
                        Gradients<Scalar>& grads) const {
    const View dprojected = ctx.arena.template matrix<Scalar>(a.rows, projection_.to());
    k_.backward(ctx, ConstView(cache.projected), dk, dprojected, Assign{}, grads);
    v_.backward(ctx, ConstView(cache.projected), dv, dprojected, Accumulate{}, grads);
    const View dnormed = norm_augment_ ? ctx.arena.template matrix<Scalar>(a.rows, a.cols) : View{};
    projection_.backward(ctx, ConstView(cache.normed_augment), ConstView(dprojected), dnormed, cache.projection, grads);
    if (norm_augment_) norm_augment_->backward(ctx, a, ConstView(dnormed), View{}, Assign{}, cache.norm_augment, grads);
  }

  BridgeOptions options_;
  Projection<Scalar> projection_;
  Linear<Trainable, Scalar> q_, k_, v_, o_;
  OptionalNorm norm_anchor_, norm_augment_;
  std::optional<Parameter<Scalar>> gate_;
};

}  // namespace calm::inline CALM_ABI
