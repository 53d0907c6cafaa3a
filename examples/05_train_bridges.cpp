// Only the bridges train. The augment knows a secret (a number for each word), the anchor knows other numbers; after a
// few seconds the composition tells the secret, also of words that the bridges never saw. The adapter is saved and
// opened again.
#include <calm/calm.hpp>

#include <filesystem>
#include <iostream>
#include <random>

namespace {

using Model = calm::Transformer<calm::zoo::Llama>;
using Ctx = calm::Context<calm::CpuBackend>;
constexpr calm::TokenId words = 100, marker = words, zero = words + 1;  // a word, the marker, then two digits

std::vector<calm::TokenId> digits(calm::TokenId number) { return {zero + number / 10, zero + number % 10}; }
calm::TokenId secret(calm::TokenId word) { return (word * 37 + 11) % 100; }

calm::PackedBatch lesson(calm::Random& random, calm::TokenId most, bool tells_secret) {
  calm::PackedBatch batch;
  for (int i = 0; i < 32; ++i) {
    const auto word = static_cast<calm::TokenId>(random.below(most));
    batch.add({{word, marker}, digits(tells_secret ? secret(word) : word)});
  }
  return batch;
}

/// A small model that has learnt to answer with the secret or with the number of the word itself.
std::shared_ptr<const Model> pretrained(Ctx& ctx, calm::Index width, bool knows_secret) {
  calm::Transformer<calm::zoo::Llama, calm::Trainable> model(
      {.vocabulary = zero + 10, .width = width, .hidden = 2 * width, .blocks = 2, .heads = {4, 4, width / 4}},
      calm::RandomWeights{.seed = 3});
  calm::Trainer trainer(ctx, model, calm::CosineSchedule{.peak = 5e-3, .warmup = 20, .steps = 400});
  calm::Random random(4);
  for (int step = 0; step < 400; ++step) trainer.step(lesson(random, words, knows_secret));
  return std::make_shared<const Model>(model.spec(), calm::weights_of(model));
}

template <class Any>
int right_answers(Ctx& ctx, const Any& model, calm::TokenId first, calm::TokenId last) {
  std::vector<std::vector<calm::TokenId>> prompts;
  for (calm::TokenId word = first; word < last; ++word) prompts.push_back({word, marker});
  int right = 0;
  for (const auto& answer :
       calm::generate(ctx, model, std::span<const std::vector<calm::TokenId>>(prompts), {.max_new_tokens = 2}))
    right += answer.ids == digits(secret(first++)) ? 1 : 0;
  return right;
}

}  // namespace

int main() {
  Ctx ctx;
  const auto augment = pretrained(ctx, 32, true), anchor = pretrained(ctx, 64, false);
  auto composed = calm::compose(anchor, calm::links::evenly_spaced(2), {.rotary = true}, augment);
  std::cout << "of " << words << " secrets the anchor knows " << right_answers(ctx, *anchor, 0, words)
            << ", the augment " << right_answers(ctx, *augment, 0, words) << '\n';

  constexpr calm::TokenId shown = words / 2;  // the bridges see half of the words
  calm::Trainer trainer(ctx, composed, calm::CosineSchedule{.peak = 3e-3, .warmup = 20, .steps = 200});
  calm::Random random(5);
  for (int step = 1; step <= 200; ++step) {
    const calm::StepResult result = trainer.step(lesson(random, shown, true));
    if (step % 50 == 0) std::cout << "step " << step << "  loss " << calm::fixed(result.loss, 4) << '\n';
  }
  const int seen = right_answers(ctx, composed, 0, shown), unseen = right_answers(ctx, composed, shown, words);
  std::cout << "the composition knows " << seen << " of the " << shown << " that its bridges saw, " << unseen
            << " of the " << words - shown << " that they never saw\n";

  const auto folder =
      std::filesystem::temp_directory_path() / ("calm_adapter_" + std::to_string(std::random_device()()));
  calm::save_adapter(composed, folder);
  const auto opened = calm::load_adapter(folder, anchor, augment);
  std::cout << "the saved adapter, opened again, knows " << right_answers(ctx, opened, 0, words) << '\n';
  std::filesystem::remove_all(folder);
  return unseen > shown / 4 ? 0 : 1;  // by chance it would be none
}
