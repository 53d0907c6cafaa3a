// CrossAttentionBridge: what one link adds to the anchor's stream (f_proj and f_cross; arXiv 2401.02412, section 3.1).
//
//   P = norm_A(A) W_proj^T,  Q = norm_B(X) W_Q^T,  K = P W_K^T,  V = P W_V^T
//   delta[t] = sum over s < visible[t] of softmax_s(Q[t] K[s]^T / sqrt(head width)) V[s] W_O^T,  times the gate
//
// The sizes of options are numbers. All weights are trainable; a caller without gradients uses the bridge as a frozen
// one.
#pragma once

#include <calm/compose/key_value_map.hpp>
#include <calm/nn/attention.hpp>

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
  Queries<Scalar> queries;             // tokens of the anchor
  std::span<const Index> key_offsets;  // [sequences + 1], tokens of the augment
  RotaryAngles<Scalar> key_angles;     // empty without rotary positions
  Index anchor_tokens = 0;             // of the whole batch, whatever rows a pass asks for
};

template <class ScalarType>
class CrossAttentionBridge {
 public:
  using Scalar = ScalarType;
  using View = MatrixView<Scalar>;
  using ConstView = MatrixView<const Scalar>;

  struct Cache {
    typename KeyValueMap<Scalar>::Cache augment;
    ConstView normed_anchor;  // [Tb, D_B]
    typename RmsNorm<Trainable, Scalar>::Cache norm_anchor;
    AttentionCoreCache<Scalar> attention;
    View delta;  // [Tb, D_B] before the gate
  };

  using Folded = typename KeyValueMap<Scalar>::Folded;

  CrossAttentionBridge(const std::string& name, Index anchor_width, Index augment_width, const BridgeOptions& options)
      : options_(options), augment_(name, anchor_width, augment_width, options.norms, options.rank, options.seed),
        q_(random_linear<Scalar>(anchor_width, anchor_width, options.seed, name + ".q_proj")),
        o_(starts_as_zero(options)
               ? Matrix<Scalar>(anchor_width, anchor_width)
               : random_linear<Scalar>(anchor_width, anchor_width, options.seed, name + ".o_proj")) {
    require<ConfigError>(options.heads > 0 && anchor_width % options.heads == 0, name, ": ", options.heads,
                         " heads do not divide the anchor's width ", anchor_width);
    require<ConfigError>(!options.rotary || anchor_width / options.heads % 2 == 0, name,
                         ": rotary positions need an even head width, found ", anchor_width / options.heads);
    if (options.norms) norm_anchor_.emplace(anchor_width, 1e-6);
    if (options.gate == Gate::tanh) gate_.emplace(Parameter<Scalar>{Matrix<Scalar>(1, 1), false});
  }

  /// total += gate * delta.                          a [Ta, D_A], x [Tb, D_B] -> [Tb, D_B]
  [[gnu::cold]] void forward(auto& ctx, const BridgePlan<Scalar>& plan, ConstView a, ConstView x, View total,
                             Cache& cache) const {
    AttentionCoreCache<Scalar>& attention = cache.attention;
    attention.k = ctx.arena.template matrix<Scalar>(a.rows, augment_.to());
    attention.v = ctx.arena.template matrix<Scalar>(a.rows, augment_.to());
    augment_.forward(ctx, plan.anchor_tokens, a, attention.k, attention.v, cache.augment);
    if (options_.rotary) Rotary<Scalar>::forward(ctx, attention.k, plan.key_angles, options_.heads);
    query(ctx, plan, x, cache);
    attend(ctx, attention, plan.queries.offsets, plan.key_offsets, plan.queries.visible, heads());
    output(ctx, ConstView(attention.y), total, cache);
  }

  /// dx += the gradient through the queries (an empty dx is not computed); with grads also adds to these.
  template <class... Grads>
  [[gnu::cold]] void backward(auto& ctx, const BridgePlan<Scalar>& plan, [[maybe_unused]] ConstView a, ConstView x,
                              ConstView dtotal, View dx, const Cache& cache, Grads&... grads) const {
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    const auto like = [&](ConstView m) { return ctx.arena.template matrix<Scalar>(m.rows, m.cols); };
    const ConstView ddelta = through_gate(ctx, dtotal, cache, grads...);
    const View dy = like(ddelta), dq = like(ddelta), dk = like(cache.attention.k), dv = like(cache.attention.v);
    o_.backward(ctx, ConstView(cache.attention.y), ddelta, dy, Assign{}, grads...);
    attend_backward(ctx, cache.attention, plan.queries.offsets, plan.key_offsets, plan.queries.visible, heads(),
                    ConstView(dy), dq, dk, dv);
    if (options_.rotary) {
      Rotary<Scalar>::backward(ctx, dq, plan.queries.angles, options_.heads);
      Rotary<Scalar>::backward(ctx, dk, plan.key_angles, options_.heads);
    }
    if (norm_anchor_) {
      const View dnormed = dx.empty() && sizeof...(Grads) == 0 ? View{} : like(dq);
      q_.backward(ctx, cache.normed_anchor, ConstView(dq), dnormed, Assign{}, grads...);
      norm_anchor_->backward(ctx, x, ConstView(dnormed), dx, Accumulate{}, cache.norm_anchor, grads...);
    } else {
      q_.backward(ctx, x, ConstView(dq), dx, Accumulate{}, grads...);
    }
    (augment_.backward(ctx, a, ConstView(dk), ConstView(dv), cache.augment, grads), ...);
  }

