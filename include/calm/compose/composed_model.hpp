// ComposedModel: a frozen anchor and frozen augments joined by trainable bridges (CALM, arXiv 2401.02412, section 3).
//
// It is a Decoder like its anchor, so that every tool takes it and it can be an anchor again: its own links write
// first, an outer observer reads after them. Anchor and augments are shared and immutable; only the bridges belong to
// it.
#pragma once

#include <calm/compose/augment_list.hpp>
#include <calm/compose/link_set.hpp>
#include <calm/nn/embedding.hpp>
#include <calm/tensor/buffer.hpp>

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
  using List = AugmentList<Augments...>;
  using AugmentPointers = typename List::Pointers;
  static constexpr bool trainable = true;
  static constexpr std::size_t augment_count = List::static_size;

  /// What a pass needs of the frozen models; it depends on no bridge and may be kept for the same batch.
  struct States : AugmentStates<Scalar> {
    typename Anchor::States anchor;
    typename List::States inner;
    Buffer<Scalar> lower;  // the anchor's stream after the lowest linked block, before its links

    std::size_t bytes() const {
      std::size_t total = anchor.bytes() + lower.bytes();
      List::visit(inner, [&](const auto& states) { total += states.bytes(); });
      for (const auto& taps : this->tapped)
        for (const auto& stream : taps.streams) total += stream.bytes();
      return total;
    }
  };

  struct Tape : LinkTape<Scalar> {
    typename Anchor::Tape anchor;
  };

  class Session {
   public:
    Index length(Index slot) const { return anchor_.length(slot); }
    void check_room(const TokenBatch& batch) const { anchor_.check_room(batch); }

    void clear(Index slot) {
      anchor_.clear(slot);
      List::visit(augments_, [&](auto& session) { session.clear(slot); });
      for (auto& cache : links_.augments) cache.clear(slot);
      for (auto& states : alignment_) states.at(static_cast<std::size_t>(slot)).clear();
    }

    std::size_t bytes() const {
      std::size_t total = anchor_.bytes();
      List::visit(augments_, [&](const auto& session) { total += session.bytes(); });
      for (const auto& cache : links_.augments) total += cache.bytes();
      return total;
    }

   private:
    friend ComposedModel;
    typename Anchor::Session anchor_;
    typename List::Sessions augments_;
    LinkCaches<Scalar> links_;
    std::vector<std::vector<AlignmentState>> alignment_;  // [augments][slots]
    std::vector<std::vector<AlignmentState>> next_;       // scratch, [augments][sequences]: after the tokens that come
    std::vector<AlignedBatch> aligned_;                   // scratch, one for each augment
    std::vector<TappedStates<Scalar>> tapped_;            // scratch, one for each augment
    bool enabled_ = true;

    Session(typename Anchor::Session anchor, typename List::Sessions augments)
        : anchor_(std::move(anchor)), augments_(std::move(augments)) {}
  };

  /// Throws ConfigError that names the link where it does not fit. `aligners` are one for each augment, or none for
  /// IdentityAligner everywhere.
  ComposedModel(std::shared_ptr<const Anchor> anchor, AugmentPointers augments, const Links& links,
                BridgeOptions options = {}, std::vector<std::shared_ptr<const Aligner>> aligners = {})
      : anchor_(std::move(anchor)), augments_(std::move(augments)), aligners_(std::move(aligners)),
        links_(links, checked(anchor_)->spec(), augment_specs(), options) {
    if (aligners_.empty()) aligners_.assign(augments_.size(), std::make_shared<IdentityAligner>());
    require<ConfigError>(aligners_.size() == augments_.size(), aligners_.size(), " aligners for ", augments_.size(),
                         " augments");
    for (std::size_t i = 0; i < aligners_.size(); ++i)
      require<ConfigError>(aligners_[i] != nullptr, "the aligner of augment ", i, " is a null pointer");
  }

  const ModelSpec& spec() const { return anchor_->spec(); }
  const Anchor& anchor() const { return *anchor_; }
  template <std::size_t I>
  const auto& augment() const {
    static_assert(I < augment_count, "there are fewer augments than this index asks for");
    return augments_.template get<I>();
  }
  const std::vector<Link>& links() const { return links_.links(); }
  const BridgeOptions& options() const { return links_.options(); }
  std::span<const std::shared_ptr<const Aligner>> aligners() const { return aligners_; }  // one for each augment
  const std::vector<Bridge>& bridges() const { return links_.bridges(); }

  /// The lowest anchor block that a link writes after: below it nothing depends on the bridges.
  Index lowest_write() const { return links_.lowest_write(); }

  [[gnu::cold]] View embed(auto& ctx, const TokenBatch& batch) const { return anchor_->embed(ctx, batch); }

  [[gnu::cold]] void prepare_augments(auto& ctx, const TokenBatch& batch, States& states) const {
    batch.check();
    anchor_->prepare_augments(ctx, batch, states.anchor);
    if (states.tapped.empty()) states.tapped = links_.empty_taps();
    states.offsets.clear();  // until all is there, they serve no batch
    make_as_many(states.aligned, augments_.size());
    for (AlignedBatch& aligned : states.aligned) aligned.clear();
    if (states.augments) read_augments(ctx, batch, states);
    states.offsets.assign(batch.offsets.begin(), batch.offsets.end());
  }

  [[gnu::cold]] void prepare(auto& ctx, const TokenBatch& batch, States& states) const {
    prepare_augments(ctx, batch, states);
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    TokenBatch all = batch;  // states serve whatever rows a pass asks for
    all.rows = {};
    View x = embed(ctx, all);
    anchor_->run(ctx, all, states.anchor, x, 0, lowest_write() + 1, nullptr, NullObserver{});
    ctx.backend.scale(ConstView(x), 1, states.lower.resize(x.rows, x.cols));
  }

  template <class Observer>
  [[gnu::cold]] void run(auto& ctx, const TokenBatch& batch, const States& states, View& x, Index first, Index last,
                         Tape* tape, Observer&& observer) const {
    anchor_->run(ctx, batch, states.anchor, x, first, last, tape ? &tape->anchor : nullptr,
                 LinkWriter<Observer>{links_, states, links_.plans(ctx, batch, states, tape), tape, observer});
  }

  template <class Observer, class... Grads>
  [[gnu::cold]] void run_backward(auto& ctx, const TokenBatch& batch, const States& states, const Tape& tape, View& dx,
                                  Index first, Index last, Observer&& observer, Grads&... grads) const {
    anchor_->run_backward(ctx, batch, states.anchor, tape.anchor, dx, first, last,
                          LinkReader<Observer, Grads...>{links_, states, tape, observer, {grads...}});
  }

  [[gnu::cold]] View forward(auto& ctx, const TokenBatch& batch, const States& states, Tape* tape) const {
    require<ShapeError>(states.lower.view().rows == batch.tokens(), "forward: the states were prepared for ",
                        states.lower.view().rows, " tokens (prepare()), the batch has ", batch.tokens());
    NullObserver nothing;
    LinkWriter<NullObserver> writer{links_, states, links_.plans(ctx, batch, states, tape), tape, nothing};
    const bool narrows = lowest_write() + 1 == spec().blocks && !batch.rows.empty();
    View x = ctx.arena.template matrix<Scalar>(narrows ? batch.final_rows() : batch.tokens(), spec().width);
    if (narrows) ctx.backend.gather_rows(states.lower.view(), batch.rows, x);
    else ctx.backend.scale(states.lower.view(), 1, x);
    writer.after_block(ctx, lowest_write(), x);
    anchor_->run(ctx, batch, states.anchor, x, lowest_write() + 1, spec().blocks, tape ? &tape->anchor : nullptr,
                 writer);
    return x;
  }

  /// The gradients of the bridges from that of the final stream, which is overwritten. Stops at the lowest link.
  [[gnu::cold]] void backward(auto& ctx, const TokenBatch& batch, const States& states, const Tape& tape, View dx,
                              Gradients<Scalar>& grads) const {
    run_backward(ctx, batch, states, tape, dx, lowest_write() + 1, spec().blocks, NullObserver{}, grads);
    links_.read_gradient(ctx, lowest_write(), states, tape, dx, false, grads);
  }

  [[gnu::cold]] void head(auto& ctx, ConstView rows, View logits, HeadCache& cache) const {
    anchor_->head(ctx, rows, logits, cache);
  }

  /// The head is frozen: gradients go through it only.
  template <class... Grads>
  [[gnu::cold]] void head_backward(auto& ctx, ConstView rows, ConstView dlogits, View drows, const HeadCache& cache,
                                   Grads&...) const {
    anchor_->head_backward(ctx, rows, dlogits, drows, cache);
  }

  [[gnu::cold]] Session make_session(auto& ctx, Index slots, Index capacity, const SessionOptions& options = {}) const {
    std::vector<TappedStates<Scalar>> taps = links_.empty_taps();
    Session session(anchor_->make_session(ctx, slots, capacity, SessionOptions{options.blocks}),
                    augments_.make_sessions([&](std::size_t i, const auto& augment) {
                      return augment.make_session(ctx, slots, options.augments ? room(i, augment, capacity) : 1,
                                                  SessionOptions{taps[i].depth(), options.augments});
                    }));
    session.enabled_ = options.augments;
    if (!options.augments) return session;
    std::vector<Index> rooms;
    augments_.for_each([&](std::size_t i, const auto& augment) { rooms.push_back(room(i, augment, capacity)); });
    session.links_ = links_.make_caches(ctx, slots, rooms);
    session.alignment_.assign(augments_.size(), std::vector<AlignmentState>(static_cast<std::size_t>(slots)));
    session.next_ = session.alignment_;
    make_as_many(session.aligned_, augments_.size());
    session.tapped_ = std::move(taps);
    return session;
  }

  bool fits(const Session* session, Index slot, std::span<const TokenId> ids, Index prompt_length, Index more,
            const SessionOptions& options = {}) const {
    if (!anchor_->fits(session ? &session->anchor_ : nullptr, slot, ids, prompt_length, more)) return false;
    bool all = true;
    const auto check = [&](std::size_t i, const auto& augment, const auto* augment_session) {
      AlignmentState next;
      if (session) next = session->alignment_[i][static_cast<std::size_t>(slot)];
      AlignedBatch aligned;
      aligned.clear();
      aligned.append(*aligners_[i], next, ids, prompt_length);
      all = all && augment.fits(augment_session, slot, aligned.ids, aligned.prompt_lengths.back(),
                                aligners_[i]->augment_minimum(more));
    };
    if (!session && options.augments)
      augments_.for_each([&](std::size_t i, const auto& augment) {
        check(i, augment, static_cast<const typename std::decay_t<decltype(augment)>::Session*>(nullptr));
      });
    else if (session && session->enabled_)
      augments_.for_each(session->augments_, [&](std::size_t i, const auto& augment, const auto& augment_session) {
        check(i, augment, &augment_session);
      });
    return all;
  }

  template <class Observer>
  [[gnu::cold]] View advance(auto& ctx, Session& session, const TokenBatch& batch, Observer&& observer) const {
    batch.check();
    session.check_room(batch);
    if (!session.enabled_) return anchor_->advance(ctx, session.anchor_, batch, observer);
    check_ids(batch.ids, spec().vocabulary);
    augments_.for_each([&](std::size_t i, const auto& augment) { align(i, augment, session, batch); });
    const auto plans = ctx.arena.template vector<BridgePlan<Scalar>>(static_cast<Index>(augments_.size()));
    augments_.for_each(session.augments_, [&](std::size_t i, const auto& augment, auto& augment_session) {
      plans[i] = advance_augment(ctx, i, augment, augment_session, session, batch);
    });
    return anchor_->advance(ctx, session.anchor_, batch,
                            CachedLinkWriter<Observer>{links_, session.links_, links_.plans_of(ctx, plans, batch.rows),
                                                       batch.slots, observer});
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    LinkSet<Scalar>::visit(self.links_, prefix, fn);
  }

 private:
  /// Adds the contributions of the links to the stream, then shows it to the outer observer.
  template <class Outer>
  struct LinkWriter {
    const LinkSet<Scalar>& links;
    const States& states;
    BridgePlans<Scalar> plans;
    Tape* tape;
    std::remove_reference_t<Outer>& outer;

    void after_block(auto& ctx, Index block, View& x) {
      links.write(ctx, block, states, plans, tape, x);
      outer.after_block(ctx, block, x);
    }
    void after_block_backward(auto&, Index, View) const {}
  };

  template <class Outer, class... Grads>
  struct LinkReader {
    const LinkSet<Scalar>& links;
    const States& states;
    const Tape& tape;
    std::remove_reference_t<Outer>& outer;
    std::tuple<Grads&...> grads;

    void after_block(auto&, Index, View&) const {}
    void after_block_backward(auto& ctx, Index block, View dx) {
      outer.after_block_backward(ctx, block, dx);
      std::apply([&](auto&... g) { links.read_gradient(ctx, block, states, tape, dx, true, g...); }, grads);
    }
  };

  template <class Outer>
  struct CachedLinkWriter {
    const LinkSet<Scalar>& links;
    LinkCaches<Scalar>& caches;
    BridgePlans<Scalar> plans;
    std::span<const Index> slots;
    std::remove_reference_t<Outer>& outer;

    void after_block(auto& ctx, Index block, View& x) {
      links.write_cached(ctx, block, caches, plans, slots, x);
      outer.after_block(ctx, block, x);
    }
    void after_block_backward(auto&, Index, View) const {}
  };

  [[gnu::cold]] void read_augments(auto& ctx, const TokenBatch& batch, States& states) const {
    augments_.for_each(states.inner, [&](std::size_t i, const auto& augment, auto& inner) {
      AlignedBatch& aligned = states.aligned[i];
      for (Index s = 0; s < batch.sequences(); ++s) {
        AlignmentState start;
        aligned.append(*aligners_[i], start, ids_of(batch, s), batch.prompt_length(s));
      }
      check_augment(i, augment, aligned);
      const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
      const TokenBatch tokens{aligned.ids, aligned.offsets, aligned.prompt_lengths, {}};
      augment.prepare_augments(ctx, tokens, inner);
      View x = augment.embed(ctx, tokens);
      augment.run(ctx, tokens, inner, x, 0, states.tapped[i].depth(), nullptr, LayerTap<Scalar>(states.tapped[i]));
    });
  }

  std::vector<ModelSpec> augment_specs() const {
    std::vector<ModelSpec> specs;
    augments_.for_each([&](std::size_t, const auto& augment) { specs.push_back(augment.spec()); });
    return specs;
  }

  Index room(std::size_t i, const auto& augment, Index capacity) const {
    return std::min(aligners_[i]->augment_capacity(capacity), augment.spec().context);
  }

  static std::span<const TokenId> ids_of(const TokenBatch& batch, Index s) {
    return batch.ids.subspan(static_cast<std::size_t>(batch.offsets[static_cast<std::size_t>(s)]),
                             static_cast<std::size_t>(batch.length(s)));
  }

  /// The tokens of an augment that the batch brings, into the session's scratch. Throws before anything else has
  /// changed.
  [[gnu::cold]] void align(std::size_t a, const auto& augment, Session& session, const TokenBatch& batch) const {
    AlignedBatch& aligned = session.aligned_[a];
    aligned.clear();
    for (Index s = 0; s < batch.sequences(); ++s) {
      const auto i = static_cast<std::size_t>(s);
      AlignmentState& next = session.next_[a][i];
      next = session.alignment_[a][static_cast<std::size_t>(batch.slots[i])];
      aligned.append(*aligners_[a], next, ids_of(batch, s), batch.prompt_length(s));
      session.links_.augments[a].check_room(batch.slots[i], aligned.offsets[i + 1] - aligned.offsets[i]);
    }
    check_augment(a, augment, aligned);
  }

  /// Throws an error that names the augment where the tokens that it shall read are not its own.
  [[gnu::cold]] static void check_augment(std::size_t i, const auto& augment, const AlignedBatch& aligned) {
    const ModelSpec& spec = augment.spec();
    for (std::size_t t = 0; t < aligned.ids.size(); ++t)
      require<ShapeError>(aligned.ids[t] >= 0 && aligned.ids[t] < spec.vocabulary, "token ", t, " of augment ", i,
                          " is ", aligned.ids[t], ", which is outside its vocabulary of ", spec.vocabulary,
                          ". Models with other tokens than the anchor's are composed with an aligner (ByteAligner)");
    for (std::size_t s = 0; s + 1 < aligned.offsets.size(); ++s)
      require<ContextLimitError>(aligned.offsets[s + 1] - aligned.offsets[s] <= spec.context, "sequence ", s, " has ",
                                 aligned.offsets[s + 1] - aligned.offsets[s], " tokens of augment ", i,
                                 ", but its context is ", spec.context);
  }

  /// Gives an augment the tokens that align() found, and the link caches the keys and values that follow.
  [[gnu::cold]] BridgePlan<Scalar> advance_augment(auto& ctx, std::size_t a, const auto& augment, auto& augment_session,
                                                   Session& session, const TokenBatch& batch) const {
    const AlignedBatch& aligned = session.aligned_[a];
    KvCache<Scalar>& cache = session.links_.augments[a];
    const auto past = ctx.arena.template vector<Index>(batch.sequences());
    const auto positions = ctx.arena.template vector<Index>(batch.tokens());
    for (Index s = 0; s < batch.sequences(); ++s) {
      const auto i = static_cast<std::size_t>(s);
      past[i] = cache.length(batch.slots[i]);
      const Index before = session.alignment_[a][static_cast<std::size_t>(batch.slots[i])].anchor_tokens;
      for (Index t = 0; t < batch.length(s); ++t)
        positions[static_cast<std::size_t>(batch.offsets[i] + t)] = before + t;
    }
    const TokenBatch tokens{aligned.ids, aligned.offsets, aligned.prompt_lengths, batch.slots};
    const BridgePlan<Scalar> plan = links_.plan(ctx, batch, aligned, positions);
    if (tokens.tokens() > 0) {
      const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
      augment.advance(ctx, augment_session, tokens, LayerTap<Scalar>(session.tapped_[a]));
      links_.append(ctx, static_cast<Index>(a), session.links_, plan, session.tapped_[a], batch.slots, past);
    }
    for (std::size_t s = 0; s < batch.slots.size(); ++s) {
      session.alignment_[a][static_cast<std::size_t>(batch.slots[s])] = session.next_[a][s];
      cache.advance(batch.slots[s], aligned.offsets[s + 1] - aligned.offsets[s]);
    }
    return plan;
  }

  static const std::shared_ptr<const Anchor>& checked(const std::shared_ptr<const Anchor>& anchor) {
    require<ConfigError>(anchor != nullptr, "the anchor is a null pointer");
    return anchor;
  }

  std::shared_ptr<const Anchor> anchor_;
  List augments_;
  std::vector<std::shared_ptr<const Aligner>> aligners_;
  LinkSet<Scalar> links_;
};

/// Joins an anchor and augments: compose(anchor, {{0, 1, 2}}, {}, augment) links block 1 of augment 0 to block 2.
template <class Anchor, class... Augments>
ComposedModel<Anchor, Augments...> compose(std::shared_ptr<const Anchor> anchor, const Links& links,
                                           const BridgeOptions& options, std::shared_ptr<const Augments>... augments) {
  return {std::move(anchor), {std::move(augments)...}, links, options};
}

}  // namespace calm::inline CALM_ABI
