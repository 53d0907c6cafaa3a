// Phi-3: Llama whose files join the maps of attention and of the MLP, with a sliding window (arXiv 2404.14219).
#pragma once

#include <calm/nn/block.hpp>

#include <string_view>

namespace calm::inline CALM_ABI::zoo {

struct Phi3 : ArchitectureDefaults {
  static constexpr std::string_view model_type = "phi3";
  static constexpr std::string_view hugging_face_class = "Phi3ForCausalLM";

  template <class Weights, class Scalar>
  using Norm = RmsNorm<Weights, Scalar>;
  template <class Weights, class Scalar>
  using Mlp = GatedMlp<Silu, Weights, Scalar>;
};

}  // namespace calm::inline CALM_ABI::zoo
