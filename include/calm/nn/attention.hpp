// Attention over packed sequences: the core that self- and cross-attention share, and the SelfAttention module.
//
// Sequences lie behind each other without padding; AttentionPlan says where each begins and what each token sees.
#pragma once

#include <calm/nn/architecture.hpp>
#include <calm/nn/linear.hpp>
#include <calm/nn/position.hpp>

#include <algorithm>
#include <array>

namespace calm::inline CALM_ABI {

/// Packed tokens that attend.
template <class Scalar>
struct Queries {
  std::span<const Index> offsets;         // [sequences + 1], where those of each sequence begin
  std::span<const VisibleRange> visible;  // [T], keys counted from the sequence's first
  RotaryAngles<Scalar> angles;            // [T, head width / 2]; empty without rotary positions
};

/// Those of `all` that `rows` names, ascending.
template <class Scalar>
[[gnu::cold]] Queries<Scalar> chosen_queries(auto& ctx, const Queries<Scalar>& all, std::span<const Index> rows) {
  const auto count = static_cast<Index>(rows.size());
  const auto offsets = ctx.arena.template vector<Index>(static_cast<Index>(all.offsets.size()));
  for (std::size_t s = 0; s < offsets.size(); ++s)
    offsets[s] = std::lower_bound(rows.begin(), rows.end(), all.offsets[s]) - rows.begin();
  const auto visible = ctx.arena.template vector<VisibleRange>(count);
  for (std::size_t i = 0; i < rows.size(); ++i) visible[i] = all.visible[static_cast<std::size_t>(rows[i])];
  Queries<Scalar> chosen{offsets, visible, {}};
  if (all.angles.cosines.empty()) return chosen;
  const auto gathered = [&](MatrixView<const Scalar> from) {
    const auto to = ctx.arena.template matrix<Scalar>(count, from.cols);
    ctx.backend.gather_rows(from, rows, to);
    return to;
  };
  chosen.angles = {gathered(all.angles.cosines), gathered(all.angles.sines)};
  return chosen;
}

/// What the blocks of one pass have in common.
template <class Scalar>
struct AttentionPlan {
  Queries<Scalar> tokens;             // all of the batch: the keys, and the queries unless some are chosen
  std::span<const Index> slots = {};  // with caches: the cache slot of each sequence
  std::span<const Index> past = {};   // with caches: keys that the slot already holds
  std::span<const Index> rows = {};   // the tokens whose stream goes on behind the block; empty: all
  Queries<Scalar> chosen = {};        // these tokens

  const Queries<Scalar>& queries() const { return rows.empty() ? tokens : chosen; }
  /// Rows of what the block gives.
  Index final_rows() const { return static_cast<Index>(queries().visible.size()); }
};

/// The rows of x that a plan's block goes on with; x itself where these are all.
template <class Scalar>
[[gnu::cold]] MatrixView<const Scalar> going_on(auto& ctx, const AttentionPlan<Scalar>& plan,
                                                MatrixView<const Scalar> x) {
  if (plan.rows.empty()) return x;
  const auto some = ctx.arena.template matrix<Scalar>(plan.final_rows(), x.cols);
  ctx.backend.gather_rows(x, plan.rows, some);
  return some;
}

/// Its gradient where some go on: overwrites dx, zero for the other rows.
template <class Scalar>
[[gnu::cold]] void going_on_backward(auto& ctx, const AttentionPlan<Scalar>& plan, MatrixView<const Scalar> dsome,
                                     MatrixView<Scalar> dx) {
  ctx.backend.set_zero(dx);
  ctx.backend.scatter_rows(dsome, plan.rows, dx);
}

/// Keys and values that one attention keeps for each slot: [slots, capacity, kv width], a capacity of whole cache_step;
/// the keys of a slot in the order of the backend's append_keys().
template <class Scalar>
struct KvRows {
  Scalar* keys = nullptr;
  Scalar* values = nullptr;
  Index capacity = 0, width = 0;

