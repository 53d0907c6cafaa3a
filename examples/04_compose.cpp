// Two models of different sizes become one: it starts as the anchor, bit for bit, and the links say where it may
// change.
#include <calm/calm.hpp>

#include <iostream>

int main() {
  using Model = calm::Transformer<calm::zoo::Llama>;
  const auto anchor = std::make_shared<const Model>(
      calm::ModelSpec{.vocabulary = 100, .width = 64, .hidden = 176, .blocks = 6, .heads = {4, 4, 16}},
      calm::RandomWeights{.seed = 1});
  const auto augment = std::make_shared<const Model>(
      calm::ModelSpec{.vocabulary = 100, .width = 32, .hidden = 88, .blocks = 3, .heads = {2, 2, 16}},
      calm::RandomWeights{.seed = 2});
  const auto composed = calm::compose(anchor, calm::links::evenly_spaced(3), {}, augment);

  std::cout << "links (augment:tap>write):";
  for (const calm::Link& link : composed.links()) std::cout << ' ' << to_string(link);
  std::cout << "\ntrained parameters: " << calm::count_parameters(composed) << '\n';

  calm::Context<calm::CpuBackend> ctx;
  const std::vector<calm::TokenId> ids{5, 17, 3, 88, 41};
  const std::vector<calm::Index> offsets{0, 5};
  const calm::TokenBatch batch{ids, offsets, {}, {}};
  const auto logits_of = [&](const auto& model) {
    typename std::decay_t<decltype(model)>::States states;
    model.prepare(ctx, batch, states);
    typename std::decay_t<decltype(model)>::HeadCache head;
    calm::Matrix<float> logits(batch.tokens(), model.spec().vocabulary);
    model.head(ctx, model.forward(ctx, batch, states, nullptr), logits.view(), head);
    return logits;
  };
  const auto alone = logits_of(*anchor), together = logits_of(composed);
  const bool same = std::equal(alone.values().begin(), alone.values().end(), together.values().begin());
  std::cout << "logits of the fresh composition and of the anchor: " << (same ? "the same bits" : "different") << '\n';

  try {
    calm::compose(anchor, {{0, 1, 4}, {0, 3, 5}}, {}, augment);
  } catch (const calm::ConfigError& error) {
    std::cout << "a link that cannot be: " << error.what() << '\n';
  }
  return same ? 0 : 1;
}
