// What report_links says of a link, against runs of the composition with and without it.
#include <doctest/doctest.h>
#include <calm/evaluate/link_report.hpp>
#include <support/models.hpp>

#include <cmath>

namespace link_report_test {
using namespace calm_test;
using calm::Example;
using calm::PackedBatch;

namespace {

using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, float>;
using Composed = calm::ComposedModel<Llama, Llama>;

constexpr Index vocabulary = 17;

/// Two links into the last block, one of them also below: what is added there must not be counted twice.
Composed make_model(const calm::BridgeOptions& options = {}) {
  const calm::ModelSpec anchor{
      .vocabulary = vocabulary, .width = 16, .hidden = 24, .blocks = 3, .heads = {2, 1, 8}, .context = 64};
  const calm::ModelSpec augment{
      .vocabulary = vocabulary, .width = 12, .hidden = 16, .blocks = 2, .heads = {2, 2, 6}, .context = 64};
  return {std::make_shared<const Llama>(anchor, TestWeights{1, calm::DType::f32}),
          {std::make_shared<const Llama>(augment, TestWeights{2, calm::DType::f32})},
          {{0, 0, 0}, {0, 0, 2}, {0, 1, 2}},
          options};
}

PackedBatch make_batch() {
  const std::vector<Example> examples = {
      {random_tokens(5, vocabulary, 1), random_tokens(4, vocabulary, 2)},
      {random_tokens(1, vocabulary, 3), random_tokens(6, vocabulary, 4)},
      {random_tokens(3, vocabulary, 5), random_tokens(2, vocabulary, 6), {true, false}}};
  return PackedBatch(examples);
}

/// Copies the stream that a block leaves, its links included.
struct Copier {
  Index block;
  Matrix<float>& copy;
  void after_block(auto&, Index i, const MatrixView<float>& x) {
    if (i == block) copy = copy_of(x);
  }
  void after_block_backward(auto&, Index, MatrixView<float>) const {}
};

/// The stream after a block, with some links switched off.
Matrix<float> stream_after(const Composed& model, const PackedBatch& batch, Index block, std::vector<bool> disabled) {
  Cpu ctx(1);
  const calm::TokenBatch tokens = batch.tokens();
  Composed::States states;
  model.prepare_augments(ctx, tokens, states);
  states.disabled = std::move(disabled);
  MatrixView<float> x = model.embed(ctx, tokens);
  Matrix<float> copy;
  model.run(ctx, tokens, states, x, 0, model.spec().blocks, nullptr, Copier{block, copy});
  return copy;
}

double norm(const Matrix<float>& m) {
  double squares = 0;
  for (const float x : m.values()) squares += static_cast<double>(x) * static_cast<double>(x);
  return std::sqrt(squares);
}

/// The same model with the output map of one link at zero.
Composed without(Composed model, const std::string& link) {
  calm::for_each_parameter(model, [&](const std::string& name, auto& parameter) {
    if (name == link + ".o_proj.weight")
      std::fill(parameter.value.values().begin(), parameter.value.values().end(), 0.0F);
  });
  return model;
}

}  // namespace

TEST_CASE("a link's contribution is what it adds, against the stream that it is added to") {
  for (const calm::BridgeOptions& options : {calm::BridgeOptions{}, calm::BridgeOptions{.gate = calm::Gate::tanh}}) {
    Composed model = make_model(options);
    randomise(model, 9);
    const PackedBatch batch = make_batch();
    Cpu ctx(1);
    const auto reports = calm::report_links(ctx, model, batch);
    REQUIRE(reports.size() == 3);
    for (std::size_t k = 0; k < 3; ++k) {
      CAPTURE(k);
      CHECK(reports[k].link == model.links()[k]);
      const Index block = reports[k].link.write;
      std::vector<bool> here(3, false), all_here(3, false);
      here[k] = true;
      for (std::size_t other = 0; other < 3; ++other) all_here[other] = model.links()[other].write == block;
      const Matrix<float> with = stream_after(model, batch, block, {}), less = stream_after(model, batch, block, here),
                          before = stream_after(model, batch, block, all_here);
      Matrix<float> added = with;
      for (Index i = 0; i < added.size(); ++i) added.data()[i] -= less.data()[i];
      CHECK(reports[k].contribution == doctest::Approx(norm(added) / norm(before)).epsilon(1e-4));
      CHECK(reports[k].contribution > 1e-2);
    }
  }
}

TEST_CASE("the loss without a link is that of the model whose link adds nothing") {
  Composed model = make_model();
  randomise(model, 9);
  const PackedBatch batch = make_batch();
  Cpu ctx(1);
  const auto reports = calm::report_links(ctx, model, batch);
  const double loss = calm::mean_loss(ctx, model, std::span(&batch, 1));
  for (std::size_t k = 0; k < 3; ++k) {
    CAPTURE(k);
    const double expected = calm::mean_loss(ctx, without(model, "links." + std::to_string(k)), std::span(&batch, 1));
    CHECK(reports[k].loss == doctest::Approx(loss).epsilon(1e-6));
    CHECK(reports[k].loss_without == doctest::Approx(expected).epsilon(1e-6));
    CHECK(std::abs(reports[k].loss_without - loss) > 1e-3);
  }
}

TEST_CASE("a fresh bridge contributes nothing, and the loss is the same without it") {
  for (const calm::BridgeOptions& options : {calm::BridgeOptions{}, calm::BridgeOptions{.gate = calm::Gate::tanh}}) {
    const Composed model = make_model(options);
    const PackedBatch batch = make_batch();
    Cpu ctx(1);
    for (const calm::LinkReport& report : calm::report_links(ctx, model, batch)) {
      CHECK(report.contribution == 0);
      CHECK(report.loss_without == report.loss);
      CHECK(report.loss == calm::mean_loss(ctx, model.anchor(), std::span(&batch, 1)));
    }
  }
  Cpu ctx(1);
  for (const calm::LinkReport& report : calm::report_links(ctx, make_model(calm::preset::paper()), make_batch()))
    CHECK(report.contribution > 0);
}

TEST_CASE("a batch in which nothing counts has no losses to report") {
  const Example silent{{1, 2}, {3}, {false}};
  Cpu ctx(1);
  CHECK_THROWS_AS(calm::report_links(ctx, make_model(), PackedBatch(std::span(&silent, 1))), calm::ConfigError);
}

}  // namespace link_report_test
