// A pass that is asked for some rows of the final stream alone, with caches and without: the same bits as in a pass
// over all of them.
#include <doctest/doctest.h>
#include <calm/backend/cpu_bf16.hpp>
#include <calm/backend/cpu_stored.hpp>
#include <calm/backend/reference.hpp>
#include <calm/compose/any_augment.hpp>
#include <calm/model/zoo/zoo.hpp>
#include <support/models.hpp>

#include <array>

namespace chosen_rows_test {
using namespace calm_test;

namespace {

const std::vector<std::vector<Index>> choices = {  // of 23 tokens; some sequences have none
    {5},
    {22},
    {0, 3, 4, 5, 6, 11, 12, 20, 21, 22},
    {1, 2, 7, 13, 14, 15, 16, 17}};

Batch ragged() { return random_batch({{7, 2}, {0, 0}, {1, 0}, {12, 3}, {3, 1}}, 11, 3); }

/// Streams and gradients of a batch of which `rows` are asked for; the gradient of each row is the row of `dx`.
template <class Model>
struct Pass {
  using Scalar = typename Model::Scalar;
  Matrix<Scalar> stream, without_tape;
  calm::Gradients<Scalar> grads;

  Pass(Model& model, auto& ctx, const Batch& batch, const std::vector<Index>& rows, const Matrix<Scalar>& dx)
      : grads(model) {
    calm::TokenBatch tokens = batch.view();
    tokens.rows = rows;
    ctx.arena.reset();
    typename Model::States states;
    model.prepare(ctx, tokens, states);
    without_tape = copy_of(model.forward(ctx, tokens, states, nullptr));
    typename Model::Tape tape;
    stream = copy_of(model.forward(ctx, tokens, states, &tape));
    Matrix<Scalar> d = dx;
    model.backward(ctx, tokens, states, tape, d.view(), grads);
  }
};

/// The streams of a batch with caches, and of the same tokens once more behind it.
template <class Model>
std::array<Matrix<typename Model::Scalar>, 2> advance_twice(const Model& model, auto& ctx, const Batch& batch,
                                                            const std::vector<Index>& rows) {
  std::array<Matrix<typename Model::Scalar>, 2> streams;
  ctx.arena.reset();
  auto session = model.make_session(ctx, 5, 40);
  for (std::size_t i = 0; i < 2; ++i) {
    calm::TokenBatch tokens = batch.cached();
    if (i == 1) tokens.prompt_lengths = {};
    tokens.rows = rows;
    streams[i] = copy_of(model.advance(ctx, session, tokens, calm::NullObserver{}));
  }
  return streams;
}

template <class Scalar>
MatrixView<const Scalar> as_row(std::span<const Scalar> values) {
  return {values.data(), 1, static_cast<Index>(values.size())};
}

template <class Scalar>
bool same_bits(std::span<const Scalar> a, std::span<const Scalar> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

/// `OnlyCpu`: for a model that is bound to the type of its context.
template <bool OnlyCpu = false, class M>
void check(M&& model) {
  using Model = std::remove_reference_t<M>;
  using S = typename Model::Scalar;
  const Batch batch = ragged();
  const Index width = model.spec().width;
  for (const auto& rows : choices) {
    CAPTURE(rows[0]);
    const auto count = static_cast<Index>(rows.size());
    const Matrix<S> some = random_matrix<S>(count, width, 5);
    Matrix<S> all(23, width);  // zero but in the rows that are asked for
    for (Index i = 0; i < count; ++i) std::copy_n(&some(i, 0), width, &all(rows[static_cast<std::size_t>(i)], 0));
    const auto compare = [&](auto& ctx, bool gradients = true) {
      const Pass<Model> whole(model, ctx, batch, {}, all), chosen(model, ctx, batch, rows, some);
      REQUIRE(chosen.stream.rows() == count);
      for (Index i = 0; i < count; ++i)
        for (Index j = 0; j < width; ++j) {
          CHECK(chosen.stream(i, j) == whole.stream(rows[static_cast<std::size_t>(i)], j));
          CHECK(chosen.without_tape(i, j) == chosen.stream(i, j));
        }
      const auto whole_cached = advance_twice(model, ctx, batch, {});
      const auto chosen_cached = advance_twice(model, ctx, batch, rows);
      for (std::size_t n = 0; n < 2; ++n) {
        REQUIRE(chosen_cached[n].rows() == count);
        for (Index i = 0; i < count; ++i)
          for (Index j = 0; j < width; ++j)
            CHECK(chosen_cached[n](i, j) == whole_cached[n](rows[static_cast<std::size_t>(i)], j));
      }
      if (gradients) CHECK(same_bits<S>(whole.grads.values(), chosen.grads.values()));
      else CHECK(relative_difference(as_row<S>(chosen.grads.values()), as_row<S>(whole.grads.values())) < 1e-5);
      CHECK(std::any_of(whole.grads.values().begin(), whole.grads.values().end(), [](S g) { return g != 0; }));
    };
    Cpu one(1), three(3);
    compare(one);
    compare(three);
    if constexpr (std::is_same_v<S, float>) {
      for (const auto products : {calm::stored_products, calm::interleaved_products}) {
        Cpu other(2, products);
        compare(other);
      }
      Cpu bf16(2, calm::bf16_products);
      compare(bf16, false);  // adds the gradients of two rows at a time, and their pairs are others
    }
    if constexpr (!OnlyCpu) {
      calm::Context<calm::ReferenceBackend> reference(1);
      compare(reference);
    }
  }
}

calm::ModelSpec spec_of(Index width, Index blocks) {
  return {.vocabulary = 11, .width = width, .hidden = 10, .blocks = blocks, .heads = {2, 1, 4}, .context = 40};
}

template <class Scalar>
using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, Scalar>;
template <class Scalar>
using Composed = calm::ComposedModel<Llama<Scalar>, Llama<Scalar>>;

template <class Scalar>
Composed<Scalar> composed(const calm::Links& links, const calm::BridgeOptions& options = {}) {
  Composed<Scalar> model(std::make_shared<const Llama<Scalar>>(spec_of(8, 3), TestWeights{1}),
                         {std::make_shared<const Llama<Scalar>>(spec_of(6, 2), TestWeights{2})}, links, options,
                         {std::make_shared<UnevenAligner>(11)});
  randomise(model, 4);
  return model;
}

}  // namespace

TEST_CASE("some rows of the final stream have the bits that they have among all, in every shape of block") {
  const auto trainable = [](auto architecture, calm::ModelSpec spec) {
    CAPTURE(std::string(decltype(architecture)::model_type));
    check(calm::Transformer<decltype(architecture), calm::Trainable, double>(spec, TestWeights{1}));
  };
  trainable(calm::zoo::Llama{}, spec_of(6, 2));
  trainable(calm::zoo::Llama{}, spec_of(6, 1));
  trainable(calm::zoo::Olmo2{}, spec_of(6, 2));  // norms behind the branches, and over all heads of a query
  trainable(calm::zoo::Gpt2{}, spec_of(6, 2));   // biases, learned positions
  calm::ModelSpec spec = spec_of(6, 2);
  spec.rotary_width = 2;
  trainable(calm::zoo::GptNeoX{}, spec);  // attention and MLP from one stream
  spec = spec_of(6, 2);
  spec.query_scale = 1.5;
  spec.window = 2;
  spec.window_rotary_base = 100;
  for (const bool last : {false, true}) {
    spec.windowed = {!last, last};
    trainable(calm::zoo::Qwen3{}, spec);
  }
  calm::Transformer<calm::zoo::Llama, calm::Lora, float> adapted(
      spec_of(6, 2), calm::LoraWeights<TestWeights>{TestWeights{1}, 2, 0.7, 5});
  randomise(adapted, 3);
  check(adapted);
}

TEST_CASE("so they have where links write after the last block, after others, or after both") {
  for (const calm::Links& links :
       {calm::Links{{0, 0, 1}, {0, 1, 2}}, {{0, 1, 2}}, {{0, 0, 0}, {0, 1, 1}}, {{0, 0, 2}, {0, 1, 2}}}) {
    check(composed<double>(links));
    check(composed<float>(links, {.gate = calm::Gate::tanh, .rotary = true, .rank = 2}));
    check(composed<double>(links, calm::preset::paper()));
  }
  using Gemma = calm::Transformer<calm::zoo::Gemma3, calm::Frozen, double>;  // norms before and behind the branches
  calm::ModelSpec spec = spec_of(8, 3);
  spec.window = 2;
  spec.window_rotary_base = 100;
  spec.windowed = {true, false, true};
  calm::ComposedModel<Gemma, Llama<double>> model(
      std::make_shared<const Gemma>(spec, TestWeights{1}),
      {std::make_shared<const Llama<double>>(spec_of(6, 2), TestWeights{2})}, {{0, 0, 0}, {0, 1, 1}});
  randomise(model, 4);
  check(model);

  using Any = calm::AnyAugments<Cpu>;
  calm::ComposedModel<Llama<float>, Any> any(std::make_shared<const Llama<float>>(spec_of(8, 3), TestWeights{1}),
                                             {std::make_shared<const calm::AnyAugment<Cpu>>(
                                                 std::make_shared<const Llama<float>>(spec_of(6, 2), TestWeights{2}))},
                                             {{0, 0, 1}, {0, 1, 2}});
  randomise(any, 4);
  check<true>(any);
}

TEST_CASE("states that were prepared for some rows serve others, and rows that are not there are refused") {
  for (const calm::Links& links : {calm::Links{{0, 1, 2}}, {{0, 0, 0}, {0, 1, 2}}}) {
    const auto model = composed<double>(links);
    const Batch batch = ragged();
    Cpu ctx(1);
    Composed<double>::States states, all;
    const std::vector<Index> some{5}, others{3, 22};
    calm::TokenBatch tokens = batch.view();
    model.prepare(ctx, tokens, all);
    const Matrix<double> whole = copy_of(model.forward(ctx, tokens, all, nullptr));
    tokens.rows = some;
    model.prepare(ctx, tokens, states);
    tokens.rows = others;
    const Matrix<double> stream = copy_of(model.forward(ctx, tokens, states, nullptr));
    REQUIRE(stream.rows() == 2);
    for (Index j = 0; j < 8; ++j) CHECK((stream(0, j) == whole(3, j) && stream(1, j) == whole(22, j)));
    for (const Index wrong : {Index{-100000000}, Index{23}, Index{100000000}}) {
      const std::vector<Index> far{wrong};
      tokens.rows = far;
      CHECK(contains(message_of<calm::ShapeError>([&] { model.forward(ctx, tokens, all, nullptr); }), "row 0"));
      CHECK(contains(message_of<calm::ShapeError>([&] { model.prepare(ctx, tokens, states); }), "row 0"));
    }
  }
}

TEST_CASE("so they have in a composition whose anchor or augment is one") {
  using Inner = Composed<double>;
  const auto inner = std::make_shared<const Inner>(composed<double>({{0, 0, 1}, {0, 1, 2}}));
  const auto plain = std::make_shared<const Llama<double>>(spec_of(6, 2), TestWeights{7});
  calm::ComposedModel<Inner, Llama<double>> outer(inner, {plain}, {{0, 0, 0}, {0, 1, 2}});
  randomise(outer, 5);
  check(outer);
  calm::ComposedModel<Llama<double>, Inner> around(plain, {inner}, {{0, 1, 0}, {0, 2, 1}});
  randomise(around, 6);
  check(around);
}

}  // namespace chosen_rows_test
