// Qwen2 and Qwen2.5: Llama with biases in front of the heads (arXiv 2407.10671).
#pragma once

#include <calm/nn/block.hpp>

#include <string_view>

namespace calm::inline CALM_ABI::zoo {

struct Qwen2 : ArchitectureDefaults {
  static constexpr std::string_view model_type = "qwen2";
  static constexpr std::string_view hugging_face_class = "Qwen2ForCausalLM";
  static constexpr AttentionTraits attention = {.input_bias = true};

  template <class Weights, class Scalar>
  using Norm = RmsNorm<Weights, Scalar>;
  template <class Weights, class Scalar>
  using Mlp = GatedMlp<Silu, Weights, Scalar>;
};

}  // namespace calm::inline CALM_ABI::zoo
