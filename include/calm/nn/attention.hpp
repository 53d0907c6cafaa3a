// Attention over packed sequences: the core that self- and cross-attention share, and the SelfAttention module.
//
// Sequences lie behind each other without padding; AttentionPlan says where each begins and what each token sees.
#pragma once

#include <calm/nn/linear.hpp>
#include <calm/nn/position.hpp>

namespace calm::inline CALM_ABI {

/// What the blocks of one pass have in common.
template <class Scalar>
struct AttentionPlan {
  std::span<const Index> offsets;         // [sequences + 1], rows of the packed batch
  std::span<const VisibleRange> visible;  // [T], keys counted from the sequence's first
  RotaryAngles<Scalar> angles;            // [T, head width / 2]
  std::span<const Index> slots;           // with caches: the cache slot of each sequence
  std::span<const Index> past;            // with caches: keys that the slot already holds
};

/// Keys and values that one attention keeps for each slot: [slots, capacity, kv width].
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
                    .key_count = key_counts[s]};
  }
  const auto log_sum_exp = ctx.arena.template matrix<Scalar>(q.rows, heads.query_heads);
  ctx.backend.attention(q, std::span<const AttentionSequence<Scalar>>(sequences), visible, heads, y, log_sum_exp);
}

/// Copies the packed rows of each sequence behind the `past` rows of its slot.
template <class Scalar>
void append_rows(auto& ctx, const KvRows<Scalar>& rows, MatrixView<const Scalar> k, MatrixView<const Scalar> v,
                 std::span<const Index> offsets, std::span<const Index> slots, std::span<const Index> past) {
  for (std::size_t s = 0; s < slots.size(); ++s) {
    const Index first = offsets[s], count = offsets[s + 1] - first;
    ctx.backend.scale(k.middle_rows(first, count), 1, rows.key_rows(slots[s]).middle_rows(past[s], count));
    ctx.backend.scale(v.middle_rows(first, count), 1, rows.value_rows(slots[s]).middle_rows(past[s], count));
  }
}

/// Causal self-attention with grouped heads and rotary positions. Its output is added to y.
template <class Weights, class Scalar>
class SelfAttention {
 public:
  static constexpr bool trainable = Weights::trainable;
  using Cache = AttentionCoreCache<Scalar>;

  SelfAttention(const std::string& name, Index width, HeadShape heads, WeightSource auto&& source)
      : heads_(heads), q_(name + ".q_proj", heads.query_heads * heads.width, width, source),
        k_(name + ".k_proj", heads.kv_heads * heads.width, width, source),
        v_(name + ".v_proj", heads.kv_heads * heads.width, width, source),
        o_(name + ".o_proj", width, heads.query_heads * heads.width, source) {}

  /// y += attention(x), each sequence within itself.                [T, D] -> [T, D]
  void forward(auto& ctx, const AttentionPlan<Scalar>& plan, MatrixView<const Scalar> x, MatrixView<Scalar> y,
               Cache& cache) const {
    project(ctx, plan, x, cache);
    attend(ctx, cache, plan.offsets, plan.offsets, plan.visible, heads_);
    o_.forward(ctx, MatrixView<const Scalar>(cache.y), y, Accumulate{});
  }

  /// The same for the new tokens of each slot, after those that `rows` holds, to which their keys and values are added.
  void forward_cached(auto& ctx, const AttentionPlan<Scalar>& plan, const KvRows<Scalar>& rows,
                      MatrixView<const Scalar> x, MatrixView<Scalar> y) const {
    Cache cache;
    project(ctx, plan, x, cache);
    append_rows(ctx, rows, MatrixView<const Scalar>(cache.k), MatrixView<const Scalar>(cache.v), plan.offsets,
                plan.slots, plan.past);
    const auto key_counts = ctx.arena.template vector<Index>(static_cast<Index>(plan.slots.size()));
    for (std::size_t s = 0; s < key_counts.size(); ++s)
      key_counts[s] = plan.past[s] + plan.offsets[s + 1] - plan.offsets[s];
    cache.y = ctx.arena.template matrix<Scalar>(x.rows, heads_.query_heads * heads_.width);
    attend_cached(ctx, rows, MatrixView<const Scalar>(cache.q), plan.offsets, plan.slots,
                  std::span<const Index>(key_counts), plan.visible, heads_, cache.y);
    o_.forward(ctx, MatrixView<const Scalar>(cache.y), y, Accumulate{});
  }

  /// Overwrites dx; adds to grads.
  template <class... Grads>
  void backward(auto& ctx, const AttentionPlan<Scalar>& plan, MatrixView<const Scalar> x, MatrixView<const Scalar> dy,
                MatrixView<Scalar> dx, const Cache& cache, Grads&... grads) const
      requires(sizeof...(Grads) == 0 || trainable) {
    const auto da = ctx.arena.template matrix<Scalar>(x.rows, cache.y.cols);
    const auto dq = ctx.arena.template matrix<Scalar>(x.rows, cache.q.cols);
    const auto dk = ctx.arena.template matrix<Scalar>(x.rows, cache.k.cols);
    const auto dv = ctx.arena.template matrix<Scalar>(x.rows, cache.v.cols);
    o_.backward(ctx, MatrixView<const Scalar>(cache.y), dy, da, Assign{}, grads...);
    attend_backward(ctx, cache, plan.offsets, plan.offsets, plan.visible, heads_, MatrixView<const Scalar>(da), dq, dk,
                    dv);
    Rotary<Scalar>::backward(ctx, dq, plan.angles, heads_.query_heads);
    Rotary<Scalar>::backward(ctx, dk, plan.angles, heads_.kv_heads);
    q_.backward(ctx, x, MatrixView<const Scalar>(dq), dx, Assign{}, grads...);
    k_.backward(ctx, x, MatrixView<const Scalar>(dk), dx, Accumulate{}, grads...);
    v_.backward(ctx, x, MatrixView<const Scalar>(dv), dx, Accumulate{}, grads...);
  }

  HeadShape heads() const { return heads_; }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    using Map = Linear<Weights, Scalar>;
    Map::visit(self.q_, prefix + ".q_proj", fn);
    Map::visit(self.k_, prefix + ".k_proj", fn);
    Map::visit(self.v_, prefix + ".v_proj", fn);
    Map::visit(self.o_, prefix + ".o_proj", fn);
  }

 private:
  void project(auto& ctx, const AttentionPlan<Scalar>& plan, MatrixView<const Scalar> x, Cache& cache) const {
    cache.q = ctx.arena.template matrix<Scalar>(x.rows, q_.out());
    cache.k = ctx.arena.template matrix<Scalar>(x.rows, k_.out());
    cache.v = ctx.arena.template matrix<Scalar>(x.rows, v_.out());
    q_.forward(ctx, x, cache.q, Assign{});
    k_.forward(ctx, x, cache.k, Assign{});
    v_.forward(ctx, x, cache.v, Assign{});
    Rotary<Scalar>::forward(ctx, cache.q, plan.angles, heads_.query_heads);
    Rotary<Scalar>::forward(ctx, cache.k, plan.angles, heads_.kv_heads);
  }

  HeadShape heads_;
  Linear<Weights, Scalar> q_, k_, v_, o_;
};

}  // namespace calm::inline CALM_ABI
