// Products in bf16 (bf16_products): their error against f32, and the promises that hold in f32.
#include <doctest/doctest.h>
#include <calm/backend/cpu_bf16.hpp>
#include <calm/tensor/half.hpp>
#include <support/models.hpp>

namespace bf16_test {
using namespace calm_test;

namespace {

Matrix<float> random_matrix(Index rows, Index cols, std::uint64_t seed) {
  Matrix<float> m(rows, cols);
  calm::Random random(seed);
  for (float& x : m.values()) x = static_cast<float>(random.normal());
  return m;
}

calm::MatrixView<const float> view(const Matrix<float>& m) { return m.view(); }

/// y, dx and dw of one linear map, with a frozen and with a trained weight.
struct Products {
  Matrix<float> y, y_trained, dx, dx_trained, dw;

  Products(Cpu& ctx, const Matrix<float>& w, const Matrix<float>& x, const Matrix<float>& dy)
      : y(x.rows(), w.rows()), y_trained(y), dx(x.rows(), w.cols()), dx_trained(dx), dw(w.rows(), w.cols()) {
    const auto stored = calm::StoredMatrix::from(w);
    const auto frozen = ctx.backend.packed<float>(stored);
    ctx.backend.multiply(frozen, view(x), y.view(), calm::Assign{});
    ctx.backend.multiply(view(w), view(x), y_trained.view(), calm::Assign{});
    ctx.backend.multiply_input_gradient(frozen, view(dy), dx.view(), calm::Assign{});
    ctx.backend.multiply_input_gradient(view(w), view(dy), dx_trained.view(), calm::Assign{});
    ctx.backend.multiply_weight_gradient(view(dy), view(x), dw.view());
  }
  std::vector<const Matrix<float>*> all() const { return {&y, &y_trained, &dx, &dx_trained, &dw}; }
};

template <class S>
using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, S>;
template <class S>
using Composed = calm::ComposedModel<Llama<S>, Llama<S>, Llama<S>>;

/// Products of several tiles and of ragged ends; the second augment has a tokenizer of its own.
template <class S>
Composed<S> make_composed(const calm::BridgeOptions& options = {}) {
  const auto model_of = [](Index width, Index hidden, Index heads, std::uint64_t seed) {
    const calm::ModelSpec spec{.vocabulary = 83,
                               .width = width,
                               .hidden = hidden,
                               .blocks = 3,
                               .heads = {heads, heads, width / heads},
                               .context = 400};
    return std::make_shared<const Llama<S>>(spec, TestWeights{seed, calm::DType::f32});
  };
  Composed<S> model(model_of(72, 150, 3, 1), {model_of(40, 70, 2, 2), model_of(28, 50, 2, 3)},
                    {{0, 0, 0}, {0, 2, 1}, {1, 1, 2}}, options,
                    {std::make_shared<calm::IdentityAligner>(), std::make_shared<UnevenAligner>(83)});
  randomise(model, 4);
  return model;
}

/// The loss of a batch, then the gradients of all bridges.
template <class S>
Matrix<S> loss_and_gradients(Cpu& ctx, Composed<S>& model, const Batch& batch) {
  calm::Gradients<S> grads(model);
  const double loss = random_target_loss(model, ctx, batch, grads);
  Matrix<S> all(1, static_cast<Index>(grads.values().size()) + 1);
  all(0, 0) = static_cast<S>(loss);
  std::copy(grads.values().begin(), grads.values().end(), all.data() + 1);
  return all;
}

double largest(const Matrix<float>& m) {
  double most = 0;
  for (const float x : m.values()) most = std::max(most, std::abs(static_cast<double>(x)));
  return most;
}

}  // namespace

TEST_CASE("products in bf16 differ from those in f32 by the rounding of what is multiplied, and not by nothing") {
  Cpu f32(1), bf16(1, calm::bf16_products);
  for (const auto& [tokens, out, in] : {std::tuple<Index, Index, Index>{7, 33, 19}, {130, 64, 300}, {1, 96, 96}}) {
    const auto w = random_matrix(out, in, 1), x = random_matrix(tokens, in, 2), dy = random_matrix(tokens, out, 3);
    const Products exact(f32, w, x, dy), rounded(bf16, w, x, dy);
    for (std::size_t i = 0; i < 5; ++i) {
      const Matrix<float>&a = *exact.all()[i], &b = *rounded.all()[i];
      double error = 0;
      for (Index k = 0; k < a.size(); ++k)
        error = std::max(error, std::abs(static_cast<double>(a.data()[k] - b.data()[k])));
      CHECK(error < 0.01 * largest(a));  // 2^-8 each for two operands, at random
      CHECK(error > 0);
    }
  }
}

TEST_CASE("products in bf16 are those of operands that were rounded before, to the precision of f32 sums") {
  Cpu f32(1), bf16(1, calm::bf16_products);
  auto w = random_matrix(45, 77, 4), x = random_matrix(21, 77, 5), dy = random_matrix(21, 45, 6);
  for (auto* m : {&w, &x, &dy})
    for (float& value : m->values()) value = calm::to_float(calm::to_bf16(value));
  const Products exact(f32, w, x, dy), rounded(bf16, w, x, dy);
  for (std::size_t i = 0; i < 5; ++i) {
    const Matrix<float>&a = *exact.all()[i], &b = *rounded.all()[i];
    for (Index k = 0; k < a.size(); ++k) CHECK(std::abs(a.data()[k] - b.data()[k]) < 2e-6 * largest(a));
  }
}

TEST_CASE("in bf16 the bits of a row depend neither on threads nor on the rows around it") {
  const auto w = random_matrix(70, 90, 7), x = random_matrix(150, 90, 8), dy = random_matrix(150, 70, 9);
  Cpu one(1, calm::bf16_products);
  const Products expected(one, w, x, dy);
  for (const int threads : {2, 3, 4}) {
    Cpu ctx(threads, calm::bf16_products);
    const Products found(ctx, w, x, dy);
    for (std::size_t i = 0; i < 5; ++i)
      CHECK(std::equal(found.all()[i]->values().begin(), found.all()[i]->values().end(),
                       expected.all()[i]->values().begin()));
  }
  const auto stored = calm::StoredMatrix::from(w);
  for (const Index row : {0, 77, 149}) {
    Matrix<float> y(1, 70), dx(1, 90);
    const auto check = [&](const auto& weight, const Matrix<float>& all_y, const Matrix<float>& all_dx) {
      one.backend.multiply(weight, view(x).middle_rows(row, 1), y.view(), calm::Assign{});
      one.backend.multiply_input_gradient(weight, view(dy).middle_rows(row, 1), dx.view(), calm::Assign{});
      CHECK(same_bits(view(y), view(all_y).middle_rows(row, 1)));
      CHECK(same_bits(view(dx), view(all_dx).middle_rows(row, 1)));
    };
    check(one.backend.packed<float>(stored), expected.y, expected.dx);
    check(view(w), expected.y_trained, expected.dx_trained);
  }
}

TEST_CASE("in bf16 a composed model is causal, bit for bit") {
  const auto model = make_composed<float>();
  Cpu ctx(2, calm::bf16_products);
  const Index prompt = 5;
  Batch batch;
  batch.add(random_tokens(70, 83, 1), prompt);
  const auto before = forward_logits(model, ctx, batch);
  auto session = model.make_session(ctx, 1, 70);
  const auto cached = cached_logits(model, ctx, session, 0, batch.ids, prompt, {7, 1, 2});
  for (const Index t : {prompt, Index{6}, Index{33}, Index{69}}) {
    for (const int step : {1, 2}) {  // the aligner's number of tokens changes with the token
      CAPTURE(t);
      Batch changed = batch;
      auto& id = changed.ids[static_cast<std::size_t>(t)];
      id = static_cast<TokenId>((id + step) % 83);
      session.clear(0);
      for (const auto& [one, other] :
           {std::pair{before, forward_logits(model, ctx, changed)},
            std::pair{cached, cached_logits(model, ctx, session, 0, changed.ids, prompt, {7, 1, 2})}}) {
        CHECK(same_bits(view(one).middle_rows(0, t), view(other).middle_rows(0, t)));
        CHECK(!same_bits(view(one).middle_rows(t, 1), view(other).middle_rows(t, 1)));
      }
    }
  }
}

TEST_CASE("in bf16 the loss and the gradients of a composed model have the same bits for any number of threads") {
  auto model = make_composed<float>({.gate = calm::Gate::tanh, .rotary = true, .rank = 7});
  const Batch batch = random_batch({{70, 20}, {1, 0}, {90, 10}}, 83, 5);
  Cpu one(1, calm::bf16_products);
  const auto expected = loss_and_gradients(one, model, batch);
  for (const int threads : {2, 3, 4}) {
    Cpu ctx(threads, calm::bf16_products);
    CHECK(same_bits(loss_and_gradients(ctx, model, batch), expected));
  }
}

TEST_CASE(
    "in bf16 the gradients of a composed model differ from those in f32 by at most three percent of their length") {
  const Batch batch = random_batch({{70, 20}, {40, 0}, {90, 10}}, 83, 5);
  for (const calm::BridgeOptions& options :
       {calm::BridgeOptions{}, {.gate = calm::Gate::tanh, .rotary = true, .rank = 7}}) {
    auto model = make_composed<float>(options);
    Cpu f32(2), bf16(2, calm::bf16_products);
    calm::Gradients<float> exact(model), rounded(model);
    const double loss = random_target_loss(model, f32, batch, exact);
    CHECK(random_target_loss(model, bf16, batch, rounded) == doctest::Approx(loss).epsilon(0.002));
    calm::for_each_parameter(model, [&](const std::string& name, const auto& parameter) {
      CAPTURE(name);
      const auto a = calm::flat(exact[parameter]), b = calm::flat(rounded[parameter]);
      double difference = 0, length = 0;
      for (std::size_t i = 0; i < a.size(); ++i) {
        difference += std::pow(static_cast<double>(a[i] - b[i]), 2);
        length += std::pow(static_cast<double>(a[i]), 2);
      }
      CHECK(std::sqrt(difference / length) < 0.03);
      CHECK(difference > 0);
    });
  }
}

TEST_CASE("a composed model in double is never rounded") {
  auto model = make_composed<double>({.gate = calm::Gate::tanh});
  Cpu exact(2), bf16(2, calm::bf16_products);
  const Batch batch = random_batch({{70, 20}, {9, 4}}, 83, 5);
  CHECK(same_bits(forward_logits(model, bf16, batch), forward_logits(model, exact, batch)));
  CHECK(same_bits(loss_and_gradients(bf16, model, batch), loss_and_gradients(exact, model, batch)));
  auto session = model.make_session(bf16, 2, 70), other = model.make_session(exact, 2, 70);
  CHECK(same_bits(advance_logits(model, bf16, session, batch), advance_logits(model, exact, other, batch)));
}

}  // namespace bf16_test
