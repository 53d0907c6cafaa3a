// What an architecture says about its blocks: a struct of policies (model/zoo) that derives from ArchitectureDefaults
// and names what it does otherwise. It also names `template <class Weights, class Scalar> using Norm` and `Mlp`.
#pragma once

#include <calm/backend/backend.hpp>

#include <string_view>

namespace calm::inline CALM_ABI {

/// The sizes of one block.
struct BlockSizes {
  Index width = 0, hidden = 0;
  HeadShape heads;
  double norm_epsilon = 1e-5;
  double query_scale = 1;  // of the queries, beside 1 / sqrt(head width)
};

/// RMS or layer norms of queries and keys before the rotation: of each head, or of the whole row.
enum class QkNorm : std::uint8_t { none, head, row };

struct AttentionTraits {
  bool input_bias = false;   // of the maps to queries, keys and values
  bool output_bias = false;  // of the map behind the heads
  bool rotary = true;
  QkNorm qk_norm = QkNorm::none;
};

/// The norms of a block by their names; an empty name: there is none.
struct BlockNorms {
  std::string_view before_attention = "input_layernorm";
  std::string_view after_attention = "";  // of what attention adds to the stream
  std::string_view before_mlp = "post_attention_layernorm";
  std::string_view after_mlp = "";
};

struct ArchitectureDefaults {
  static constexpr AttentionTraits attention = {};
  static constexpr BlockNorms norms = {};
  static constexpr bool parallel = false;           // attention and MLP both read what enters the block
  static constexpr bool learned_positions = false;  // added to the embeddings
  static constexpr bool scaled_embedding = false;   // embeddings times sqrt(width)
};

}  // namespace calm::inline CALM_ABI
