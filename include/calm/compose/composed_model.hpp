// ComposedModel: a frozen anchor and frozen augments joined by trainable bridges (CALM, arXiv 2401.02412, section 3).
//
// It is a Decoder like its anchor, so that every tool takes it and it can be an anchor again: its own links write first,
// an outer observer reads after them. Anchor and augments are shared and immutable; only the bridges belong to it.
#pragma once

#include <calm/compose/alignment.hpp>
#include <calm/compose/cross_attention_bridge.hpp>
#include <calm/compose/layer_tap.hpp>
#include <calm/compose/link.hpp>
#include <calm/model/decoder.hpp>
#include <calm/model/kv_cache.hpp>
#include <calm/nn/embedding.hpp>

#include <tuple>

namespace calm::inline CALM_ABI {

template <class AnchorType, class... Augments>
class ComposedModel {
  static_assert(sizeof...(Augments) >= 1, "a composition needs at least one augment");
  static_assert((std::is_same_v<typename AnchorType::Scalar, typename Augments::Scalar> && ...),
                "the anchor and its augments must compute in the same scalar type");

 public:
  using Anchor = AnchorType;
  using Scalar = typename Anchor::Scalar;
  using Bridge = CrossAttentionBridge<Scalar>;
  using View = MatrixView<Scalar>;
  using ConstView = MatrixView<const Scalar>;
  using HeadCache = typename Anchor::HeadCache;
  using AugmentPointers = std::tuple<std::shared_ptr<const Augments>...>;
  static constexpr bool trainable = true;
  static constexpr std::size_t augment_count = sizeof...(Augments);

  /// What a pass needs of the frozen models; it depends on no bridge and may be kept for the same batch.
  struct States {
    typename Anchor::States anchor;
    std::tuple<typename Augments::States...> inner;
    std::vector<AlignedBatch> aligned;           // one for each augment
    std::vector<TappedStates<Scalar>> tapped;    // one for each augment
    Buffer<Scalar> lower;                        // the anchor's stream after the lowest linked block, before its links
    std::vector<bool> disabled;                  // [links] links that write nothing; empty: none
    bool augments = true;                        // false: the pass is the anchor's alone
  };

  struct Tape {
    typename Anchor::Tape anchor;
    std::span<BridgePlan<Scalar>> plans;         // one for each augment
    std::vector<typename Bridge::Cache> bridges;  // [links]
    std::vector<ConstView> before;               // [links] the stream that each link read
  };

  class Session {
   public:
    Index length(Index slot) const { return anchor_.length(slot); }
    void check_room(const TokenBatch& batch) const { anchor_.check_room(batch); }

    void clear(Index slot) {
      anchor_.clear(slot);
      std::apply([&](auto&... session) { (session.clear(slot), ...); }, augments_);
      for (auto& cache : bridges_) cache.clear(slot);
      for (auto& states : alignment_) states.at(static_cast<std::size_t>(slot)).clear();
    }

    std::size_t bytes() const {
      std::size_t total = anchor_.bytes();
      std::apply([&](const auto&... session) { ((total += session.bytes()), ...); }, augments_);
      for (const auto& cache : bridges_) total += cache.bytes();
      return total;
    }

   private:
    friend ComposedModel;
    typename Anchor::Session anchor_;
    std::tuple<typename Augments::Session...> augments_;
    std::vector<KvCache<Scalar>> bridges_;               // one for each augment, a layer for each of its links
    std::vector<typename Bridge::Folded> folded_;        // [links]
    std::vector<std::vector<AlignmentState>> alignment_;  // [augments][slots]
    std::vector<std::vector<AlignmentState>> next_;      // scratch: the states after the tokens that are being added
    std::vector<AlignedBatch> aligned_;                  // scratch, one for each augment
    std::vector<TappedStates<Scalar>> tapped_;           // scratch, one for each augment
    bool enabled_ = true;

    Session(typename Anchor::Session anchor, std::tuple<typename Augments::Session...> augments)
        : anchor_(std::move(anchor)), augments_(std::move(augments)) {}
  };

