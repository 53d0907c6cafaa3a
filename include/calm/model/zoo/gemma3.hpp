// Gemma 3, the text model: norms around attention and MLP that count from one, norms of queries and keys, windowed
// blocks with rotary positions of their own, scaled embeddings (arXiv 2503.19786).
#pragma once

#include <calm/nn/block.hpp>

#include <string_view>

namespace calm::inline CALM_ABI::zoo {

struct Gemma3 : ArchitectureDefaults {
  static constexpr std::string_view model_type = "gemma3_text";
  static constexpr std::string_view hugging_face_class = "Gemma3ForCausalLM";
  static constexpr AttentionTraits attention = {.qk_norm = QkNorm::head};
  static constexpr BlockNorms norms = {.before_attention = "input_layernorm",
                                       .after_attention = "post_attention_layernorm",
                                       .before_mlp = "pre_feedforward_layernorm",
                                       .after_mlp = "post_feedforward_layernorm"};
  static constexpr bool scaled_embedding = true;

  template <class Weights, class Scalar>
  using Norm = GemmaNorm<Weights, Scalar>;
  template <class Weights, class Scalar>
  using Mlp = GatedMlp<GeluTanh, Weights, Scalar>;
};

}  // namespace calm::inline CALM_ABI::zoo
