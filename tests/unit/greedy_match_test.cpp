// greedy_matches against what generate() writes.
#include <doctest/doctest.h>
#include <calm/evaluate/greedy_match.hpp>
#include <calm/generate/generate.hpp>
#include <calm/model/random_weights.hpp>
#include <calm/model/transformer.hpp>
#include <calm/model/zoo/llama.hpp>
#include <support/models.hpp>

namespace greedy_match_test {
using namespace calm_test;

TEST_CASE("a completion matches exactly where greedy decoding writes it, whatever runs beside it") {
  using Model = calm::Transformer<calm::zoo::Llama>;
  const calm::ModelSpec spec{
      .vocabulary = 23, .width = 16, .hidden = 24, .blocks = 2, .heads = {2, 2, 8}, .context = 64};
  const Model model(spec, calm::RandomWeights{.seed = 3, .embedding_deviation = 1});
  calm::Context<calm::CpuBackend> ctx(1);
  std::vector<std::vector<calm::TokenId>> prompts{{1, 2, 3}, {4}, {5, 6, 7, 8, 9}, {10, 11}};
  calm::GenerateOptions options;
  options.max_new_tokens = 4;
  const auto written = calm::generate(ctx, model, std::span(prompts), options);
  std::vector<calm::Example> examples;
  std::vector<bool> expected;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    examples.push_back({prompts[i], written[i].ids});
    expected.push_back(true);
    for (std::size_t place = 0; place < 4; ++place) {  // one token is another
      calm::Example wrong = examples[5 * i];
      wrong.completion[place] = (wrong.completion[place] + 1) % 23;
      examples.push_back(wrong);
      expected.push_back(false);
    }
  }
  for (const Index batch_tokens : {1, 13, 2048})
    CHECK(calm::greedy_matches(ctx, model, std::span<const calm::Example>(examples), batch_tokens) == expected);
}

TEST_CASE("tokens that are not scored need not match, and targets stand in for the tokens") {
  using Model = calm::Transformer<calm::zoo::Llama>;
  const calm::ModelSpec spec{
      .vocabulary = 11, .width = 16, .hidden = 24, .blocks = 1, .heads = {2, 2, 8}, .context = 16};
  const Model model(spec, calm::RandomWeights{.seed = 4, .embedding_deviation = 1});
  calm::Context<calm::CpuBackend> ctx(1);
  std::vector<std::vector<calm::TokenId>> prompts{{1, 2}};
  calm::GenerateOptions options;
  options.max_new_tokens = 1;
  const calm::TokenId next = calm::generate(ctx, model, std::span(prompts), options)[0].ids[0];
  const calm::TokenId other = (next + 1) % 11;
  const auto matches = [&](const calm::Example& example) -> bool {
    return calm::greedy_matches(ctx, model, std::span(&example, 1))[0];
  };
  CHECK(matches({{1, 2}, {next}}));
  CHECK_FALSE(matches({{1, 2}, {other}}));
  CHECK(matches({{1, 2}, {other}, {}, {next}}));
  CHECK_FALSE(matches({{1, 2}, {next}, {}, {other}}));
  CHECK(matches({{1, 2}, {other}, {false}}));
}

}  // namespace greedy_match_test