  /// Throws ConfigError that names the link where it does not fit. `aligners` are one for each augment, or none for
  /// IdentityAligner everywhere.
  ComposedModel(std::shared_ptr<const Anchor> anchor, AugmentPointers augments, const Links& links,
                BridgeOptions options = {}, std::vector<std::shared_ptr<const Aligner>> aligners = {})
      : anchor_(std::move(anchor)), augments_(std::move(augments)), aligners_(std::move(aligners)) {
    require<ConfigError>(anchor_ != nullptr, "the anchor is a null pointer");
    std::apply([](const auto&... augment) {
      require<ConfigError>(((augment != nullptr) && ...), "an augment is a null pointer");
    }, augments_);
    if (aligners_.empty()) aligners_.assign(augment_count, std::make_shared<IdentityAligner>());
    require<ConfigError>(aligners_.size() == augment_count, aligners_.size(), " aligners for ", augment_count, " augments");
    const std::vector<ModelSpec> specs = augment_specs();
    std::vector<Index> blocks;
    for (const ModelSpec& spec : specs) blocks.push_back(spec.blocks);
    links_ = links.resolve(anchor_->spec().blocks, blocks);
    if (options.heads == 0) options.heads = anchor_->spec().heads.query_heads;
    options_ = options;
    at_block_.resize(static_cast<std::size_t>(anchor_->spec().blocks));
    for (std::size_t k = 0; k < links_.size(); ++k) {
      const ModelSpec& augment = specs[static_cast<std::size_t>(links_[k].augment)];
      bridges_.emplace_back("links." + std::to_string(k), anchor_->spec().width, augment.width, options);
      at_block_[static_cast<std::size_t>(links_[k].write)].push_back(k);
    }
    for (auto& list : at_block_)
      std::sort(list.begin(), list.end(), [&](std::size_t a, std::size_t b) {
        return std::pair(links_[a].augment, links_[a].tap) < std::pair(links_[b].augment, links_[b].tap);
      });
    if (options.rotary) rotary_ = Rotary<Scalar>(anchor_->spec().width / options.heads, 10000);
  }

  const ModelSpec& spec() const { return anchor_->spec(); }
  const Anchor& anchor() const { return *anchor_; }
  template <std::size_t I>
  const auto& augment() const {
    static_assert(I < augment_count, "there are fewer augments than this index asks for");
    return *std::get<I>(augments_);
  }
  const std::vector<Link>& links() const { return links_; }
  const BridgeOptions& options() const { return options_; }
  const std::vector<Bridge>& bridges() const { return bridges_; }

  /// The lowest anchor block that a link writes after: below it nothing depends on the bridges.
  Index lowest_write() const {
    Index lowest = spec().blocks - 1;
    for (const Link& link : links_) lowest = std::min(lowest, link.write);
    return lowest;
  }

  View embed(auto& ctx, std::span<const TokenId> ids) const { return anchor_->embed(ctx, ids); }

  void prepare_augments(auto& ctx, const TokenBatch& batch, States& states) const {
    anchor_->prepare_augments(ctx, batch, states.anchor);
    if (states.tapped.empty()) states.tapped = empty_taps();
    states.aligned.resize(augment_count);
    if (!states.augments) return;
    for_each_augment([&]<std::size_t I>(const auto& augment) {
      AlignedBatch& aligned = states.aligned[I];
      aligned.clear();
      for (Index s = 0; s < batch.sequences(); ++s) {
        AlignmentState start;
        aligned.append(*aligners_[I], start, ids_of(batch, s), batch.prompt_length(s));
      }
      const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
      const TokenBatch tokens{aligned.ids, aligned.offsets, aligned.prompt_lengths, {}};
      auto& inner = std::get<I>(states.inner);
      augment.prepare_augments(ctx, tokens, inner);
      View x = augment.embed(ctx, tokens.ids);
      augment.run(ctx, tokens, inner, x, 0, states.tapped[I].depth(), nullptr, LayerTap<Scalar>(states.tapped[I]));
    });
  }

  void prepare(auto& ctx, const TokenBatch& batch, States& states) const {
    prepare_augments(ctx, batch, states);
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    View x = embed(ctx, batch.ids);
    anchor_->run(ctx, batch, states.anchor, x, 0, lowest_write() + 1, nullptr, NullObserver{});
    ctx.backend.scale(ConstView(x), 1, states.lower.resize(x.rows, x.cols));
  }

