// Composing the anchor with a specialist: what the bridges are trained on, and how any model is scored.
#pragma once

#include "specialist.hpp"

#include <calm/compose/composed_model.hpp>
#include <calm/evaluate/greedy_match.hpp>
#include <calm/io/tokenizer/byte_aligner.hpp>

namespace knowledge {

using Composed = calm::ComposedModel<Base, Base>;

struct BridgePlan {
  std::vector<calm::Link> links;
  Index variants = 3;  // questions about each fact
  Index batch_tokens = 512, epochs = 1;
  double learning_rate = 1e-3;
  std::uint64_t seed = 1;
};

/// Joins the two; a specialist with a tokenizer of its own reads the anchor's text by its bytes.
inline Composed compose(const Anchor& anchor, const Specialist& specialist, const BridgePlan& plan) {
  std::vector<std::shared_ptr<const calm::Aligner>> aligners;
  if (specialist.own_tokenizer)
    aligners.push_back(
        std::make_shared<calm::ByteAligner>(anchor.tokenizer, specialist.tokenizer, specialist.model->spec().context));
  return {anchor.model,
          {specialist.model},
          calm::Links(plan.links),
          {.rotary = true, .seed = plan.seed},
          std::move(aligners)};
}

/// Questions about the seen entities, and about names that are in no directory whose answer stands in the text: there
/// the bridges learn to leave the anchor alone.
inline std::vector<TextExample> bridge_questions(const Directory& directory, Index variants, std::uint64_t seed) {
  std::vector<TextExample> questions;
  calm::Random random(seed, calm::stream_of("bridges"));
  for (Index v = 0; v < variants; ++v)
    for (const Entity& e : directory.seen_entities())
      for (const Attribute a : attributes) {
        questions.push_back(direct(e, a, any_of(trained_phrasings, random)));
        if (random.below(5) == 0)
          questions.push_back(
              in_context(any_of(directory.training_strangers(), random), a, any_of(trained_phrasings, random), random));
      }
  return questions;
}

inline std::vector<calm::Example> examples_of(const calm::Tokenizer& tokenizer, std::span<const TextExample> texts,
                                              bool ends) {
  std::vector<calm::Example> examples;
  for (const TextExample& text : texts) examples.push_back(example_of(tokenizer, text, ends));
  return examples;
}

}  // namespace knowledge
