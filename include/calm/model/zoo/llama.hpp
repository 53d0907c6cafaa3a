// Llama: RMS norms, SwiGLU, rotary positions, no biases (Touvron et al., arXiv 2302.13971).
#pragma once

#include <calm/nn/block.hpp>

#include <string_view>

namespace calm::inline CALM_ABI::zoo {

struct Llama : ArchitectureDefaults {
  static constexpr std::string_view model_type = "llama";
  static constexpr std::string_view hugging_face_class = "LlamaForCausalLM";

  template <class Weights, class Scalar>
  using Norm = RmsNorm<Weights, Scalar>;
  template <class Weights, class Scalar>
  using Mlp = GatedMlp<Silu, Weights, Scalar>;
};

}  // namespace calm::inline CALM_ABI::zoo