  template <class Observer>
  void run(auto& ctx, const TokenBatch& batch, const States& states, View& x, Index first, Index last, Tape* tape,
           Observer&& observer) const {
    anchor_->run(ctx, batch, states.anchor, x, first, last, tape ? &tape->anchor : nullptr,
                 LinkWriter<Observer>{*this, states, start(ctx, batch, states, tape), tape, observer});
  }

  template <class Observer, class... Grads>
  void run_backward(auto& ctx, const TokenBatch& batch, const States& states, const Tape& tape, View dx, Index first,
                    Index last, Observer&& observer, Grads&... grads) const {
    anchor_->run_backward(ctx, batch, states.anchor, tape.anchor, dx, first, last,
                          LinkReader<Observer, Grads...>{*this, states, tape, observer, {grads...}});
  }

  View forward(auto& ctx, const TokenBatch& batch, const States& states, Tape* tape) const {
    const View lower = ctx.arena.template matrix<Scalar>(batch.tokens(), spec().width);
    require<ShapeError>(states.lower.view().rows == batch.tokens(), "forward: the states were prepared for ",
                        states.lower.view().rows, " tokens, the batch has ", batch.tokens());
    ctx.backend.scale(states.lower.view(), 1, lower);
    View x = lower;
    NullObserver nothing;
    LinkWriter<NullObserver> writer{*this, states, start(ctx, batch, states, tape), tape, nothing};
    writer.after_block(ctx, lowest_write(), x);
    anchor_->run(ctx, batch, states.anchor, x, lowest_write() + 1, spec().blocks, tape ? &tape->anchor : nullptr, writer);
    return x;
  }

  /// The gradients of the bridges from that of the final stream, which is overwritten. Stops at the lowest link.
  void backward(auto& ctx, const TokenBatch& batch, const States& states, const Tape& tape, View dx,
                Gradients<Scalar>& grads) const {
    run_backward(ctx, batch, states, tape, dx, lowest_write() + 1, spec().blocks, NullObserver{}, grads);
    read_links(ctx, states, tape, lowest_write(), dx, false, grads);
  }

  void head(auto& ctx, ConstView rows, View logits, HeadCache& cache) const { anchor_->head(ctx, rows, logits, cache); }

  /// The head is frozen: gradients go through it only.
  template <class... Grads>
  void head_backward(auto& ctx, ConstView rows, ConstView dlogits, View drows, const HeadCache& cache, Grads&...) const {
    anchor_->head_backward(ctx, rows, dlogits, drows, cache);
  }

  Session make_session(auto& ctx, Index slots, Index capacity, const SessionOptions& options = {}) const {
    std::vector<TappedStates<Scalar>> taps = empty_taps();
    Session session(anchor_->make_session(ctx, slots, capacity, SessionOptions{options.blocks}), [&]<std::size_t... I>(std::index_sequence<I...>) {
      return std::tuple<typename Augments::Session...>(std::get<I>(augments_)->make_session(
          ctx, slots, options.augments ? room(I, capacity) : 1, SessionOptions{taps[I].depth(), options.augments})...);
    }(std::index_sequence_for<Augments...>{}));
    session.enabled_ = options.augments;
    if (!options.augments) return session;
    std::vector<Index> layers(augment_count, 0);
    for (const Link& link : links_) ++layers[static_cast<std::size_t>(link.augment)];
    for (std::size_t a = 0; a < augment_count; ++a)
      session.bridges_.emplace_back(layers[a], slots, room(a, capacity), spec().width);
    for (const Bridge& bridge : bridges_) session.folded_.push_back(bridge.fold(ctx));
    session.alignment_.assign(augment_count, std::vector<AlignmentState>(static_cast<std::size_t>(slots)));
    session.next_.resize(augment_count);
    session.aligned_.resize(augment_count);
    session.tapped_ = std::move(taps);
    return session;
  }

