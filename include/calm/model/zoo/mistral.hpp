// Mistral: Llama with a sliding window (Jiang et al., arXiv 2310.06825); the window is a number of ModelSpec.
#pragma once

#include <calm/nn/block.hpp>

#include <string_view>

namespace calm::inline CALM_ABI::zoo {

struct Mistral : ArchitectureDefaults {
  static constexpr std::string_view model_type = "mistral";
  static constexpr std::string_view hugging_face_class = "MistralForCausalLM";

  template <class Weights, class Scalar>
  using Norm = RmsNorm<Weights, Scalar>;
  template <class Weights, class Scalar>
  using Mlp = GatedMlp<Silu, Weights, Scalar>;
};

}  // namespace calm::inline CALM_ABI::zoo
