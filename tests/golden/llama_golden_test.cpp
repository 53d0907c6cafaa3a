#include "golden/golden.hpp"

namespace llama_golden_test {

namespace {

/// Logits and hidden states of a model folder that transformers wrote. An absolute tolerance: the values are of order 1
/// to 10.
template <class On>
void compare(const std::string& name) {
  const double tolerance = On::is_double ? 1e-5 : 2e-4;
  const golden::Expected expected(name);
  const auto model = calm::load_model<typename On::Llama>(golden::folder(name));
  using Model = typename On::Llama;
  typename On::Context ctx(1);

  const calm::TokenBatch batch = expected.batch();
  typename Model::States states;
  model.prepare(ctx, batch, states);
  auto x = model.embed(ctx, batch);
  CHECK(expected.distance("hidden.0", x).largest_error < 1e-6);
  golden::CompareHidden observer{expected, tolerance};
  model.run(ctx, batch, states, x, 0, model.spec().blocks, nullptr, observer);
  CHECK(observer.seen == model.spec().blocks);

  const auto logits = ctx.arena.template matrix<typename Model::Scalar>(x.rows, model.spec().vocabulary);
  typename Model::HeadCache head;
  model.head(ctx, typename Model::ConstView(x), logits, head);
  CHECK(expected.distance("logits", logits).largest_error < tolerance);
}

}  // namespace

TEST_CASE_TEMPLATE("a Llama gives the logits and hidden states of PyTorch", On, CALM_GOLDEN_BACKENDS) {
  compare<On>("llama");
}

TEST_CASE_TEMPLATE("a Llama of bf16 weights and tied embeddings gives the logits and hidden states of PyTorch", On,
                   CALM_GOLDEN_BACKENDS) {
  compare<On>("llama_tied");
}

}  // namespace llama_golden_test
