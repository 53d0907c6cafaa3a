// What a token costs, from the sizes of the models: floating point operations of the matrix products and of attention
// (a multiplication and an addition are two), and bytes of weights and of caches that are read.
//
// Not counted: norms, activations, positions, embeddings, losses and the optimizer, a few percent together.
#pragma once

#include <calm/compose/link_set.hpp>
#include <calm/nn/parameter.hpp>

#include <cstdlib>
#include <string>
#include <vector>

namespace calm::inline CALM_ABI {

/// For one token of the anchor.
struct TokenCost {
  double product_flops = 0, attention_flops = 0;
  double weight_bytes = 0, cache_bytes = 0;

  double flops() const { return product_flops + attention_flops; }
  TokenCost& operator+=(const TokenCost& other) {
    product_flops += other.product_flops;
    attention_flops += other.attention_flops;
    weight_bytes += other.weight_bytes;
    cache_bytes += other.cache_bytes;
    return *this;
  }
};

/// The sizes of a model that its cost follows from.
struct ModelCost {
  ModelSpec spec;
  std::vector<double> block_weights;  // values of the matrices of each block
  double head_weights = 0;            // of the output head
  double stored_bytes = 4;            // of a value in these matrices, on average

  /// Of blocks [first, last).
  double weights(Index first, Index last) const {
    double sum = 0;
    for (Index i = first; i < last; ++i) sum += block_weights[static_cast<std::size_t>(i)];
    return sum;
  }
};

template <class Model>
ModelCost cost_of(const Model& model) {
  ModelCost cost{model.spec(), std::vector<double>(static_cast<std::size_t>(model.spec().blocks), 0.0)};
  const std::string blocks = "model.layers.";
  const std::string head = model.spec().tied_embeddings ? "model.embed_tokens" : "lm_head";
  double bytes = 0, values = 0;
  for_each_weight(model, [&](const std::string& name, const auto& weight) {
    if (weight.rows() == 1) return;  // norms and biases
    bytes += static_cast<double>(weight.stored_bytes());
    values += static_cast<double>(weight.size());
    const auto size = static_cast<double>(weight.size());
    if (name.starts_with(blocks))
      cost.block_weights[static_cast<std::size_t>(std::atoi(name.c_str() + blocks.size()))] += size;
    else if (name.starts_with(head)) cost.head_weights += size;
  });
  if (values > 0) cost.stored_bytes = bytes / values;
  return cost;
}

/// A link of a composition, with the sizes on both of its sides.
struct LinkCost {
  Index anchor_width = 0, augment_width = 0, rank = 0;

  double projection_weights() const {
    return static_cast<double>(weights_of_projection(anchor_width, augment_width, rank));
  }
  double square() const { return static_cast<double>(anchor_width) * static_cast<double>(anchor_width); }
  /// What an augment token is multiplied by when its keys and values are cached: folded where that is cheaper.
  double cached_weights() const {
    return std::min(2.0 * static_cast<double>(anchor_width) * static_cast<double>(augment_width),
                    projection_weights() + 2 * square());
  }
};

namespace cost {

/// Keys that a block's token at position n sees, counted from one.
inline double visible(const ModelSpec& spec, Index block, double n) {
  return spec.is_windowed(block) ? std::min(static_cast<double>(spec.window), n) : n;
}
/// The sum over the first n positions.
inline double visible_before(const ModelSpec& spec, Index block, double n) {
  const double window = visible(spec, block, n);
  return window * (window + 1) / 2 + (n - window) * window;
}
/// Multiplications and additions with a key and a value, in all heads.
inline double flops_a_key(const ModelSpec& spec) {
  return 4 * static_cast<double>(spec.heads.query_heads * spec.heads.width);
}

/// A pass over blocks [0, last) of one token among `tokens` that are read together, at or up to `context`.
inline TokenCost of_blocks(const ModelCost& model, Index last, Index context, Index tokens, double value_bytes) {
  const HeadShape& heads = model.spec.heads;
  TokenCost result;
  result.product_flops = 2 * model.weights(0, last);
  result.weight_bytes = value_bytes * model.weights(0, last) / static_cast<double>(tokens);
  for (Index i = 0; i < last; ++i) {
    const auto n = static_cast<double>(context);
    const double seen = tokens > 1 ? visible_before(model.spec, i, n) / n : visible(model.spec, i, n);
    result.attention_flops += flops_a_key(model.spec) * seen;
    if (tokens == 1) result.cache_bytes += 2 * 4 * static_cast<double>(heads.kv_heads * heads.width) * seen;
  }
  return result;
}

}  // namespace cost

/// A model and what is composed with it, if anything.
struct CompositionCost {
  struct Augment {
    ModelCost model;
    double tokens = 1;  // for each token of the anchor, as its aligner gives them
  };

