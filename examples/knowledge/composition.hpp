// Composing the anchor with a specialist: what the bridges are trained on, and how any model is scored.
#pragma once

#include "specialist.hpp"

#include <calm/compose/composed_model.hpp>
#include <calm/evaluate/greedy_match.hpp>
#include <calm/generate/generate.hpp>
#include <calm/io/tokenizer/byte_aligner.hpp>

namespace knowledge {

using Composed = calm::ComposedModel<Base, Base>;

struct BridgePlan {
  std::vector<calm::Link> links;
  Index batch_tokens = 512, epochs = 4;
  double learning_rate = 2e-3;
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

using LoraBase = calm::Transformer<calm::zoo::Llama, calm::Lora>;

/// Rates at which the anchor's own weights are tuned: lower than the bridges', which are new.
inline constexpr double lora_learning_rate = 1e-3, full_learning_rate = 1e-4;

/// The anchor with LoRA in every linear map, of the rank whose number of parameters comes nearest to `wanted`.
inline LoraBase with_lora(const Anchor& anchor, Index wanted, std::uint64_t seed) {
  const auto of_rank = [&](Index rank) {
    return LoraBase(anchor.model->spec(), calm::LoraWeights{calm::weights_of(*anchor.model), rank, 2.0, seed});
  };
  const Index each = calm::count_parameters(of_rank(1));
  return of_rank(std::max<Index>(1, (wanted + each / 2) / each));
}

/// Questions about the seen entities, twice as many about codes as about numbers since letters are rarer than digits,
/// and half of them in a form of their own, some behind worked ones; and about names that are in no directory, whose
/// answer stands in the text: there the bridges learn to leave the anchor alone. Codes with hyphens and questions about
/// their first letter are left for the evaluation.
inline std::vector<TextExample> bridge_questions(const Directory& directory, Index variants, std::uint64_t seed) {
  std::vector<TextExample> questions;
  calm::Random random(seed, calm::stream_of("bridges"));
  const auto strangers = directory.training_strangers();
  for (Index v = 0; v < variants; ++v)
    for (const Entity& e : directory.seen_entities()) {
      for (const Attribute a : attributes) {
        questions.push_back(direct(e, a, any_of(trained_phrasings, random)));
        if (random.below(5) == 0)
          questions.push_back(in_context(any_of(strangers, random), a, any_of(trained_phrasings, random), random));
      }
      const Skill skill = any_of(trained_skills, random);
      const auto ask = [&](const Entity& about, Index) { return derived(about, skill, true, random); };
      questions.push_back(behind(worked(random.below(3), strangers, Attribute::code, random, ask), ask(e, 0)));
    }
  return questions;
}

/// Text that the anchor writes by itself, from questions and beginnings of any kind. The bridges learn from it to leave
/// such text as it is; nobody's data is needed for that.
inline std::vector<calm::Example> own_words(Ctx& ctx, const Anchor& anchor, const std::vector<std::string>& words,
                                            Index count, std::uint64_t seed) {
  static constexpr std::array beginnings{
      "The ",          "In this article, we discuss ", "Once upon a time, ", "A short guide to ",
      "The terms of ", "It is important that "};
  static constexpr std::array questions{"What is the meaning of the word {n}?", "Tell me about {n}.",
                                        "Write a sentence with the word {n}.",  "How many letters does {n} have?",
                                        "Does {n} begin with a vowel?",         "Why do people talk about {n}?"};
  calm::Random random(seed, calm::stream_of("own words"));
  std::vector<std::vector<TokenId>> prompts;
  for (Index i = 0; i < count; ++i) {
    const std::string& word = any_of(words, random);
    std::string text(any_of(questions, random));
    if (i % 2 == 0) text = any_of(beginnings, random) + word;
    else text = asked(text.replace(text.find("{n}"), 3, word));
    prompts.push_back(encode(*anchor.tokenizer, text, true));
  }
  calm::GenerateOptions options;
  options.max_new_tokens = 40;
  options.sampler = {.temperature = 1, .top_k = 100, .seed = seed};
  options.batch = 64;
  options.end_tokens = anchor.tokenizer->ends();
  calm::Progress progress("the anchor's own words", count);
  std::vector<calm::Example> examples;
  for (std::size_t first = 0; first < prompts.size(); first += 64) {
    const std::size_t some = std::min<std::size_t>(64, prompts.size() - first);
    options.sampler.seed = seed + first;
    const auto texts = calm::generate(ctx, *anchor.model, std::span(prompts).subspan(first, some), options);
    for (std::size_t i = 0; i < some; ++i)
      if (!texts[i].ids.empty()) examples.push_back({prompts[first + i], texts[i].ids});
    progress.update(static_cast<Index>(first + some));
  }
  return examples;
}

inline std::vector<calm::Example> examples_of(const calm::Tokenizer& tokenizer, std::span<const TextExample> texts,
                                              bool ends) {
  std::vector<calm::Example> examples;
  for (const TextExample& text : texts) examples.push_back(example_of(tokenizer, text, ends));
  return examples;
}

}  // namespace knowledge
