// Transformer: embeddings, blocks in a loop, the output head. A Decoder (decoder.hpp).
//
// The architecture is a struct of policies (zoo/), the sizes are numbers, the weights a policy (Frozen, Trainable,
// Lora). After each block an observer is offered the residual stream; the Transformer knows nothing else about
// composition.
#pragma once

#include <calm/model/decoder.hpp>
#include <calm/model/kv_cache.hpp>
#include <calm/nn/embedding.hpp>
#include <calm/tensor/buffer.hpp>

#include <optional>

namespace calm::inline CALM_ABI {

template <class ArchitectureType, class WeightsType = Frozen, class ScalarType = float>
class Transformer {
 public:
  using Architecture = ArchitectureType;
  using Weights = WeightsType;
  using Scalar = ScalarType;
  using Block = TransformerBlock<Architecture, Weights, Scalar>;
  using Norm = typename Architecture::template Norm<typename Weights::Other, Scalar>;
  using View = MatrixView<Scalar>;
  using ConstView = MatrixView<const Scalar>;
  static constexpr bool trainable = Weights::trainable;

  /// What blocks that see all keys have in common, windowed ones, and the last one.
  struct AttentionPlans {
    AttentionPlan<Scalar> all, windowed, last;
  };

  /// Nothing beside the tokens is needed.
  struct States {
    static constexpr std::size_t bytes() { return 0; }
  };

  struct Tape {
    AttentionPlans plans;
    std::vector<typename Block::Cache> blocks;
    std::span<const TokenId> ids, positions;
  };

  struct HeadCache {
    View normed;
    typename Norm::Cache norm;
  };

  class Session {
   public:
    Index length(Index slot) const { return cache_.length(slot); }
    void clear(Index slot) { cache_.clear(slot); }

    /// Throws, before anything has changed, where the batch does not fit.
    void check_room(const TokenBatch& batch) const {
      require<ShapeError>(batch.rows.empty() || has_last_, batch.rows.size(),
                          " rows of the final stream were asked for, but this session ends at block ", blocks_,
                          " (SessionOptions::blocks), before the model does; ask for all");
      require<ShapeError>(static_cast<Index>(batch.slots.size()) == batch.sequences(),
                          "advance() needs a slot for each of the ", batch.sequences(), " sequences, found ",
                          batch.slots.size());
      for (Index s = 0; s < batch.sequences(); ++s)
        cache_.check_room(batch.slots[static_cast<std::size_t>(s)], batch.length(s));
    }
    std::size_t bytes() const { return cache_.bytes(); }

   private:
    friend Transformer;
    Session(Index blocks, bool has_last, Index slots, Index capacity, Index width)
        : cache_(blocks, slots, capacity, width), blocks_(blocks), has_last_(has_last) {}
    KvCache<Scalar> cache_;
    Index blocks_;
    bool has_last_;  // whether these are all of the model
  };

  /// Takes each weight from `source` by its Hugging Face name.
  template <WeightSource Source>
  Transformer(const ModelSpec& spec, Source&& source)
      : spec_(checked(spec)), rotary_(rotary_of(spec, spec.rotary_base, spec.rotary_scaling)),
        window_rotary_(spec.window_rotary_base > 0 ? rotary_of(spec, spec.window_rotary_base, {}) : rotary_),
        embedding_("model.embed_tokens", spec.vocabulary, spec.width, source),
        norm_("model.norm", spec.width, spec.norm_epsilon, source) {
    blocks_.reserve(static_cast<std::size_t>(spec.blocks));
    for (Index i = 0; i < spec.blocks; ++i)
      blocks_.emplace_back("model.layers." + std::to_string(i), spec.block_sizes(), source);
    if constexpr (Architecture::learned_positions)
      positions_.emplace("model.embed_positions", spec.context, spec.width, source);
    if (!spec.tied_embeddings) lm_head_.emplace("lm_head", spec.vocabulary, spec.width, source);
    if constexpr (OutputMap::trainable)
      if (lm_head_) lm_head_->mark_as_table();
  }