  template <class Observer>
  View advance(auto& ctx, Session& session, const TokenBatch& batch, Observer&& observer) const {
    batch.check();
    session.check_room(batch);
    if (!session.enabled_) return anchor_->advance(ctx, session.anchor_, batch, observer);
    check_ids(batch.ids, spec().vocabulary);
    for_each_augment([&]<std::size_t I>(const auto& augment) { align<I>(augment, session, batch); });
    const auto plans = ctx.arena.template vector<BridgePlan<Scalar>>(augment_count);
    for_each_augment([&]<std::size_t I>(const auto& augment) { plans[I] = advance_augment<I>(ctx, augment, session, batch); });
    const View x = anchor_->advance(ctx, session.anchor_, batch, CachedLinkWriter<Observer>{*this, session, batch, plans, observer});
    return x;
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    for (std::size_t k = 0; k < self.bridges_.size(); ++k)
      Bridge::visit(self.bridges_[k], prefix + "links." + std::to_string(k), fn);
  }

 private:
  template <class Arena>
  using MarkOf = typename std::decay_t<Arena>::Mark;

  /// Adds the contributions of the links to the stream, then shows it to the outer observer.
  template <class Outer>
  struct LinkWriter {
    const ComposedModel& model;
    const States& states;
    std::span<const BridgePlan<Scalar>> plans;
    Tape* tape;
    std::remove_reference_t<Outer>& outer;

    void after_block(auto& ctx, Index block, View& x) {
      model.write_links(ctx, states, plans, tape, block, x);
      outer.after_block(ctx, block, x);
    }
    void after_block_backward(auto&, Index, View) const {}
  };

  template <class Outer, class... Grads>
  struct LinkReader {
    const ComposedModel& model;
    const States& states;
    const Tape& tape;
    std::remove_reference_t<Outer>& outer;
    std::tuple<Grads&...> grads;

    void after_block(auto&, Index, View&) const {}
    void after_block_backward(auto& ctx, Index block, View dx) {
      outer.after_block_backward(ctx, block, dx);
      std::apply([&](auto&... g) { model.read_links(ctx, states, tape, block, dx, true, g...); }, grads);
    }
  };

  template <class Outer>
  struct CachedLinkWriter {
    const ComposedModel& model;
    Session& session;
    const TokenBatch& batch;
    std::span<const BridgePlan<Scalar>> plans;
    std::remove_reference_t<Outer>& outer;

    void after_block(auto& ctx, Index block, View& x) {
      model.write_cached_links(ctx, session, batch, plans, block, x);
      outer.after_block(ctx, block, x);
    }
    void after_block_backward(auto&, Index, View) const {}
  };

  template <class Fn>
  void for_each_augment(Fn&& fn) const {
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      (fn.template operator()<I>(*std::get<I>(augments_)), ...);
    }(std::index_sequence_for<Augments...>{});
  }

  std::vector<ModelSpec> augment_specs() const {
    std::vector<ModelSpec> specs;
    for_each_augment([&]<std::size_t I>(const auto& augment) { specs.push_back(augment.spec()); });
    return specs;
  }

  std::vector<TappedStates<Scalar>> empty_taps() const {
    std::vector<TappedStates<Scalar>> taps;
    for (std::size_t a = 0; a < augment_count; ++a) {
      std::vector<Index> blocks;
      for (const Link& link : links_)
        if (link.augment == static_cast<Index>(a)) blocks.push_back(link.tap);
      taps.emplace_back(std::move(blocks));
    }
    return taps;
  }

  Index room(std::size_t augment, Index capacity) const { return aligners_[augment]->augment_capacity(capacity); }

  static std::span<const TokenId> ids_of(const TokenBatch& batch, Index s) {
    return batch.ids.subspan(static_cast<std::size_t>(batch.offsets[static_cast<std::size_t>(s)]),
                             static_cast<std::size_t>(batch.length(s)));
  }

  /// Plans for a pass without caches; the tape keeps them.
  std::span<const BridgePlan<Scalar>> start(auto& ctx, const TokenBatch& batch, const States& states, Tape* tape) const {
    const auto plans = ctx.arena.template vector<BridgePlan<Scalar>>(augment_count);
    if (states.augments) {
      const auto positions = ctx.arena.template vector<Index>(batch.tokens());
      for (Index s = 0; s < batch.sequences(); ++s)
        for (Index t = 0; t < batch.length(s); ++t)
          positions[static_cast<std::size_t>(batch.offsets[static_cast<std::size_t>(s)] + t)] = t;
      for (std::size_t a = 0; a < augment_count; ++a) plans[a] = plan_for(ctx, batch, states.aligned[a], positions);
    }
    if (tape) {
      tape->plans = plans;
      tape->bridges.resize(links_.size());
      tape->before.resize(links_.size());
    }
    return plans;
  }

