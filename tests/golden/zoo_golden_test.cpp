#include "golden/golden.hpp"

#include <calm/model/zoo/zoo.hpp>

namespace zoo_golden_test {

namespace {

using calm::Index;

/// Logits and hidden states of a checkpoint that transformers wrote, in f32; then the same logits by decoding with
/// caches, token by token.
template <class Architecture>
void compare(const std::string& name) {
  CAPTURE(name);
  using Model = calm::Transformer<Architecture>;
  const golden::Expected expected(name);
  const auto model = calm::load_model<Model>(golden::folder(name));
  calm::Context<calm::CpuBackend> ctx(1);

  const calm::TokenBatch batch = expected.batch();
  auto x = model.embed(ctx, batch);
  CHECK(expected.distance("hidden.0", x).largest_error < 1e-5);
  golden::CompareHidden observer{expected, 2e-4};
  model.run(ctx, batch, {}, x, 0, model.spec().blocks, nullptr, observer);
  CHECK(observer.seen == model.spec().blocks);
  const auto logits = ctx.arena.template matrix<float>(x.rows, model.spec().vocabulary);
  typename Model::HeadCache head;
  model.head(ctx, typename Model::ConstView(x), logits, head);
  CHECK(expected.distance("logits", logits).largest_error < 2e-4);

  auto session = model.make_session(ctx, 1, batch.length(0));
  const std::vector<Index> offsets{0, 1}, slots{0};
  calm::Matrix<float> decoded(batch.length(0), model.spec().vocabulary);
  for (Index t = 0; t < batch.length(0); ++t) {
    const calm::TokenBatch next{batch.ids.subspan(static_cast<std::size_t>(t), 1), offsets, {}, slots};
    const auto stream = model.advance(ctx, session, next, calm::NullObserver{});
    model.head(ctx, typename Model::ConstView(stream), decoded.view().middle_rows(t, 1), head);
  }
  double largest = 0;
  for (Index t = 0; t < decoded.rows(); ++t)
    for (Index j = 0; j < decoded.cols(); ++j)
      largest = std::max(largest, static_cast<double>(std::abs(decoded(t, j) - logits(t, j))));
  CHECK(largest < 2e-4);
}

}  // namespace

TEST_CASE("every architecture gives the logits and hidden states of transformers, and decodes to the same") {
  for (const char* name : {"llama3", "mistral", "qwen2", "qwen3", "gemma3", "olmo2", "phi3", "gpt_neox", "gpt2"}) {
    const std::string folder = std::string("zoo_") + name;
    const calm::ModelConfig config = calm::read_config_json(golden::folder(folder) / "config.json");
    calm::zoo::All::visit(config.model_type, [&](auto architecture) { compare<decltype(architecture)>(folder); });
  }
}

}  // namespace zoo_golden_test