  const ModelSpec& spec() const { return spec_; }

  /// The stream before block 0; `past` tokens of each sequence lie before those of the batch.
  [[gnu::cold]] View embed(auto& ctx, const TokenBatch& batch, std::span<const Index> past = {}) const {
    const View x = ctx.arena.template matrix<Scalar>(batch.tokens(), spec_.width);
    embedding_.forward(ctx, batch.ids, x);
    if constexpr (Architecture::scaled_embedding) ctx.backend.scale(ConstView(x), embedding_scale(), x);
    if constexpr (Architecture::learned_positions) {
      const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
      const View p = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
      positions_->forward(ctx, positions_of(ctx, batch, past), p);
      ctx.backend.add(ConstView(p), x);
    }
    return x;
  }

  void prepare_augments(auto&, const TokenBatch&, States&) const {}
  void prepare(auto&, const TokenBatch&, States&) const {}

  template <class Observer>
  [[gnu::cold]] void run(auto& ctx, const TokenBatch& batch, const States&, View& x, Index first, Index last,
                         Tape* tape, Observer&& observer) const {
    const AttentionPlans plans = make_plans(ctx, batch);
    if (tape) {
      tape->plans = plans;
      make_as_many(tape->blocks, blocks_.size());
    }
    View other = tape ? View{} : ctx.arena.template matrix<Scalar>(x.rows, x.cols);
    for (Index i = first; i < last; ++i) {
      const auto& block = blocks_[static_cast<std::size_t>(i)];
      const AttentionPlan<Scalar>& plan = plan_of(plans, i);
      if (tape) {
        const View y = ctx.arena.template matrix<Scalar>(plan.final_rows(), x.cols);
        block.forward(ctx, plan, x, y, tape->blocks[static_cast<std::size_t>(i)]);
        x = y;
      } else {
        other = other.middle_rows(0, plan.final_rows());
        const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
        block.forward(ctx, plan, x, other);
        std::swap(x, other);
      }
      observer.after_block(ctx, i, x);
    }
  }

  template <class Observer, class... Grads>
  [[gnu::cold]] void run_backward(auto& ctx, const TokenBatch&, const States&, const Tape& tape, View& dx, Index first,
                                  Index last, Observer&& observer, Grads&... grads) const {
    for (Index i = last - 1; i >= first; --i) {
      observer.after_block_backward(ctx, i, dx);
      dx = blocks_[static_cast<std::size_t>(i)].backward(ctx, plan_of(tape.plans, i), dx,
                                                         tape.blocks[static_cast<std::size_t>(i)], grads...);
    }
  }

  [[gnu::cold]] View forward(auto& ctx, const TokenBatch& batch, const States& states, Tape* tape) const {
    if (tape) {
      tape->ids = batch.ids;
      if constexpr (Architecture::learned_positions) tape->positions = positions_of(ctx, batch, {});
    }
    View x = embed(ctx, batch);
    run(ctx, batch, states, x, 0, spec_.blocks, tape, NullObserver{});
    return x;
  }

  /// The gradients of all weights, from that of the final stream, which is overwritten.
  [[gnu::cold]] void backward(auto& ctx, const TokenBatch& batch, const States& states, const Tape& tape, View dx,
                              Gradients<Scalar>& grads) const requires trainable {
    run_backward(ctx, batch, states, tape, dx, 0, spec_.blocks, NullObserver{}, grads);
    if constexpr (Weights::Other::trainable) {
      if constexpr (Architecture::learned_positions) positions_->backward(ctx, tape.positions, ConstView(dx), grads);
      if constexpr (Architecture::scaled_embedding) ctx.backend.scale(ConstView(dx), embedding_scale(), dx);
      embedding_.backward(ctx, tape.ids, ConstView(dx), grads);
    }
  }

