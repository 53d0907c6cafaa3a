// The cost of a token from the sizes of the models, against a backend that counts what is asked of it.
#include <doctest/doctest.h>
#include <calm/backend/reference.hpp>
#include <calm/evaluate/cost.hpp>
#include <calm/generate/generate.hpp>
#include <calm/train/trainer.hpp>
#include <support/models.hpp>

namespace cost_test {
using namespace calm_test;

namespace {

/// The reference, which counts a multiplication and an addition as two.
struct CountingBackend : calm::ReferenceBackend {
  using Base = calm::ReferenceBackend;
  using Base::Base;
  double products = 0, attentions = 0;

  static double size(auto rows, auto a, auto b) { return 2.0 * static_cast<double>(rows * a * b); }
  template <class S, class W>
  void multiply(const W& w, MatrixView<const S> x, MatrixView<S> y, calm::WriteMode auto mode) {
    products += size(x.rows, x.cols, y.cols);
    Base::multiply(w, x, y, mode);
  }
  template <class S>
  void multiply_each(MatrixView<const S> x, std::span<const calm::FrozenProduct<S>> each) {
    for (const auto& [weight, y] : each) multiply(packed<S>(*weight), x, y, calm::Assign{});
  }
  template <class S, class W>
  void multiply_input_gradient(const W& w, MatrixView<const S> dy, MatrixView<S> dx, calm::WriteMode auto mode) {
    products += size(dy.rows, dy.cols, dx.cols);
    Base::multiply_input_gradient(w, dy, dx, mode);
  }
  template <class S>
  void multiply_weight_gradient(MatrixView<const S> dy, MatrixView<const S> x, MatrixView<S> dw) {
    products += size(dy.rows, dy.cols, x.cols);
    Base::multiply_weight_gradient(dy, x, dw);
  }
  static double pairs(std::span<const calm::VisibleRange> visible, calm::HeadShape heads) {
    double seen = 0;
    for (const auto& range : visible) seen += static_cast<double>(range.end - range.begin);
    return 2 * seen * static_cast<double>(heads.query_heads * heads.width);
  }
  template <class S>
  void attention(MatrixView<const S> q, std::span<const calm::AttentionSequence<S>> sequences,
                 std::span<const calm::VisibleRange> visible, calm::HeadShape heads, MatrixView<S> y,
                 MatrixView<S> log_sum_exp) {
    attentions += 2 * pairs(visible, heads);  // scores, and what they weigh
    Base::attention(q, sequences, visible, heads, y, log_sum_exp);
  }
  template <class S>
  void attention_backward(MatrixView<const S> q, std::span<const calm::AttentionSequence<S>> sequences,
                          std::span<const calm::VisibleRange> visible, calm::HeadShape heads, MatrixView<const S> y,
                          MatrixView<const S> log_sum_exp, MatrixView<const S> dy, MatrixView<S> dq) {
    attentions += 5 * pairs(visible, heads);  // scores again, and gradients of values, weights, queries and keys
    Base::attention_backward(q, sequences, visible, heads, y, log_sum_exp, dy, dq);
  }
};

using Ctx = calm::Context<CountingBackend>;
using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, float>;
using Composed = calm::ComposedModel<Llama, Llama>;

std::shared_ptr<const Llama> make_model(Index width, Index blocks, bool tied, std::uint64_t seed) {
  const calm::ModelSpec spec{.vocabulary = 41,
                             .width = width,
                             .hidden = 2 * width + 3,
                             .blocks = blocks,
                             .heads = {4, 2, width / 4},
                             .context = 100,
                             .tied_embeddings = tied,
                             .window = 5,
                             .windowed = std::vector<bool>(static_cast<std::size_t>(blocks - 1), true)};
  calm::ModelSpec sized = spec;
  sized.windowed.push_back(false);  // the last block sees everything
  return std::make_shared<const Llama>(sized, TestWeights{seed, calm::DType::f32});
}

/// What the backend counted, for each of `tokens`.
struct Counted {
  Ctx& ctx;
  double products = ctx.backend.products, attentions = ctx.backend.attentions;

