// One anchor, two augments of different widths, several links into one block; and what each link contributes.
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
  const auto anchor = model(64, 4, 1), first = model(32, 2, 2), second = model(48, 3, 3);
  auto composed =
      calm::compose(anchor, {{0, 0, 1}, {0, 1, 3}, {1, 2, 3}, {1, 0, 1}}, {.gate = calm::Gate::tanh}, first, second);

  // Something to learn: after a token t comes 63 - t.
  calm::Context<calm::CpuBackend> ctx;
  calm::Random random(7);
  const auto batch = [&] {
    calm::PackedBatch b;
    for (int i = 0; i < 32; ++i) {
      const auto token = static_cast<calm::TokenId>(random.below(64));
      b.add({{token}, {63 - token}});
    }
    return b;
  };
  calm::Trainer trainer(ctx, composed, calm::CosineSchedule{.peak = 1e-2, .warmup = 20, .steps = 150});
  for (int step = 0; step < 150; ++step) trainer.step(batch());

  calm::Table table({"link", "contribution / stream", "loss", "loss without it"});
  for (const calm::LinkReport& report : calm::report_links(ctx, composed, batch()))
    table.add_row({to_string(report.link), calm::fixed(report.contribution, 3), calm::fixed(report.loss, 4),
                   calm::fixed(report.loss_without, 4)});
  std::cout << table.text();
}