  [[gnu::cold]] void head(auto& ctx, ConstView rows, View logits, HeadCache& cache) const {
    cache.normed = ctx.arena.template matrix<Scalar>(rows.rows, rows.cols);
    norm_.forward(ctx, rows, cache.normed, cache.norm);
    output_map().forward(ctx, ConstView(cache.normed), logits, Assign{});  // [rows, D] -> [rows, V]
  }

  template <class... Grads>
  [[gnu::cold]] void head_backward(auto& ctx, ConstView rows, ConstView dlogits, View drows, const HeadCache& cache,
                                   Grads&... grads) const {
    const View dnormed = ctx.arena.template matrix<Scalar>(rows.rows, rows.cols);
    backward_through(
        output_map(),
        [&](const auto& map, auto&... g) {
          map.backward(ctx, ConstView(cache.normed), dlogits, dnormed, Assign{}, g...);
        },
        grads...);
    backward_through(
        norm_,
        [&](const Norm& norm, auto&... g) {
          norm.backward(ctx, rows, ConstView(dnormed), drows, Assign{}, cache.norm, g...);
        },
        grads...);
  }

  /// A session for `slots` sequences of at most `capacity` tokens.
  Session make_session(auto&, Index slots, Index capacity, const SessionOptions& options = {}) const {
    require<ContextLimitError>(capacity <= spec_.context, "a session of ", capacity,
                               " tokens was asked for, but the model's context is ", spec_.context);
    require<ConfigError>(options.blocks >= -1 && options.blocks <= spec_.blocks, "a session of ", options.blocks,
                         " blocks was asked for (-1: all), but the model has ", spec_.blocks);
    const Index blocks = options.blocks < 0 ? spec_.blocks : options.blocks;
    return Session(blocks, blocks == spec_.blocks, slots, capacity, spec_.heads.kv_heads * spec_.heads.width);
  }

  bool fits(const Session* session, Index slot, std::span<const TokenId> ids, Index, Index more,
            const SessionOptions& = {}) const {
    return (session ? session->length(slot) : 0) + static_cast<Index>(ids.size()) + more <= spec_.context;
  }

  template <class Observer>
  [[gnu::cold]] View advance(auto& ctx, Session& session, const TokenBatch& batch, Observer&& observer) const {
    batch.check();
    session.check_room(batch);
    const AttentionPlans plans = make_plans(ctx, batch, &session.cache_);
    View x = embed(ctx, batch, plans.all.past), other = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
    for (Index i = 0; i < session.blocks_; ++i) {
      const AttentionPlan<Scalar>& plan = plan_of(plans, i);
      other = other.middle_rows(0, plan.final_rows());
      {
        const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
        blocks_[static_cast<std::size_t>(i)].forward_cached(ctx, plan, session.cache_.rows(i), x, other);
      }
      std::swap(x, other);
      observer.after_block(ctx, i, x);
    }
    for (Index s = 0; s < batch.sequences(); ++s)
      session.cache_.advance(batch.slots[static_cast<std::size_t>(s)], batch.length(s));
    return x;
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    decltype(self.embedding_)::visit(self.embedding_, prefix + "model.embed_tokens", fn);
    if constexpr (Architecture::learned_positions)
      std::decay_t<decltype(*self.positions_)>::visit(*self.positions_, prefix + "model.embed_positions", fn);
    for (std::size_t i = 0; i < self.blocks_.size(); ++i)
      Block::visit(self.blocks_[i], prefix + "model.layers." + std::to_string(i), fn);
    Norm::visit(self.norm_, prefix + "model.norm", fn);
    if (self.lm_head_) OutputMap::visit(*self.lm_head_, prefix + "lm_head", fn);
  }

 private:
  using OutputMap = Linear<typename Weights::Other, Scalar>;

  static const ModelSpec& checked(const ModelSpec& spec) {
    spec.check("Transformer");
    return spec;
  }

  const OutputMap& output_map() const { return lm_head_ ? *lm_head_ : embedding_.as_linear(); }

