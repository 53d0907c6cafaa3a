// LinkSet: the links of a composition with their bridges, and what they do to the anchor's stream: write into it, pass
// its gradient, and keep what decoding needs.
//
// It sees states, visible ranges and positions, and knows nothing of the models.
#pragma once

#include <calm/compose/alignment.hpp>
#include <calm/compose/cross_attention_bridge.hpp>
#include <calm/compose/layer_tap.hpp>
#include <calm/compose/link.hpp>
#include <calm/model/decoder.hpp>
#include <calm/model/kv_cache.hpp>
#include <calm/tensor/buffer.hpp>

#include <algorithm>
#include <optional>

namespace calm::inline CALM_ABI {

/// What a pass needs of the augments: one entry each.
template <class Scalar>
struct AugmentStates {
  std::vector<Index> offsets;  // of the batch that they were prepared for
  std::vector<AlignedBatch> aligned;
  std::vector<TappedStates<Scalar>> tapped;
  std::vector<bool> disabled;  // [links] links that write nothing; empty: none
  bool augments = true;        // false: no link writes
};

/// One plan for each augment: for the anchor's last block, of whose stream a batch may ask for some rows only, and for
/// the others.
template <class Scalar>
struct BridgePlans {
  std::span<const BridgePlan<Scalar>> all, last;
};

/// What the gradient of the links needs again.
template <class Scalar>
struct LinkTape {
  struct Pass {
    typename CrossAttentionBridge<Scalar>::Cache bridge;
    MatrixView<const Scalar> before;  // the stream that the link read
  };

  BridgePlans<Scalar> plans;
  std::vector<Pass> links;
};

/// What decoding keeps: keys and values for each augment, a layer for each of its links.
template <class Scalar>
struct LinkCaches {
  std::vector<KvCache<Scalar>> augments;
  std::vector<typename CrossAttentionBridge<Scalar>::Folded> folded;  // [links]
};

template <class Scalar>
class LinkSet {
 public:
  using Bridge = CrossAttentionBridge<Scalar>;
  using View = MatrixView<Scalar>;
  using ConstView = MatrixView<const Scalar>;
  using Plans = BridgePlans<Scalar>;

  /// Throws ConfigError that names the link where it does not fit.
  LinkSet(const Links& links, const ModelSpec& anchor, const std::vector<ModelSpec>& augments, BridgeOptions options)
      : at_block_(static_cast<std::size_t>(anchor.blocks)), augments_(augments.size()) {
    std::vector<Index> blocks;
    for (const ModelSpec& spec : augments) blocks.push_back(spec.blocks);
    links_ = links.resolve(anchor.blocks, blocks);
    if (options.heads == 0) options.heads = anchor.heads.query_heads;
    options_ = options;
    for (std::size_t k = 0; k < links_.size(); ++k) {
      const Index width = augments[static_cast<std::size_t>(links_[k].augment)].width;
      bridges_.emplace_back("links." + std::to_string(k), anchor.width, width, options);
      auto& list = at_block_[static_cast<std::size_t>(links_[k].write)];
      list.insert(std::upper_bound(list.begin(), list.end(), k,
                                   [&](std::size_t a, std::size_t b) {
                                     return std::pair(links_[a].augment, links_[a].tap) <
                                            std::pair(links_[b].augment, links_[b].tap);
                                   }),
                  k);
      Index layer = 0;
      for (std::size_t other = 0; other < k; ++other) layer += links_[other].augment == links_[k].augment ? 1 : 0;
      layers_.push_back(layer);
    }
    if (options.rotary) rotary_ = Rotary<Scalar>(anchor.width / options.heads, 10000);
  }

  const std::vector<Link>& links() const { return links_; }
  const std::vector<Bridge>& bridges() const { return bridges_; }
  const BridgeOptions& options() const { return options_; }

  Index lowest_write() const {
    Index lowest = static_cast<Index>(at_block_.size()) - 1;
    for (const Link& link : links_) lowest = std::min(lowest, link.write);
    return lowest;
  }

  /// The blocks that are tapped, for each augment.
  [[gnu::cold]] std::vector<TappedStates<Scalar>> empty_taps() const {
    std::vector<TappedStates<Scalar>> taps(augments_);
    for (const Link& link : links_) taps[static_cast<std::size_t>(link.augment)].add(link.tap);
    return taps;
  }