  ModelCost anchor;
  std::vector<Augment> augments = {};
  std::vector<Link> links = {};
  BridgeOptions options = {};
  double value_bytes = 4;  // of a frozen weight that is read: packed 4 in f32, 2 in bf16; 0: as it is stored

  /// One new token behind `context` - 1 others.
  TokenCost decode(Index context) const { return inference(context, 1); }
  /// A token of a prompt of `tokens`, which are read at once; only the last goes on behind the keys and values of the
  /// last block, and reaches the head.
  TokenCost prefill(Index tokens) const { return inference(tokens, tokens); }

  /// A token of a training step over sequences of `tokens`, of which the share `scored`, the last ones, goes on behind
  /// the keys and values of the last block. Frozen models run forward; gradients go through the anchor above the lowest
  /// link.
  TokenCost train(Index tokens, double scored) const {
    TokenCost total;
    Index lowest = anchor.spec.blocks - 1;
    for (const Link& link : links) lowest = std::min(lowest, link.write);
    const double packed = value_bytes > 0 ? value_bytes : 4;
    const TokenCost forward = cost::of_blocks(anchor, anchor.spec.blocks, tokens, tokens, packed),
                    below = cost::of_blocks(anchor, lowest + 1, tokens, tokens, packed);
    total += forward;
    total.product_flops += forward.product_flops - below.product_flops + scored * 4 * anchor.head_weights;
    total.attention_flops += 2.5 * (forward.attention_flops - below.attention_flops);  // five products for two
    total.weight_bytes +=
        forward.weight_bytes - below.weight_bytes + 2 * packed * anchor.head_weights / static_cast<double>(tokens);
    const Index last = anchor.spec.blocks - 1;
    const auto n = static_cast<double>(tokens);
    const double rest = (1 - scored) * n;  // tokens of a sequence that only give the last block keys and values
    if (lowest < last) {                   // the last block runs after the states were prepared, forward and backward
      const TokenCost saved = left_out(n, rest);
      total.product_flops -= 2 * saved.product_flops;
      total.attention_flops -= 3.5 * saved.attention_flops;
    }
    for (std::size_t a = 0; a < augments.size(); ++a) total += augment_pass(a, tokens, tokens, packed);
    for (const Link& link : links) {
      const LinkCost sizes = sizes_of(link);
      const double r = augments[static_cast<std::size_t>(link.augment)].tokens;
      const double queries = link.write == last ? scored : 1;
      const double of_anchor = 2 * sizes.square(), of_augment = sizes.projection_weights() + 2 * sizes.square();
      double products = queries * 3 * of_anchor;  // forward, the gradient of the weights, of the input
      if (folding_pays(sizes.anchor_width, sizes.augment_width, sizes.rank, tokens)) {
        // Forward and the gradients of the folded weights; two products that fold and four back.
        products += r * 4 * sizes.projection_weights() +
                    6 * sizes.square() * static_cast<double>(sizes.augment_width) / static_cast<double>(tokens);
      } else {
        products += 3 * r * of_augment;
        if (!options.norms)  // an input that is frozen: nobody asks for its gradient
          products -=
              r * (sizes.rank > 0 ? static_cast<double>(sizes.rank * sizes.augment_width) : sizes.projection_weights());
      }
      if (!options.norms && link.write == lowest) products -= queries * sizes.square();
      total.product_flops += 2 * products;
      total.attention_flops += 3.5 * attention_of_prompt(sizes, r, n, link.write == last ? rest : 0);
      total.weight_bytes += 4 * (of_anchor + of_augment) / static_cast<double>(tokens);
    }
    return total;
  }