  MatrixView<Scalar> key_rows(Index slot) const { return {keys + slot * capacity * width, capacity, width}; }
  MatrixView<Scalar> value_rows(Index slot) const { return {values + slot * capacity * width, capacity, width}; }
};

/// What the gradient of an attention core needs again.
template <class Scalar>
struct AttentionCoreCache {
  MatrixView<Scalar> q, k, v;      // as multiplied (rotated)
  MatrixView<Scalar> y;            // [Tq, query heads * width]
  MatrixView<Scalar> log_sum_exp;  // [Tq, query heads]
};

/// The sequences of a packed batch, with room for gradients where dk and dv are given.
template <class Scalar>
std::span<const AttentionSequence<Scalar>> packed_sequences(auto& ctx, const AttentionCoreCache<Scalar>& cache,
                                                            std::span<const Index> query_offsets,
                                                            std::span<const Index> key_offsets,
                                                            MatrixView<Scalar> dk = {}, MatrixView<Scalar> dv = {}) {
  const auto sequences =
      ctx.arena.template vector<AttentionSequence<Scalar>>(static_cast<Index>(query_offsets.size()) - 1);
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    sequences[s] = {.first_query = query_offsets[s],
                    .queries = query_offsets[s + 1] - query_offsets[s],
                    .keys = cache.k.row(key_offsets[s]),
                    .values = cache.v.row(key_offsets[s]),
                    .stride = cache.k.stride,
                    .key_count = key_offsets[s + 1] - key_offsets[s],
                    .key_gradients = dk.data ? dk.row(key_offsets[s]) : nullptr,
                    .value_gradients = dv.data ? dv.row(key_offsets[s]) : nullptr};
  }
  return sequences;
}

/// y = attention of packed queries over packed keys and values; key_offsets say where each sequence's keys begin.
template <class Scalar>
void attend(auto& ctx, AttentionCoreCache<Scalar>& cache, std::span<const Index> query_offsets,
            std::span<const Index> key_offsets, std::span<const VisibleRange> visible, HeadShape heads) {
  cache.y = ctx.arena.template matrix<Scalar>(cache.q.rows, heads.query_heads * heads.width);
  cache.log_sum_exp = ctx.arena.template matrix<Scalar>(cache.q.rows, heads.query_heads);
  ctx.backend.attention(MatrixView<const Scalar>(cache.q), packed_sequences(ctx, cache, query_offsets, key_offsets),
                        visible, heads, cache.y, cache.log_sum_exp);
}

/// The gradients of attend: overwrites dq, dk and dv.
template <class Scalar>
void attend_backward(auto& ctx, const AttentionCoreCache<Scalar>& cache, std::span<const Index> query_offsets,
                     std::span<const Index> key_offsets, std::span<const VisibleRange> visible, HeadShape heads,
                     MatrixView<const Scalar> dy, MatrixView<Scalar> dq, MatrixView<Scalar> dk, MatrixView<Scalar> dv) {
  ctx.backend.attention_backward(
      MatrixView<const Scalar>(cache.q), packed_sequences(ctx, cache, query_offsets, key_offsets, dk, dv), visible,
      heads, MatrixView<const Scalar>(cache.y), MatrixView<const Scalar>(cache.log_sum_exp), dy, dq);
}

/// Appends packed keys and values to the slots of a cache and attends over all that each slot holds. Writes y.
template <class Scalar>
void attend_cached(auto& ctx, const KvRows<Scalar>& rows, MatrixView<const Scalar> q,
                   std::span<const Index> query_offsets, std::span<const Index> slots,
                   std::span<const Index> key_counts, std::span<const VisibleRange> visible, HeadShape heads,
                   MatrixView<Scalar> y) {
  const auto sequences = ctx.arena.template vector<AttentionSequence<Scalar>>(static_cast<Index>(slots.size()));
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    sequences[s] = {.first_query = query_offsets[s],
                    .queries = query_offsets[s + 1] - query_offsets[s],
                    .keys = rows.key_rows(slots[s]).data,
                    .values = rows.value_rows(slots[s]).data,
                    .stride = rows.width,
                    .key_count = key_counts[s],
                    .cached = true};
  }
  const auto log_sum_exp = ctx.arena.template matrix<Scalar>(q.rows, heads.query_heads);
  ctx.backend.attention(q, std::span<const AttentionSequence<Scalar>>(sequences), visible, heads, y, log_sum_exp);
}

/// Writes the packed rows of each sequence behind the `past` rows of its slot.
template <class Scalar>
void append_rows(auto& ctx, const KvRows<Scalar>& rows, MatrixView<const Scalar> k, MatrixView<const Scalar> v,
                 std::span<const Index> offsets, std::span<const Index> slots, std::span<const Index> past) {
  for (std::size_t s = 0; s < slots.size(); ++s) {
    const Index first = offsets[s], count = offsets[s + 1] - first;
    ctx.backend.append_keys(k.middle_rows(first, count), past[s], rows.key_rows(slots[s]));
    ctx.backend.scale(v.middle_rows(first, count), 1, rows.value_rows(slots[s]).middle_rows(past[s], count));
  }
}