  /// Where the queries of a batch and the keys of an augment stand; `positions` are those of the batch's tokens.
  [[gnu::cold]] BridgePlan<Scalar> plan(auto& ctx, const TokenBatch& batch, const AlignedBatch& aligned,
                                        std::span<const Index> positions) const {
    const auto visible = ctx.arena.template vector<VisibleRange>(batch.tokens());
    for (std::size_t t = 0; t < visible.size(); ++t) visible[t] = {0, aligned.visible[t]};
    BridgePlan<Scalar> plan{{batch.offsets, visible, {}}, aligned.offsets, {}, batch.tokens()};
    if (options_.rotary) {
      plan.queries.angles = rotary_.angles(ctx, positions);
      plan.key_angles = rotary_.angles(ctx, std::span<const Index>(aligned.key_positions));
    }
    return plan;
  }

  /// Plans for links that write after the last block, whose queries are those of `rows`, and for all others; the same
  /// where no rows are chosen.
  [[gnu::cold]] Plans plans_of(auto& ctx, std::span<const BridgePlan<Scalar>> all, std::span<const Index> rows) const {
    if (rows.empty() || at_block_.back().empty()) return {all, all};
    const auto last = ctx.arena.template vector<BridgePlan<Scalar>>(static_cast<Index>(augments_));
    for (std::size_t a = 0; a < augments_; ++a) {
      last[a] = all[a];
      last[a].queries = chosen_queries(ctx, all[a].queries, rows);
    }
    return {all, last};
  }

  /// Plans for a pass without caches; the tape keeps them.
  [[gnu::cold]] Plans plans(auto& ctx, const TokenBatch& batch, const AugmentStates<Scalar>& states,
                            LinkTape<Scalar>* tape) const {
    batch.check();
    check_states(batch, states);
    const auto all = ctx.arena.template vector<BridgePlan<Scalar>>(static_cast<Index>(augments_));
    Plans plans{all, all};
    if (states.augments) {
      const auto positions = ctx.arena.template vector<Index>(batch.tokens());
      for (Index s = 0; s < batch.sequences(); ++s)
        for (Index t = 0; t < batch.length(s); ++t)
          positions[static_cast<std::size_t>(batch.offsets[static_cast<std::size_t>(s)] + t)] = t;
      for (std::size_t a = 0; a < augments_; ++a) all[a] = plan(ctx, batch, states.aligned[a], positions);
      plans = plans_of(ctx, all, batch.rows);
    }
    if (tape) {
      tape->plans = plans;
      make_as_many(tape->links, links_.size());
    }
    return plans;
  }

  /// Adds what the links of a block contribute. With a tape x moves to a new place, since the gradient reads the old
  /// one.
  [[gnu::cold]] void write(auto& ctx, Index block, const AugmentStates<Scalar>& states, const Plans& plans,
                           LinkTape<Scalar>* tape, View& x) const {
    const auto& here = at_block_[static_cast<std::size_t>(block)];
    if (here.empty() || !states.augments) return;
    std::optional<typename std::decay_t<decltype(ctx.arena)>::Mark> mark;
    if (!tape) mark.emplace(ctx.arena);
    const View total = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
    const View y = tape ? ctx.arena.template matrix<Scalar>(x.rows, x.cols) : x;
    ctx.backend.set_zero(total);
    for (const std::size_t k : here) {
      if (is_disabled(states, k)) continue;
      typename Bridge::Cache local;
      if (tape) tape->links[k].before = x;
      bridges_[k].forward(ctx, plan_of(plans, k), tapped(states, k), x, total, tape ? tape->links[k].bridge : local);
    }
    if (tape) ctx.backend.scale(ConstView(x), 1, y);
    ctx.backend.add(ConstView(total), y);
    x = y;
  }

  /// The gradient of write: that of the stream after the links becomes, where it is asked for, that before them; with
  /// grads also adds to those of the bridges.
  template <class... Grads>
  [[gnu::cold]] void read_gradient(auto& ctx, Index block, const AugmentStates<Scalar>& states,
                                   const LinkTape<Scalar>& tape, View dx, bool input_gradient, Grads&... grads) const {
    const auto& here = at_block_[static_cast<std::size_t>(block)];
    if (here.empty() || !states.augments) return;
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    const View dtotal = ctx.arena.template matrix<Scalar>(dx.rows, dx.cols);
    ctx.backend.scale(ConstView(dx), 1, dtotal);
    for (const std::size_t k : here) {
      if (is_disabled(states, k)) continue;
      const auto& [bridge, before] = tape.links[k];
      bridges_[k].backward(ctx, plan_of(tape.plans, k), tapped(states, k), before, ConstView(dtotal),
                           input_gradient ? dx : View{}, bridge, grads...);
    }
  }

