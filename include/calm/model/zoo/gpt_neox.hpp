// GPT-NeoX, as in Pythia: attention and MLP side by side, layer norms, biases, rotary positions in a part of each head
// (Black et al., arXiv 2204.06745).
#pragma once

#include <calm/nn/block.hpp>

#include <string_view>

namespace calm::inline CALM_ABI::zoo {

struct GptNeoX : ArchitectureDefaults {
  static constexpr std::string_view model_type = "gpt_neox";
  static constexpr std::string_view hugging_face_class = "GPTNeoXForCausalLM";
  static constexpr AttentionTraits attention = {.input_bias = true, .output_bias = true};
  static constexpr bool parallel = true;

  template <class Weights, class Scalar>
  using Norm = LayerNorm<Weights, Scalar>;
  template <class Weights, class Scalar>
  using Mlp = calm::Mlp<Gelu, true, Weights, Scalar>;
};

}  // namespace calm::inline CALM_ABI::zoo
