// Only the bridges train. The augment knows a secret (which token follows which), the anchor does not; after a minute's
// fraction the composition tells it, also for tokens that the bridges never saw. The adapter is saved and opened again.
#include <calm/calm.hpp>

#include <filesystem>
#include <iostream>
#include <random>

namespace {

using Model = calm::Transformer<calm::zoo::Llama>;
using Ctx = calm::Context<calm::CpuBackend>;
constexpr calm::TokenId words = 48, marker = 48;  // a word, the marker, then the word's partner

calm::TokenId partner(calm::TokenId word) { return (word * 29 + 11) % words; }

calm::PackedBatch lesson(calm::Random& random, calm::TokenId most, bool secret) {
  calm::PackedBatch batch;
  for (int i = 0; i < 32; ++i) {
    const auto word = static_cast<calm::TokenId>(random.below(most));
    batch.add({{word, marker}, {secret ? partner(word) : word}});
  }
  return batch;
}

/// A small model that has learnt to answer with the partner (the secret) or with the word itself.
std::shared_ptr<const Model> pretrained(Ctx& ctx, calm::Index width, bool secret) {
  calm::Transformer<calm::zoo::Llama, calm::Trainable> model(
      {.vocabulary = words + 1, .width = width, .hidden = 2 * width, .blocks = 2, .heads = {4, 4, width / 4}},
      calm::RandomWeights{.seed = 3});
  calm::Trainer trainer(ctx, model, calm::CosineSchedule{.peak = 5e-3, .warmup = 20, .steps = 250});
  calm::Random random(4);
  for (int step = 0; step < 250; ++step) trainer.step(lesson(random, words, secret));
  return std::make_shared<const Model>(model.spec(), calm::weights_of(model));
}

template <class Any>
int right_answers(Ctx& ctx, const Any& model, calm::TokenId first, calm::TokenId last) {
  std::vector<std::vector<calm::TokenId>> prompts;
  for (calm::TokenId word = first; word < last; ++word) prompts.push_back({word, marker});
  int right = 0;
  for (const auto& answer :
       calm::generate(ctx, model, std::span<const std::vector<calm::TokenId>>(prompts), {.max_new_tokens = 1}))
    right += answer.ids[0] == partner(first++) ? 1 : 0;
  return right;
}

}  // namespace

int main() {
  Ctx ctx;
  const auto augment = pretrained(ctx, 32, true), anchor = pretrained(ctx, 64, false);
  auto composed = calm::compose(anchor, calm::links::evenly_spaced(2), {.rotary = true}, augment);
  std::cout << "the anchor knows " << right_answers(ctx, *anchor, 0, words) << " of " << words << " partners\n";

  constexpr calm::TokenId shown = 24;  // the bridges see half of the words
  calm::Trainer trainer(ctx, composed, calm::CosineSchedule{.peak = 3e-3, .warmup = 20, .steps = 200});
  calm::Random random(5);
  for (int step = 1; step <= 200; ++step) {
    const calm::StepResult result = trainer.step(lesson(random, shown, true));
    if (step % 50 == 0) std::cout << "step " << step << "  loss " << calm::fixed(result.loss, 4) << '\n';
  }
  std::cout << "the composition knows " << right_answers(ctx, composed, 0, shown) << " of the " << shown
            << " that its bridges saw, " << right_answers(ctx, composed, shown, words) << " of the " << words - shown
            << " that they never saw\n";

  const auto folder =
      std::filesystem::temp_directory_path() / ("calm_adapter_" + std::to_string(std::random_device()()));
  calm::save_adapter(composed, folder);
  const auto opened = calm::load_adapter(folder, anchor, augment);
  std::cout << "the saved adapter, opened again, knows " << right_answers(ctx, opened, 0, words) << '\n';
  std::filesystem::remove_all(folder);
}