  /// Caches for `slots` sequences of at most rooms[a] tokens of augment a. Folds the weights as they are now.
  [[gnu::cold]] LinkCaches<Scalar> make_caches(auto& ctx, Index slots, const std::vector<Index>& rooms) const {
    LinkCaches<Scalar> caches;
    for (std::size_t a = 0; a < augments_; ++a) {
      const auto layers = std::count_if(links_.begin(), links_.end(),
                                        [&](const Link& l) { return l.augment == static_cast<Index>(a); });
      caches.augments.emplace_back(layers, slots, rooms[a], bridges_.front().anchor_width());
    }
    for (const Bridge& bridge : bridges_) caches.folded.push_back(bridge.fold(ctx));
    return caches;
  }

  /// Adds the keys and values of new positions of one augment behind the `past` ones of each slot.
  [[gnu::cold]] void append(auto& ctx, Index augment, LinkCaches<Scalar>& caches, const BridgePlan<Scalar>& plan,
                            const TappedStates<Scalar>& taps, std::span<const Index> slots,
                            std::span<const Index> past) const {
    for (std::size_t k = 0; k < links_.size(); ++k)
      if (links_[k].augment == augment)
        bridges_[k].append(ctx, plan, caches.folded[k], caches.augments[augment_of(k)].rows(layers_[k]),
                           taps.after(links_[k].tap), slots, past);
  }

  /// write() for new tokens, over what the caches hold.
  [[gnu::cold]] void write_cached(auto& ctx, Index block, LinkCaches<Scalar>& caches, const Plans& plans,
                                  std::span<const Index> slots, View x) const {
    const auto& here = at_block_[static_cast<std::size_t>(block)];
    if (here.empty()) return;
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    const View total = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
    ctx.backend.set_zero(total);
    const auto key_counts = ctx.arena.template vector<Index>(static_cast<Index>(slots.size()));
    for (const std::size_t k : here) {
      KvCache<Scalar>& cache = caches.augments[augment_of(k)];
      for (std::size_t s = 0; s < key_counts.size(); ++s) key_counts[s] = cache.length(slots[s]);
      bridges_[k].forward_cached(ctx, plan_of(plans, k), cache.rows(layers_[k]), x, slots, key_counts, total);
    }
    ctx.backend.add(ConstView(total), x);
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    for (std::size_t k = 0; k < self.bridges_.size(); ++k)
      Bridge::visit(self.bridges_[k], prefix + "links." + std::to_string(k), fn);
  }

 private:
  [[gnu::cold]] void check_states(const TokenBatch& batch, const AugmentStates<Scalar>& states) const {
    require<ShapeError>(
        std::equal(states.offsets.begin(), states.offsets.end(), batch.offsets.begin(), batch.offsets.end()),
        "the states were prepared for another batch: for ",
        std::max<Index>(0, static_cast<Index>(states.offsets.size()) - 1), " sequences of ",
        states.offsets.empty() ? 0 : states.offsets.back(), " tokens, or for other lengths; this one has ",
        batch.sequences(), " of ", batch.tokens());
    for (const AlignedBatch& aligned : states.aligned)
      require<ShapeError>(!states.augments || aligned.visible.size() == batch.ids.size(),
                          "the states were prepared while augments were switched off (AugmentStates::augments)");
    require<ConfigError>(states.disabled.empty() || states.disabled.size() == links_.size(),
                         "AugmentStates::disabled has ", states.disabled.size(), " entries for ", links_.size(),
                         " links");
  }

  std::size_t augment_of(std::size_t k) const { return static_cast<std::size_t>(links_[k].augment); }
  const BridgePlan<Scalar>& plan_of(const Plans& plans, std::size_t k) const {
    const bool last = links_[k].write == static_cast<Index>(at_block_.size()) - 1;
    return (last ? plans.last : plans.all)[augment_of(k)];
  }
  ConstView tapped(const AugmentStates<Scalar>& states, std::size_t k) const {
    return states.tapped[augment_of(k)].after(links_[k].tap);
  }
  static bool is_disabled(const AugmentStates<Scalar>& states, std::size_t k) {
    return !states.disabled.empty() && states.disabled[k];
  }

  std::vector<Link> links_;
  std::vector<std::vector<std::size_t>>
      at_block_;  // links that write after each block, in the order of augment and tap
  std::size_t augments_;
  BridgeOptions options_;
  std::vector<Bridge> bridges_;
  std::vector<Index> layers_;  // [links] the link's number among those of its augment
  Rotary<Scalar> rotary_;
};

}  // namespace calm::inline CALM_ABI