  BridgePlan<Scalar> plan_for(auto& ctx, const TokenBatch& batch, const AlignedBatch& aligned,
                              std::span<const Index> positions) const {
    const auto visible = ctx.arena.template vector<VisibleRange>(batch.tokens());
    for (std::size_t t = 0; t < visible.size(); ++t) visible[t] = {0, aligned.visible[t]};
    BridgePlan<Scalar> plan{batch.offsets, aligned.offsets, visible, {}, {}};
    if (options_.rotary) {
      plan.query_angles = rotary_.angles(ctx, positions);
      plan.key_angles = rotary_.angles(ctx, std::span<const Index>(aligned.key_positions));
    }
    return plan;
  }

  bool writes(const States& states, std::size_t k) const { return states.disabled.empty() || !states.disabled[k]; }

  void write_links(auto& ctx, const States& states, std::span<const BridgePlan<Scalar>> plans, Tape* tape, Index block,
                   View& x) const {
    const auto& here = at_block_[static_cast<std::size_t>(block)];
    if (here.empty() || !states.augments) return;
    const auto add_all = [&](View total, View target) {
      ctx.backend.scale(ConstView(x), 0, total);
      for (const std::size_t k : here) {
        if (!writes(states, k)) continue;
        typename Bridge::Cache local;
        typename Bridge::Cache& cache = tape ? tape->bridges[k] : local;
        if (tape) tape->before[k] = x;
        const auto augment = static_cast<std::size_t>(links_[k].augment);
        bridges_[k].forward(ctx, plans[augment], states.tapped[augment].after(links_[k].tap), x, total, cache);
      }
      if (target.data != x.data) ctx.backend.scale(ConstView(x), 1, target);
      ctx.backend.add(ConstView(total), target);
    };
    if (tape) {
      const View total = ctx.arena.template matrix<Scalar>(x.rows, x.cols), y = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
      add_all(total, y);
      x = y;
    } else {
      const MarkOf<decltype(ctx.arena)> mark(ctx.arena);
      add_all(ctx.arena.template matrix<Scalar>(x.rows, x.cols), x);
    }
  }

  template <class... Grads>
  void read_links(auto& ctx, const States& states, const Tape& tape, Index block, View dx, bool input_gradient,
                  Grads&... grads) const {
    const auto& here = at_block_[static_cast<std::size_t>(block)];
    if (here.empty() || !states.augments) return;
    const MarkOf<decltype(ctx.arena)> mark(ctx.arena);
    const View dtotal = ctx.arena.template matrix<Scalar>(dx.rows, dx.cols);
    ctx.backend.scale(ConstView(dx), 1, dtotal);
    for (const std::size_t k : here) {
      if (!writes(states, k)) continue;
      const auto augment = static_cast<std::size_t>(links_[k].augment);
      bridges_[k].backward(ctx, tape.plans[augment], states.tapped[augment].after(links_[k].tap), tape.before[k],
                           ConstView(dtotal), input_gradient ? dx : View{}, tape.bridges[k], grads...);
    }
  }

  /// The tokens of an augment that the batch brings, into the session's scratch. Throws before anything else has changed.
  template <std::size_t I>
  void align(const auto& augment, Session& session, const TokenBatch& batch) const {
    AlignedBatch& aligned = session.aligned_[I];
    aligned.clear();
    session.next_[I].clear();
    for (Index s = 0; s < batch.sequences(); ++s) {
      const auto i = static_cast<std::size_t>(s);
      AlignmentState next = session.alignment_[I][static_cast<std::size_t>(batch.slots[i])];
      aligned.append(*aligners_[I], next, ids_of(batch, s), batch.prompt_length(s));
      session.bridges_[I].check_room(batch.slots[i], aligned.offsets[i + 1] - aligned.offsets[i]);
      session.next_[I].push_back(std::move(next));
    }
    check_ids(aligned.ids, augment.spec().vocabulary);
  }

