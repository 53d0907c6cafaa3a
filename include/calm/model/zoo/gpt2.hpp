// GPT-2: layer norms, biases everywhere, learned positions, a plain MLP (Radford et al., 2019).
#pragma once

#include <calm/nn/block.hpp>

#include <string_view>

namespace calm::inline CALM_ABI::zoo {

struct Gpt2 : ArchitectureDefaults {
  static constexpr std::string_view model_type = "gpt2";
  static constexpr std::string_view hugging_face_class = "GPT2LMHeadModel";
  static constexpr AttentionTraits attention = {.input_bias = true, .output_bias = true, .rotary = false};
  static constexpr bool learned_positions = true;

  template <class Weights, class Scalar>
  using Norm = LayerNorm<Weights, Scalar>;
  template <class Weights, class Scalar>
  using Mlp = calm::Mlp<GeluTanh, true, Weights, Scalar>;
};

}  // namespace calm::inline CALM_ABI::zoo
