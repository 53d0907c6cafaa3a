// The composition that the fuzzed adapters belong to.
#pragma once

#include <calm/compose.hpp>
#include <calm/io/adapter.hpp>

#include <memory>

namespace fuzz {

using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, float>;

inline std::shared_ptr<const Llama> anchor() {
  return std::make_shared<const Llama>(
      calm::ModelSpec{.vocabulary = 5, .width = 8, .hidden = 4, .blocks = 2, .heads = {2, 2, 4}, .context = 8},
      calm::RandomWeights{.seed = 1});
}
inline std::shared_ptr<const Llama> augment() {
  return std::make_shared<const Llama>(
      calm::ModelSpec{.vocabulary = 5, .width = 4, .hidden = 4, .blocks = 1, .heads = {1, 1, 4}, .context = 8},
      calm::RandomWeights{.seed = 2});
}

}  // namespace fuzz
