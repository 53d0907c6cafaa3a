#include "golden/golden.hpp"

#include <calm/io/adapter.hpp>

#include <memory>

namespace composed_golden_test {

namespace {

/// The anchor llama with the augments llama_tied and llama_narrow, joined by an adapter's bridges.
template <class On>
auto open_composition(const std::string& adapter) {
  using Llama = typename On::Llama;
  const auto open = [](const std::string& name) {
    return std::make_shared<const Llama>(calm::load_model<Llama>(golden::folder(name)));
  };
  const calm::AdapterConfig config = calm::read_adapter_config(golden::folder(adapter));
  auto model = calm::compose(open("llama"), config.links, config.options, open("llama_tied"), open("llama_narrow"));
  const calm::SafetensorsFile file(golden::folder(adapter) / "adapter_model.safetensors");
  std::size_t used = 0;
  calm::for_each_parameter(model, [&](const std::string& name, auto& parameter) {
    file.matrix(name, parameter.value.rows(), parameter.value.cols())
        .read_rows(0, parameter.value.rows(), parameter.value.data());
    ++used;
  });
  CHECK(used == file.tensors().size());
  return model;
}

/// The rows that predict a next token of their sequence, and these tokens.
struct Predictions {
  std::vector<golden::Index> rows;
  std::vector<golden::TokenId> targets;

  explicit Predictions(const calm::TokenBatch& batch) {
    for (golden::Index s = 0; s < batch.sequences(); ++s)
      for (golden::Index t = batch.offsets[static_cast<std::size_t>(s)];
           t + 1 < batch.offsets[static_cast<std::size_t>(s + 1)]; ++t) {
        rows.push_back(t);
        targets.push_back(batch.ids[static_cast<std::size_t>(t + 1)]);
      }
  }
};

template <class On>
void compare(const std::string& adapter) {
  CAPTURE(adapter);
  const double tolerance = On::is_double ? 2e-6 : 1e-4;  // of the largest value of a tensor
  const golden::Expected expected(adapter);
  auto model = open_composition<On>(adapter);
  using Model = decltype(model);
  using Scalar = typename Model::Scalar;
  using ConstView = typename Model::ConstView;
  typename On::Context ctx(1);
  calm::Gradients<Scalar> grads(model);

  const calm::TokenBatch batch = expected.batch();
  typename Model::States states;
  typename Model::Tape tape;
  model.prepare(ctx, batch, states);
  const auto x = model.forward(ctx, batch, states, &tape);
  const auto logits = ctx.arena.template matrix<Scalar>(x.rows, model.spec().vocabulary);
  typename Model::HeadCache head;
  model.head(ctx, ConstView(x), logits, head);
  CHECK(expected.distance("logits", logits).relative() < tolerance);

  const Predictions predictions(batch);
  const auto count = static_cast<golden::Index>(predictions.rows.size());
  const auto rows = ctx.arena.template matrix<Scalar>(count, x.cols),
             drows = ctx.arena.template matrix<Scalar>(count, x.cols);
  const auto scored = ctx.arena.template matrix<Scalar>(count, logits.cols);
  const auto losses = ctx.arena.template vector<Scalar>(count);
  ctx.backend.gather_rows(ConstView(x), predictions.rows, rows);
  model.head(ctx, ConstView(rows), scored, head);
  ctx.backend.cross_entropy(ConstView(scored), predictions.targets, 1.0 / static_cast<double>(count), losses, scored);
  double loss = 0;
  for (const Scalar l : losses) loss += static_cast<double>(l) / static_cast<double>(count);
  CHECK(loss == doctest::Approx(expected.values("loss")(0, 0)).epsilon(On::is_double ? 1e-6 : 1e-5));

  const auto dx = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
  model.head_backward(ctx, ConstView(rows), ConstView(scored), drows, head);
  ctx.backend.scale(ConstView(x), 0, dx);
  ctx.backend.scatter_rows(ConstView(drows), predictions.rows, dx);
  model.backward(ctx, batch, states, tape, dx, grads);
  std::size_t compared = 0;
  calm::for_each_parameter(model, [&](const std::string& name, const auto& parameter) {
    CAPTURE(name);
    CHECK(expected.distance("grad." + name, grads[parameter]).relative() < tolerance);
    ++compared;
  });
  const auto hidden = static_cast<std::size_t>(model.spec().blocks + 1);
  CHECK(compared + hidden + 4 == expected.tensor_count());  // 4: ids, offsets, logits, loss
}

}  // namespace

TEST_CASE_TEMPLATE("bridges with norms and rotary positions give the logits, loss and gradients of PyTorch", On,
                   CALM_GOLDEN_BACKENDS) {
  compare<On>("composed_norms_rotary");
}

TEST_CASE_TEMPLATE("bridges as in the paper give the logits, loss and gradients of PyTorch", On, CALM_GOLDEN_BACKENDS) {
  compare<On>("composed_paper");
}

TEST_CASE_TEMPLATE("bridges with a tanh gate and a low-rank projection give the logits, loss and gradients of PyTorch",
                   On, CALM_GOLDEN_BACKENDS) {
  compare<On>("composed_tanh_low_rank");
}

TEST_CASE_TEMPLATE("an observer of a composed model sees the stream after the links of each block", On,
                   CALM_GOLDEN_BACKENDS) {
  const golden::Expected expected("composed_norms_rotary");
  const auto model = open_composition<On>("composed_norms_rotary");
  typename On::Context ctx(1);
  const calm::TokenBatch batch = expected.batch();
  typename decltype(model)::States states;
  model.prepare_augments(ctx, batch, states);
  auto x = model.embed(ctx, batch);
  CHECK(expected.distance("hidden.0", x).largest_error < 1e-6);
  golden::CompareHidden observer{expected, 2e-4};
  model.run(ctx, batch, states, x, 0, model.spec().blocks, nullptr, observer);
  CHECK(observer.seen == model.spec().blocks);
}

}  // namespace composed_golden_test
