// Qwen3: Llama with RMS norms of each query and key head (arXiv 2505.09388).
#pragma once

#include <calm/nn/block.hpp>

#include <string_view>

namespace calm::inline CALM_ABI::zoo {

struct Qwen3 : ArchitectureDefaults {
  static constexpr std::string_view model_type = "qwen3";
  static constexpr std::string_view hugging_face_class = "Qwen3ForCausalLM";
  static constexpr AttentionTraits attention = {.qk_norm = QkNorm::head};

  template <class Weights, class Scalar>
  using Norm = RmsNorm<Weights, Scalar>;
  template <class Weights, class Scalar>
  using Mlp = GatedMlp<Silu, Weights, Scalar>;
};

}  // namespace calm::inline CALM_ABI::zoo
