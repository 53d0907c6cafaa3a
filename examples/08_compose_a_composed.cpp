// A composed model is a decoder like any other: it is saved, it generates, and it can be the anchor of a further
// composition.
#include <calm/calm.hpp>

#include <iostream>

int main() {
  using Model = calm::Transformer<calm::zoo::Llama>;
  const auto model = [](calm::Index width, calm::Index blocks, std::uint64_t seed) {
    return std::make_shared<const Model>(
        calm::ModelSpec{
            .vocabulary = 64, .width = width, .hidden = 2 * width, .blocks = blocks, .heads = {4, 4, width / 4}},
        calm::RandomWeights{.seed = seed});
  };
  using Inner = calm::ComposedModel<Model, Model>;
  const auto inner = std::make_shared<const Inner>(
      calm::compose(model(64, 4, 1), calm::links::evenly_spaced(2), {.zero_output = false}, model(32, 2, 2)));
  auto outer = calm::compose(inner, {{0, 1, 2}, {0, 2, 3}}, {}, model(48, 3, 3));
  std::cout << "trained by the outer composition: " << calm::count_parameters(outer)
            << " parameters; frozen in the inner one: " << calm::count_parameters(*inner) << '\n';

  calm::Context<calm::CpuBackend> ctx;
  const std::vector<std::vector<calm::TokenId>> prompts{{1, 2, 3}, {4, 5}};
  const auto print = [&](const char* name, const auto& m) {
    std::cout << name;
    for (const auto& answer : calm::generate(ctx, m, std::span(prompts), {.max_new_tokens = 8})) {
      for (const calm::TokenId id : answer.ids) std::cout << ' ' << id;
      std::cout << " |";
    }
    std::cout << '\n';
  };
  print("inner            ", *inner);
  print("outer, fresh     ", outer);  // the same: fresh bridges add nothing

  calm::Trainer trainer(ctx, outer, calm::CosineSchedule{.peak = 1e-2, .warmup = 10, .steps = 100});
  calm::PackedBatch batch;
  batch.add({{1, 2, 3}, {10, 11, 12, 13, 14, 15, 16, 17}});
  batch.add({{4, 5}, {20, 21, 22, 23, 24, 25, 26, 27}});
  for (int step = 0; step < 100; ++step) trainer.step(batch);
  print("outer, trained   ", outer);
  print("inner, untouched ", *inner);
}