  /// Gives an augment the tokens that align() found, and the link caches the keys and values that follow.
  template <std::size_t I>
  BridgePlan<Scalar> advance_augment(auto& ctx, const auto& augment, Session& session, const TokenBatch& batch) const {
    const AlignedBatch& aligned = session.aligned_[I];
    KvCache<Scalar>& cache = session.bridges_[I];
    const auto past = ctx.arena.template vector<Index>(batch.sequences());
    const auto positions = ctx.arena.template vector<Index>(batch.tokens());
    for (Index s = 0; s < batch.sequences(); ++s) {
      const auto i = static_cast<std::size_t>(s);
      past[i] = cache.length(batch.slots[i]);
      const Index before = session.alignment_[I][static_cast<std::size_t>(batch.slots[i])].anchor_tokens;
      for (Index t = 0; t < batch.length(s); ++t)
        positions[static_cast<std::size_t>(batch.offsets[i] + t)] = before + t;
    }
    const TokenBatch tokens{aligned.ids, aligned.offsets, aligned.prompt_lengths, batch.slots};
    const BridgePlan<Scalar> plan = plan_for(ctx, batch, aligned, positions);
    if (tokens.tokens() > 0) {
      const MarkOf<decltype(ctx.arena)> mark(ctx.arena);
      augment.advance(ctx, std::get<I>(session.augments_), tokens, LayerTap<Scalar>(session.tapped_[I]));
      Index layer = 0;
      for (std::size_t k = 0; k < links_.size(); ++k)
        if (links_[k].augment == static_cast<Index>(I))
          bridges_[k].append(ctx, plan, session.folded_[k], cache.rows(layer++), session.tapped_[I].after(links_[k].tap),
                             batch.slots, past);
    }
    for (std::size_t s = 0; s < session.next_[I].size(); ++s) {
      session.alignment_[I][static_cast<std::size_t>(batch.slots[s])] = std::move(session.next_[I][s]);
      cache.advance(batch.slots[s], aligned.offsets[s + 1] - aligned.offsets[s]);
    }
    return plan;
  }

  void write_cached_links(auto& ctx, Session& session, const TokenBatch& batch,
                          std::span<const BridgePlan<Scalar>> plans, Index block, View x) const {
    const auto& here = at_block_[static_cast<std::size_t>(block)];
    if (here.empty()) return;
    const MarkOf<decltype(ctx.arena)> mark(ctx.arena);
    const View total = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
    ctx.backend.scale(ConstView(x), 0, total);
    const auto key_counts = ctx.arena.template vector<Index>(batch.sequences());
    for (const std::size_t k : here) {
      KvCache<Scalar>& cache = session.bridges_[static_cast<std::size_t>(links_[k].augment)];
      Index layer = 0;
      for (std::size_t other = 0; other < k; ++other) layer += links_[other].augment == links_[k].augment ? 1 : 0;
      for (std::size_t s = 0; s < key_counts.size(); ++s) key_counts[s] = cache.length(batch.slots[s]);
      bridges_[k].forward_cached(ctx, plans[static_cast<std::size_t>(links_[k].augment)], cache.rows(layer), x, batch.slots,
                                 key_counts, total);
    }
    ctx.backend.add(ConstView(total), x);
  }

  std::shared_ptr<const Anchor> anchor_;
  AugmentPointers augments_;
  std::vector<std::shared_ptr<const Aligner>> aligners_;
  std::vector<Link> links_;
  std::vector<std::vector<std::size_t>> at_block_;  // links that write after each block, in the order of augment and tap
  BridgeOptions options_;
  std::vector<Bridge> bridges_;
  Rotary<Scalar> rotary_;
};

/// Joins an anchor and augments: compose(anchor, {{0, 1, 2}}, {}, augment) links block 1 of augment 0 to block 2.
template <class Anchor, class... Augments>
ComposedModel<Anchor, Augments...> compose(std::shared_ptr<const Anchor> anchor, const Links& links,
                                           const BridgeOptions& options, std::shared_ptr<const Augments>... augments) {
  return {std::move(anchor), {std::move(augments)...}, links, options};
}

}  // namespace calm::inline CALM_ABI