 private:
  /// Blocks of an augment that run: up to its highest tap.
  Index depth(std::size_t augment) const {
    Index highest = -1;
    for (const Link& link : links)
      if (link.augment == static_cast<Index>(augment)) highest = std::max(highest, link.tap);
    return highest + 1;
  }
  /// The augment's tokens that one token of the anchor brings run together: their weights are read once.
  TokenCost augment_pass(std::size_t a, Index context, Index tokens, double bytes) const {
    const double r = augments[a].tokens;
    const auto read = std::max<Index>(1, static_cast<Index>(r * static_cast<double>(context) + 0.5));
    TokenCost pass = cost::of_blocks(augments[a].model, depth(a), read, tokens, bytes);
    pass.product_flops *= r;
    pass.attention_flops *= r;
    return pass;
  }
  LinkCost sizes_of(const Link& link) const {
    return {anchor.spec.width, augments[static_cast<std::size_t>(link.augment)].model.spec.width, options.rank};
  }
  /// Of a token with n positions of the anchor before and at it.
  static double attention_of(const LinkCost& sizes, double r, double n) {
    return 4 * static_cast<double>(sizes.anchor_width) * r * n;
  }
  /// Of each of n tokens, on average, of which the first `unasked` give no stream.
  static double attention_of_prompt(const LinkCost& sizes, double r, double n, double unasked) {
    return attention_of(sizes, r, (n * (n + 1) - unasked * (unasked + 1)) / 2 / n);
  }
  /// What each of n tokens, on average, saves of a pass forward where the first `rest` of them give the last block keys
  /// and values alone.
  TokenCost left_out(double n, double rest) const {
    const Index last = anchor.spec.blocks - 1;
    const HeadShape& heads = anchor.spec.heads;
    const auto kv_weights = 2 * static_cast<double>(anchor.spec.width * heads.kv_heads * heads.width);
    TokenCost saved;
    saved.product_flops = 2 * rest / n * (anchor.weights(last, last + 1) - kv_weights);
    saved.attention_flops = cost::flops_a_key(anchor.spec) * cost::visible_before(anchor.spec, last, rest) / n;
    return saved;
  }

  TokenCost inference(Index context, Index tokens) const {
    const auto count = static_cast<double>(tokens), rest = count - 1;
    const Index last = anchor.spec.blocks - 1;
    const auto bytes_of = [&](const ModelCost& model) { return value_bytes > 0 ? value_bytes : model.stored_bytes; };
    TokenCost total = cost::of_blocks(anchor, anchor.spec.blocks, context, tokens, bytes_of(anchor));
    const TokenCost saved = left_out(count, rest);
    total.product_flops += 2 * anchor.head_weights / count - saved.product_flops;
    total.attention_flops -= saved.attention_flops;
    total.weight_bytes += bytes_of(anchor) * anchor.head_weights / count;
    for (std::size_t a = 0; a < augments.size(); ++a)
      total += augment_pass(a, context, tokens, bytes_of(augments[a].model));
    for (const Link& link : links) {
      const LinkCost sizes = sizes_of(link);
      const double r = augments[static_cast<std::size_t>(link.augment)].tokens;
      const bool at_last = link.write == last;
      total.product_flops += 2 * ((at_last ? 1 / count : 1) * 2 * sizes.square() + r * sizes.cached_weights());
      total.attention_flops += tokens > 1 ? attention_of_prompt(sizes, r, count, at_last ? rest : 0)
                                          : attention_of(sizes, r, static_cast<double>(context));
      total.weight_bytes += 4 * (2 * sizes.square() + sizes.cached_weights()) / count;
      if (tokens == 1)
        total.cache_bytes += 2 * 4 * static_cast<double>(sizes.anchor_width) * r * static_cast<double>(context);
    }
    return total;
  }
};

}  // namespace calm::inline CALM_ABI