  /// The weights that append() multiplies by; they must be folded again after a weight has changed.
  [[gnu::cold]] Folded fold(auto& ctx) const { return augment_.fold(ctx); }

  /// Appends the keys and values of new augment positions to the slots of a cache.
  [[gnu::cold]] void append(auto& ctx, const BridgePlan<Scalar>& plan, const Folded& folded, const KvRows<Scalar>& rows,
                            ConstView a, std::span<const Index> slots, std::span<const Index> past) const {
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    const View k = ctx.arena.template matrix<Scalar>(a.rows, augment_.to()),
               v = ctx.arena.template matrix<Scalar>(a.rows, augment_.to());
    augment_.forward_folded(ctx, folded, a, k, v);
    if (options_.rotary) Rotary<Scalar>::forward(ctx, k, plan.key_angles, options_.heads);
    append_rows(ctx, rows, ConstView(k), ConstView(v), plan.key_offsets, slots, past);
  }

  /// total += gate * delta for new anchor positions, over what the slots hold (key_counts positions each).
  [[gnu::cold]] void forward_cached(auto& ctx, const BridgePlan<Scalar>& plan, const KvRows<Scalar>& rows, ConstView x,
                                    std::span<const Index> slots, std::span<const Index> key_counts, View total) const {
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    Cache cache;
    query(ctx, plan, x, cache);
    const View y = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
    attend_cached(ctx, rows, ConstView(cache.attention.q), plan.queries.offsets, slots, key_counts,
                  plan.queries.visible, heads(), y);
    output(ctx, ConstView(y), total, cache);
  }

  const BridgeOptions& options() const { return options_; }
  /// What the delta is multiplied by: 1, or tanh of the trained gate.
  double gate_value() const { return gate_ ? std::tanh(static_cast<double>(gate_->value(0, 0))) : 1; }
  Index anchor_width() const { return augment_.to(); }
  Index augment_width() const { return augment_.from(); }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    using Map = Linear<Trainable, Scalar>;
    using Norm = RmsNorm<Trainable, Scalar>;
    using Augment = KeyValueMap<Scalar>;
    Augment::visit_projection(self.augment_, prefix, fn);
    Map::visit(self.q_, prefix + ".q_proj", fn);
    Augment::visit_maps(self.augment_, prefix, fn);
    Map::visit(self.o_, prefix + ".o_proj", fn);
    if (self.norm_anchor_) Norm::visit(*self.norm_anchor_, prefix + ".norm_anchor", fn);
    Augment::visit_norm(self.augment_, prefix, fn);
    if (self.gate_) fn(prefix + ".gate", *self.gate_);
  }

 private:
  static bool starts_as_zero(const BridgeOptions& options) { return options.zero_output && options.gate == Gate::one; }

  HeadShape heads() const { return {options_.heads, options_.heads, q_.out() / options_.heads}; }

  [[gnu::cold]] void query(auto& ctx, const BridgePlan<Scalar>& plan, ConstView x, Cache& cache) const {
    cache.normed_anchor = x;
    if (norm_anchor_) {
      const View normed = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
      norm_anchor_->forward(ctx, x, normed, cache.norm_anchor);
      cache.normed_anchor = normed;
    }
    cache.attention.q = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
    q_.forward(ctx, cache.normed_anchor, cache.attention.q, Assign{});  // [Tb, D_B]
    if (options_.rotary) Rotary<Scalar>::forward(ctx, cache.attention.q, plan.queries.angles, options_.heads);
  }

  [[gnu::cold]] void output(auto& ctx, ConstView y, View total, Cache& cache) const {
    cache.delta = ctx.arena.template matrix<Scalar>(y.rows, y.cols);
    o_.forward(ctx, y, cache.delta, Assign{});  // [Tb, D_B]
    if (gate_) ctx.backend.add_gated(std::as_const(gate_->value).values(), ConstView(cache.delta), total);
    else ctx.backend.add(ConstView(cache.delta), total);
  }

  template <class... Grads>
  [[gnu::cold]] ConstView through_gate(auto& ctx, ConstView dtotal, const Cache& cache, Grads&... grads) const {
    if (!gate_) return dtotal;
    const View ddelta = ctx.arena.template matrix<Scalar>(dtotal.rows, dtotal.cols);
    std::span<Scalar> dgate;
    if constexpr (sizeof...(Grads) == 1) dgate = flat((grads[*gate_], ...));
    ctx.backend.gate_gradient(gate_->value.values(), ConstView(cache.delta), dtotal, ddelta, dgate);
    return ddelta;
  }

  BridgeOptions options_;
  KeyValueMap<Scalar> augment_;
  Linear<Trainable, Scalar> q_, o_;
  std::optional<RmsNorm<Trainable, Scalar>> norm_anchor_;
  std::optional<Parameter<Scalar>> gate_;
};

}  // namespace calm::inline CALM_ABI