  void check(const calm::TokenCost& cost, double tokens) const {
    CHECK((ctx.backend.products - products) / tokens == doctest::Approx(cost.product_flops).epsilon(1e-9));
    CHECK((ctx.backend.attentions - attentions) / tokens == doctest::Approx(cost.attention_flops).epsilon(1e-9));
  }
};

template <class Model>
void check_inference(const Model& model, const calm::CompositionCost& cost) {
  Ctx ctx(1);
  auto session = model.make_session(ctx, 1, 30);
  const auto ids = random_tokens(20, 41, 1);
  const auto advance = [&](std::size_t first, std::size_t count, Index prompt) {
    Batch batch;
    batch.add(
        {ids.begin() + static_cast<std::ptrdiff_t>(first), ids.begin() + static_cast<std::ptrdiff_t>(first + count)},
        prompt, 0);
    ctx.arena.reset();
    calm::next_logits(ctx, model, session, batch.cached());
  };
  for (const Index tokens : {1, 2, 12}) {
    session.clear(0);
    const Counted prompt{ctx};
    advance(0, static_cast<std::size_t>(tokens), tokens);
    prompt.check(cost.prefill(tokens), static_cast<double>(tokens));
  }
  for (std::size_t t = 12; t < 15; ++t) {
    const Counted token{ctx};
    advance(t, 1, 0);
    token.check(cost.decode(static_cast<Index>(t) + 1), 1);
  }
}

}  // namespace

TEST_CASE("prefill and decoding of one model cost what its sizes say") {
  for (const bool tied : {false, true}) {
    const auto model = make_model(24, 3, tied, 1);
    check_inference(*model, {.anchor = calm::cost_of(*model)});
  }
}

TEST_CASE("prefill, decoding and training of a composed model cost what the sizes say") {
  const auto anchor = make_model(24, 4, false, 1);
  for (const Index width : {8, 120}) {  // whose keys and values are cheaper folded, or not
    const auto augment = make_model(width, 3, true, 2);
    for (const calm::BridgeOptions& options :
         {calm::BridgeOptions{}, calm::preset::paper(), {.gate = calm::Gate::tanh, .rotary = true, .rank = 3}}) {
      for (const calm::Links& links :
           {calm::Links{{0, 0, 1}, {0, 1, 3}}, {{0, 1, 3}}, {{0, 0, 3}, {0, 1, 3}}, {{0, 1, 0}}}) {
        Composed model(anchor, {augment}, links, options);
        randomise(model, 3);
        const calm::CompositionCost cost{.anchor = calm::cost_of(*anchor),
                                         .augments = {{calm::cost_of(*augment)}},
                                         .links = model.links(),
                                         .options = options};
        check_inference(model, cost);

        for (const Index scored : {1, 10, 20}) {
          Ctx ctx(1);
          calm::Gradients<float> grads(model);
          calm::PackedBatch batch;
          const auto ids = random_tokens(21, 41, 1);
          const std::ptrdiff_t prompt = 21 - scored;
          batch.add({{ids.begin(), ids.begin() + prompt}, {ids.begin() + prompt, ids.end()}});
          calm::KeptStates<Composed> states;
          Composed::Tape tape;
          const Counted step{ctx};
          calm::batch_loss(ctx, model, batch, states, &tape, 1.0, grads);
          step.check(cost.train(20, static_cast<double>(scored) / 20), 20);
        }
      }
    }
  }
}

TEST_CASE("bytes that a token reads: every weight that is multiplied, and the keys and values that it sees") {
  const auto anchor = make_model(24, 2, false, 1), augment = make_model(8, 2, true, 2);
  const auto matrices = [](double width, double hidden) { return 3 * width * width + 3 * width * hidden; };
  const double of_anchor = 2 * matrices(24, 51) + 24 * 41, of_augment = matrices(8, 19);
  const double of_link = 2 * 24 * 24 + 2 * 24 * 8;  // queries and outputs; keys and values folded
  const calm::CompositionCost cost{.anchor = calm::cost_of(*anchor),
                                   .augments = {{calm::cost_of(*augment), 2.0}},
                                   .links = {{0, 0, 1}},
                                   .options = {},
                                   .value_bytes = 2};
  CHECK(cost.decode(10).weight_bytes == doctest::Approx(2 * (of_anchor + of_augment) + 4 * of_link));
  CHECK(cost.prefill(10).weight_bytes == doctest::Approx(cost.decode(10).weight_bytes / 10));
  // 5 and 10 positions of the anchor, 5 of 20 of the augment, 20 of the link; keys and values, 4 bytes each.
  CHECK(cost.decode(10).cache_bytes == doctest::Approx(8 * (12 * (5 + 10) + 4 * 5 + 24 * 20)));
}

}  // namespace cost_test
