// ModelSpec: the sizes of a decoder. Structure is the architecture's type; these are numbers, as config.json gives
// them.
#pragma once

#include <calm/nn/block.hpp>

#include <cmath>
#include <vector>

namespace calm::inline CALM_ABI {

struct ModelSpec {
  Index vocabulary = 0;
  Index width = 0;   // of the residual stream
  Index hidden = 0;  // of the MLP
  Index blocks = 0;
  HeadShape heads;
  double norm_epsilon = 1e-5;
  double rotary_base = 10000;
  Index context = 2048;  // the most tokens of a sequence
  bool tied_embeddings = false;
  Index rotary_width = 0;  // values of each head that turn; 0: all
  RotaryScaling rotary_scaling = {};
  double query_scale = 1;           // of the queries, beside 1 / sqrt(head width)
  Index window = 0;                 // keys that a token of a windowed block sees, itself among them; 0: all
  double window_rotary_base = 0;    // of windowed blocks, without scaling; 0: that of the others
  std::vector<bool> windowed = {};  // [blocks]; empty: all blocks, where there is a window

  BlockSizes block_sizes() const { return {width, hidden, heads, norm_epsilon, query_scale}; }
  bool is_windowed(Index block) const {
    return window > 0 && (windowed.empty() || windowed[static_cast<std::size_t>(block)]);
  }

  /// Throws ConfigError for sizes that make no model; `name` says which one.
  void check(const std::string& name) const {
    const auto positive = [&](Index value, const char* what) {
      require<ConfigError>(value > 0, name, ": ", what, " must be positive, found ", value);
    };
    positive(vocabulary, "the vocabulary");
    positive(width, "the width");
    positive(hidden, "the MLP width");
    positive(blocks, "the number of blocks");
    positive(heads.query_heads, "the number of heads");
    positive(heads.kv_heads, "the number of key-value heads");
    positive(heads.width, "the head width");
    positive(context, "the context");
    constexpr Index widest_head = 1 << 16;  // tables of this size are made before any weight shows it
    require<ConfigError>(heads.width <= widest_head, name, ": a head of ", heads.width, " values is too wide");
    require<ConfigError>(std::isfinite(norm_epsilon) && norm_epsilon >= 0, name,
                         ": the epsilon of the norms must not be negative, found ", norm_epsilon);
    for (const double base : {rotary_base, window_rotary_base > 0 ? window_rotary_base : 1.0})
      require<ConfigError>(std::isfinite(base) && base > 0, name, ": a rotary base must be positive, found ", base);
    require<ConfigError>(window_rotary_base >= 0, name,
                         ": the rotary base of windowed blocks must not be negative, found ", window_rotary_base);
    require<ConfigError>(std::isfinite(query_scale), name, ": the scale of the queries is ", query_scale);
    require<ConfigError>(window >= 0 && (windowed.empty() || static_cast<Index>(windowed.size()) == blocks), name,
                         ": the windowed blocks are given for ", windowed.size(), " of ", blocks, " blocks");
    require<ConfigError>(rotary_width >= 0 && rotary_width <= heads.width, name, ": ", rotary_width,
                         " values of a head of ", heads.width, " cannot turn");
    require<ConfigError>(heads.query_heads % heads.kv_heads == 0, name, ": ", heads.query_heads, " heads cannot share ",
                         heads.kv_heads, " key-value heads in equal groups");
  }
};

}  // namespace calm::inline CALM_ABI