/// Causal self-attention with grouped heads. Its output is added to y, or assigned.
template <class Architecture, class Weights, class Scalar>
class SelfAttention {
 public:
  static constexpr bool trainable = Weights::trainable;
  static constexpr AttentionTraits traits = Architecture::attention;
  static constexpr bool norms_qk = traits.qk_norm != QkNorm::none;
  using View = MatrixView<Scalar>;
  using ConstView = MatrixView<const Scalar>;
  using Norm = typename Architecture::template Norm<typename Weights::Other, Scalar>;
  using InputMap = LinearMap<traits.input_bias, Weights, Scalar>;
  using OutputMap = LinearMap<traits.output_bias, Weights, Scalar>;

  struct NormCache {
    View input;
    typename Norm::Cache norm;
  };
  struct NoCache {};
  struct Cache : AttentionCoreCache<Scalar> {
    ConstView asking;  // the rows of the input that queries are made of
    [[no_unique_address]] std::conditional_t<norms_qk, std::array<NormCache, 2>, NoCache> qk_norms;
  };

  SelfAttention(const std::string& name, const BlockSizes& sizes, WeightSource auto&& source)
      : heads_(sizes.heads), query_scale_(sizes.query_scale),
        q_(name + ".q_proj", heads_.query_heads * heads_.width, sizes.width, source),
        k_(name + ".k_proj", heads_.kv_heads * heads_.width, sizes.width, source),
        v_(name + ".v_proj", heads_.kv_heads * heads_.width, sizes.width, source),
        o_(name + ".o_proj", sizes.width, heads_.query_heads * heads_.width, source) {
    if constexpr (norms_qk) {
      qk_norms_.emplace_back(name + ".q_norm", norm_width(heads_.query_heads), sizes.norm_epsilon, source);
      qk_norms_.emplace_back(name + ".k_norm", norm_width(heads_.kv_heads), sizes.norm_epsilon, source);
    }
  }

  /// attention(x), each sequence within itself.                     [T, D] -> [rows of the plan, D]
  template <WriteMode Mode = Accumulate>
  [[gnu::cold]] void forward(auto& ctx, const AttentionPlan<Scalar>& plan, ConstView x, View y, Cache& cache,
                             Mode mode = {}) const {
    project(ctx, plan, x, cache);
    attend<Scalar>(ctx, cache, plan.queries().offsets, plan.tokens.offsets, plan.queries().visible, heads_);
    o_.forward(ctx, ConstView(cache.y), y, mode);
  }

  /// The same for the new tokens of each slot, after those that `rows` holds, to which their keys and values are added.
  template <WriteMode Mode = Accumulate>
  [[gnu::cold]] void forward_cached(auto& ctx, const AttentionPlan<Scalar>& plan, const KvRows<Scalar>& rows,
                                    ConstView x, View y, Mode mode = {}) const {
    Cache cache;
    project(ctx, plan, x, cache);
    const std::span<const Index> offsets = plan.tokens.offsets;
    append_rows(ctx, rows, ConstView(cache.k), ConstView(cache.v), offsets, plan.slots, plan.past);
    const auto key_counts = ctx.arena.template vector<Index>(static_cast<Index>(plan.slots.size()));
    for (std::size_t s = 0; s < key_counts.size(); ++s) key_counts[s] = plan.past[s] + offsets[s + 1] - offsets[s];
    cache.y = ctx.arena.template matrix<Scalar>(cache.q.rows, heads_.query_heads * heads_.width);
    attend_cached(ctx, rows, ConstView(cache.q), plan.queries().offsets, plan.slots, std::span<const Index>(key_counts),
                  plan.queries().visible, heads_, cache.y);
    o_.forward(ctx, ConstView(cache.y), y, mode);
  }

