// OLMo 2: norms behind attention and MLP alone, and RMS norms of all queries and of all keys (arXiv 2501.00656).
#pragma once

#include <calm/nn/block.hpp>

#include <string_view>

namespace calm::inline CALM_ABI::zoo {

struct Olmo2 : ArchitectureDefaults {
  static constexpr std::string_view model_type = "olmo2";
  static constexpr std::string_view hugging_face_class = "Olmo2ForCausalLM";
  static constexpr AttentionTraits attention = {.qk_norm = QkNorm::row};
  static constexpr BlockNorms norms = {.before_attention = "",
                                       .after_attention = "post_attention_layernorm",
                                       .before_mlp = "",
                                       .after_mlp = "post_feedforward_layernorm"};

  template <class Weights, class Scalar>
  using Norm = RmsNorm<Weights, Scalar>;
  template <class Weights, class Scalar>
  using Mlp = GatedMlp<Silu, Weights, Scalar>;
};

}  // namespace calm::inline CALM_ABI::zoo