  static Rotary<Scalar> rotary_of(const ModelSpec& spec, double base, const RotaryScaling& scaling) {
    if constexpr (!Architecture::attention.rotary) return {};
    else return {spec.rotary_width > 0 ? spec.rotary_width : spec.heads.width, base, scaling};
  }

  double embedding_scale() const { return std::sqrt(static_cast<double>(spec_.width)); }

  const AttentionPlan<Scalar>& plan_of(const AttentionPlans& plans, Index block) const {
    if (block == spec_.blocks - 1) return plans.last;
    return spec_.is_windowed(block) ? plans.windowed : plans.all;
  }

  /// As ids of the table of learned positions.
  [[gnu::cold]] static std::span<const TokenId> positions_of(auto& ctx, const TokenBatch& batch,
                                                             std::span<const Index> past) {
    batch.check();
    const auto positions = ctx.arena.template vector<TokenId>(batch.tokens());
    for (Index s = 0; s < batch.sequences(); ++s) {
      const auto i = static_cast<std::size_t>(s);
      for (Index t = batch.offsets[i]; t < batch.offsets[i + 1]; ++t)
        positions[static_cast<std::size_t>(t)] =
            static_cast<TokenId>((past.empty() ? 0 : past[i]) + t - batch.offsets[i]);
    }
    return positions;
  }

  [[gnu::cold]] AttentionPlans make_plans(auto& ctx, const TokenBatch& batch,
                                          const KvCache<Scalar>* cache = nullptr) const {
    batch.check();
    AttentionPlans plans;
    AttentionPlan<Scalar>& plan = plans.all;
    plan.tokens.offsets = batch.offsets;
    plan.slots = batch.slots;
    const auto visible = ctx.arena.template vector<VisibleRange>(batch.tokens());
    const auto in_window = ctx.arena.template vector<VisibleRange>(spec_.window > 0 ? batch.tokens() : 0);
    const auto positions = ctx.arena.template vector<Index>(batch.tokens());
    const auto past = ctx.arena.template vector<Index>(batch.sequences());
    for (Index s = 0; s < batch.sequences(); ++s) {
      const auto i = static_cast<std::size_t>(s);
      past[i] = cache ? cache->length(batch.slots[i]) : 0;
      require<ContextLimitError>(past[i] + batch.length(s) <= spec_.context, "sequence ", s, " has ",
                                 past[i] + batch.length(s), " tokens, but the model's context is ", spec_.context);
      for (Index t = batch.offsets[i]; t < batch.offsets[i + 1]; ++t) {
        const Index position = past[i] + t - batch.offsets[i];
        positions[static_cast<std::size_t>(t)] = position;
        visible[static_cast<std::size_t>(t)] = {0, position + 1};
        if (spec_.window > 0)
          in_window[static_cast<std::size_t>(t)] = {std::max<Index>(0, position + 1 - spec_.window), position + 1};
      }
    }
    plan.tokens.visible = visible;
    plan.past = past;
    if constexpr (Architecture::attention.rotary)
      plan.tokens.angles = rotary_.angles(ctx, std::span<const Index>(positions));
    if (spec_.window > 0) {
      plans.windowed = plan;
      plans.windowed.tokens.visible = in_window;
      if constexpr (Architecture::attention.rotary)
        if (spec_.window_rotary_base > 0)
          plans.windowed.tokens.angles = window_rotary_.angles(ctx, std::span<const Index>(positions));
    }
    plans.last = spec_.is_windowed(spec_.blocks - 1) ? plans.windowed : plans.all;
    plans.last.rows = batch.rows;
    if (!batch.rows.empty()) plans.last.chosen = chosen_queries(ctx, plans.last.tokens, batch.rows);
    return plans;
  }

  ModelSpec spec_;
  Rotary<Scalar> rotary_, window_rotary_;
  Embedding<typename Weights::Other, Scalar> embedding_;
  std::optional<Embedding<typename Weights::Other, Scalar>> positions_;
  std::vector<Block> blocks_;
  Norm norm_;
  std::optional<OutputMap> lm_head_;
};

}  // namespace calm::inline CALM_ABI