  /// Overwrites dx; adds to grads.                      x [T, D], dy [rows of the plan, D] -> dx [T, D]
  template <class... Grads>
  [[gnu::cold]] void backward(auto& ctx, const AttentionPlan<Scalar>& plan, ConstView x, ConstView dy, View dx,
                              const Cache& cache, Grads&... grads) const requires(sizeof...(Grads) == 0 || trainable) {
    const auto da = ctx.arena.template matrix<Scalar>(cache.y.rows, cache.y.cols);
    const auto dq = ctx.arena.template matrix<Scalar>(cache.q.rows, cache.q.cols);
    const auto dk = ctx.arena.template matrix<Scalar>(x.rows, cache.k.cols);
    const auto dv = ctx.arena.template matrix<Scalar>(x.rows, cache.v.cols);
    o_.backward(ctx, ConstView(cache.y), dy, da, Assign{}, grads...);
    const Queries<Scalar>& queries = plan.queries();
    attend_backward<Scalar>(ctx, cache, queries.offsets, plan.tokens.offsets, queries.visible, heads_, ConstView(da),
                            dq, dk, dv);
    if constexpr (traits.rotary) {
      Rotary<Scalar>::backward(ctx, dq, queries.angles, heads_.query_heads);
      Rotary<Scalar>::backward(ctx, dk, plan.tokens.angles, heads_.kv_heads);
    }
    if (query_scale_ != 1) ctx.backend.scale(ConstView(dq), query_scale_, dq);
    if constexpr (norms_qk) {
      for (std::size_t i = 0; i < 2; ++i) {
        const View d = heads_as_rows(i == 0 ? dq : dk, i);
        const NormCache& kept = cache.qk_norms[i];
        backward_through(
            qk_norms_[i],
            [&](const Norm& norm, auto&... g) {
              norm.backward(ctx, ConstView(kept.input), ConstView(d), d, Assign{}, kept.norm, g...);
            },
            grads...);
      }
    }
    if (plan.rows.empty()) {
      q_.backward(ctx, x, ConstView(dq), dx, Assign{}, grads...);
    } else {
      const auto dasking = ctx.arena.template matrix<Scalar>(dq.rows, x.cols);
      q_.backward(ctx, cache.asking, ConstView(dq), dasking, Assign{}, grads...);
      going_on_backward(ctx, plan, ConstView(dasking), dx);
    }
    k_.backward(ctx, x, ConstView(dk), dx, Accumulate{}, grads...);
    v_.backward(ctx, x, ConstView(dv), dx, Accumulate{}, grads...);
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    InputMap::visit(self.q_, prefix + ".q_proj", fn);
    InputMap::visit(self.k_, prefix + ".k_proj", fn);
    InputMap::visit(self.v_, prefix + ".v_proj", fn);
    OutputMap::visit(self.o_, prefix + ".o_proj", fn);
    if constexpr (norms_qk) {
      Norm::visit(self.qk_norms_[0], prefix + ".q_norm", fn);
      Norm::visit(self.qk_norms_[1], prefix + ".k_norm", fn);
    }
  }

 private:
  Index norm_width(Index heads) const { return traits.qk_norm == QkNorm::head ? heads_.width : heads * heads_.width; }

  /// The rows that a norm of queries (0) or keys (1) sees.
  View heads_as_rows(View m, std::size_t which) const {
    const Index width = norm_width(which == 0 ? heads_.query_heads : heads_.kv_heads);
    return {m.data, m.rows * m.cols / width, width};
  }

  [[gnu::cold]] void project(auto& ctx, const AttentionPlan<Scalar>& plan, ConstView x, Cache& cache) const {
    cache.asking = going_on(ctx, plan, x);
    cache.q = ctx.arena.template matrix<Scalar>(cache.asking.rows, q_.out());
    cache.k = ctx.arena.template matrix<Scalar>(x.rows, k_.out());
    cache.v = ctx.arena.template matrix<Scalar>(x.rows, v_.out());
    if (plan.rows.empty()) {
      forward_each(ctx, x, std::array{&q_, &k_, &v_}, std::array{cache.q, cache.k, cache.v});
    } else {
      q_.forward(ctx, cache.asking, cache.q, Assign{});
      forward_each(ctx, x, std::array{&k_, &v_}, std::array{cache.k, cache.v});
    }
    if constexpr (norms_qk) {
      for (std::size_t i = 0; i < 2; ++i) {
        View& normed = i == 0 ? cache.q : cache.k;
        cache.qk_norms[i].input = heads_as_rows(normed, i);
        normed = ctx.arena.template matrix<Scalar>(normed.rows, normed.cols);
        qk_norms_[i].forward(ctx, ConstView(cache.qk_norms[i].input), heads_as_rows(normed, i), cache.qk_norms[i].norm);
      }
    }
    if (query_scale_ != 1) ctx.backend.scale(ConstView(cache.q), query_scale_, cache.q);
    if constexpr (traits.rotary) {
      Rotary<Scalar>::forward(ctx, cache.q, plan.queries().angles, heads_.query_heads);
      Rotary<Scalar>::forward(ctx, cache.k, plan.tokens.angles, heads_.kv_heads);
    }
  }

  HeadShape heads_;
  double query_scale_;
  InputMap q_, k_, v_;
  OutputMap o_;
  [[no_unique_address]] std::conditional_t<norms_qk, std::vector<Norm>, NoCache> qk_norms_;
};

}  // namespace calm::inline CALM_ABI
