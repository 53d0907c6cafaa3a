// RandomWeights: a source of weights for a model that is trained from the start, the same for the same seed and names.
#pragma once

#include <calm/nn/parameter.hpp>

namespace calm::inline CALM_ABI {

struct RandomWeights {
  std::uint64_t seed = 0;
  double embedding_deviation = 0.02;

  /// Zeros for biases, ones for norms, normal numbers for embeddings, uniform ones in +-1/sqrt(in) for linear maps.
  StoredMatrix operator()(const std::string& name, Index rows, Index cols) const {
    Matrix<float> m(rows, cols);
    if (name.ends_with(".bias")) return StoredMatrix::from(m);
    if (name.find("norm") != std::string::npos) {
      std::fill(m.values().begin(), m.values().end(), 1.0F);
    } else if (name.find("embed") != std::string::npos) {
      Random random(seed, stream_of(name));
      for (float& x : m.values()) x = static_cast<float>(embedding_deviation * random.normal());
    } else {
      m = random_linear<float>(rows, cols, seed, name);
    }
    return StoredMatrix::from(m);
  }
};

/// Weights of another source, with the numbers that LoRA adds to them.
template <WeightSource Source>
struct LoraWeights {
  Source source;
  Index lora_rank = 8;
  double lora_scale = 2;
  std::uint64_t lora_seed = 0;

  StoredMatrix operator()(const std::string& name, Index rows, Index cols) { return source(name, rows, cols); }
};

template <class Source>  // clang 14 does not deduce it
LoraWeights(Source, Index, double, std::uint64_t)->LoraWeights<Source>;

/// The weights that a model holds now, by name: for making another model of them (frozen, or with LoRA).
template <class Model>
auto weights_of(const Model& model) {
  return [&model](const std::string& name, Index rows, Index cols) {
    StoredMatrix found;
    for_each_weight(model, [&](const std::string& weight_name, const auto& weight) {
      if (weight_name != name) return;
      if constexpr (requires { weight.offset; }) found = StoredMatrix::from(weight.value);
      else found = weight;
    });
    require<ConfigError>(!found.empty(), "the model has no weight named ", name);
    require<ShapeError>(found.rows() == rows && found.cols() == cols, name, " is [", found.rows(), ", ", found.cols(),
                        "] but [", rows, ", ", cols, "] was expected");
    return found;
  };
}

}  // namespace calm::inline CALM_ABI
