// Composes two small models with random weights and prints the next token that the composition prefers.
#include <calm/compose.hpp>

#include <algorithm>
#include <iostream>

int main() {
  using Model = calm::Transformer<calm::zoo::Llama>;
  const calm::ModelSpec small{.vocabulary = 64, .width = 32, .hidden = 64, .blocks = 2, .heads = {2, 2, 16}};
  const calm::ModelSpec large{.vocabulary = 64, .width = 64, .hidden = 128, .blocks = 4, .heads = {4, 2, 16}};
  const auto augment = std::make_shared<const Model>(small, calm::RandomWeights{1});
  const auto anchor = std::make_shared<const Model>(large, calm::RandomWeights{2});
  const calm::ComposedModel<Model, Model> composed(anchor, {augment}, calm::links::evenly_spaced(2));

  calm::Context<calm::CpuBackend> ctx;
  const std::vector<calm::TokenId> ids = {1, 2, 3};
  const std::vector<calm::Index> offsets = {0, 3}, slots = {0};
  auto session = composed.make_session(ctx, 1, 16);
  const auto stream = composed.advance(ctx, session, {ids, offsets, {}, slots}, calm::NullObserver{});  // [3, 64]

  const auto logits = ctx.arena.matrix<float>(1, large.vocabulary);
  decltype(composed)::HeadCache cache;
  composed.head(ctx, stream.middle_rows(2, 1), logits, cache);  // [1, 64] -> [1, 64]
  const auto values = calm::flat(logits);
  std::cout << "next token: " << std::max_element(values.begin(), values.end()) - values.begin() << '\n';
}
