// A Transformer is an architecture (a type), sizes (numbers) and a policy for its weights. Here a small Llama-style
// model is trained on one sentence and then completes it.
#include <calm/calm.hpp>

#include <iostream>

int main() {
  using Model = calm::Transformer<calm::zoo::Llama, calm::Trainable>;
  const calm::ModelSpec sizes{.vocabulary = 128,
                              .width = 64,
                              .hidden = 176,
                              .blocks = 2,
                              .heads = {4, 4, 16},
                              .context = 128,
                              .tied_embeddings = true};
  Model model(sizes, calm::RandomWeights{.seed = 1});
  std::cout << "parameters: " << calm::count_parameters(model) << '\n';

  // Characters are the tokens. The loss is on what follows the prompt.
  const std::string prompt = "The anchor ", rest = "decodes, the augment is tapped, the bridges are trained.";
  const calm::Example example{{prompt.begin(), prompt.end()}, {rest.begin(), rest.end()}};
  calm::PackedBatch batch;
  batch.add(example);

  calm::Context<calm::CpuBackend> ctx;
  calm::Trainer trainer(ctx, model, calm::CosineSchedule{.peak = 3e-3, .warmup = 10, .steps = 120});
  for (int step = 1; step <= 120; ++step) {
    const calm::StepResult result = trainer.step(batch);
    if (step % 30 == 0)
      std::cout << "step " << step << "  loss " << calm::fixed(result.loss, 4) << " nats a character\n";
  }

  const std::vector<std::vector<calm::TokenId>> prompts{example.prompt};
  const auto completions = calm::generate(ctx, model, std::span(prompts), {.max_new_tokens = 56});
  std::cout << prompt << std::string(completions[0].ids.begin(), completions[0].ids.end()) << '\n';
}
