// Compositions in double: gradients by finite differences, links that meet in one block, compositions of compositions.
#include <doctest/doctest.h>
#include <calm/backend/reference.hpp>
#include <calm/train/gradient_check.hpp>
#include <support/models.hpp>

namespace compose_gradient_test {
using namespace calm_test;
using calm::BridgeOptions;
using calm::Links;

namespace {

using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, double>;
using Plain = calm::Transformer<PlainArchitecture, calm::Frozen, double>;
using Two = calm::ComposedModel<Llama, Llama, Plain>;
using Inner = calm::ComposedModel<Llama, Llama>;
using Outer = calm::ComposedModel<Inner, Plain>;          // an anchor that is a composition
using Around = calm::ComposedModel<Llama, Inner, Llama>;  // an augment that is a composition

static_assert(calm::Decoder<Llama, Cpu>);
static_assert(calm::Decoder<Inner, Cpu>);
static_assert(calm::Decoder<Outer, Cpu>);
static_assert(calm::Decoder<Around, Cpu>);
static_assert(calm::Decoder<Around, calm::Context<calm::ReferenceBackend>>);

std::shared_ptr<const Llama> make_anchor() {
  return std::make_shared<const Llama>(
      calm::ModelSpec{.vocabulary = 11, .width = 8, .hidden = 10, .blocks = 3, .heads = {2, 1, 4}, .context = 40},
      TestWeights{1});
}
std::shared_ptr<const Llama> make_augment() {
  return std::make_shared<const Llama>(
      calm::ModelSpec{.vocabulary = 11, .width = 6, .hidden = 7, .blocks = 2, .heads = {1, 1, 6}, .context = 80},
      TestWeights{2});
}
std::shared_ptr<const Plain> make_plain() {
  return std::make_shared<const Plain>(
      calm::ModelSpec{.vocabulary = 11, .width = 10, .hidden = 9, .blocks = 2, .heads = {2, 2, 4}, .context = 80},
      TestWeights{3});
}

const Links many_links = {{0, 0, 0}, {0, 1, 1}, {1, 1, 1}, {0, 1, 2}, {1, 0, 2}};

std::vector<std::shared_ptr<const calm::Aligner>> uneven() {
  return {std::make_shared<UnevenAligner>(11), std::make_shared<UnevenAligner>(10)};
}

Batch small_batch() { return random_batch({{5, 2}, {1, 0}, {0, 0}, {4, 0}}, 11, 3); }

template <class Backend, class Model>
void check_gradients(Model& model, const Batch& batch = small_batch()) {
  calm::Context<Backend> ctx(1);
  calm::Gradients<double> grads(model);
  typename Model::States states;
  model.prepare(ctx, batch.view(), states);
  prepared_loss(model, ctx, batch, states, grads);
  const auto result = calm::check_parameter_gradients(
      model, grads, [&] { return prepared_loss(model, ctx, batch, states); }, {.values = 24});
  INFO(calm::to_string(result));
  CHECK(result.checked > 0);
  CHECK(result.worst_error < 1e-6);
}

template <class Model>
Matrix<double> stream_of(const Model& model, const Batch& batch) {
  Cpu ctx(1);
  typename Model::States states;
  model.prepare(ctx, batch.view(), states);
  return copy_of(model.forward(ctx, batch.view(), states, nullptr));
}

Inner make_inner(const Links& links = {{0, 0, 1}, {0, 1, 2}}) {
  Inner inner(make_anchor(), {make_augment()}, links);
  randomise(inner, 21);
  return inner;
}

template <class Model>
void check_caches_against_forward(const Model& model) {
  Cpu ctx(2);
  const auto ids = random_tokens(20, 11, 5);
  Batch batch;
  batch.add(ids, 6);
  const auto expected = forward_logits(model, ctx, batch);
  for (const auto& pieces : {std::vector<Index>{1}, {3, 5}, {14}}) {
    auto session = model.make_session(ctx, 2, 20);
    CHECK(relative_difference(cached_logits(model, ctx, session, 1, ids, 6, pieces), expected) < 1e-10);
  }
}

}  // namespace

TEST_CASE("the gradients of a whole composed model agree with finite differences, for every kind of bridge") {
  const BridgeOptions kinds[] = {{},
                                 calm::preset::paper(),
                                 {.gate = calm::Gate::tanh},
                                 {.rotary = true},
                                 {.heads = 4, .rank = 2},
                                 {.heads = 1, .norms = false, .gate = calm::Gate::tanh, .rotary = true, .rank = 3}};
  for (const BridgeOptions& options : kinds) {
    Two model(make_anchor(), {make_augment(), make_plain()}, many_links, options);
    randomise(model, 8);
    check_gradients<calm::CpuBackend>(model);
  }
}

TEST_CASE("the gradients of a composed model agree with finite differences on the reference backend") {
  Two model(make_anchor(), {make_augment(), make_plain()}, many_links, {.gate = calm::Gate::tanh, .rotary = true});
  randomise(model, 8);
  check_gradients<calm::ReferenceBackend>(model);
}

TEST_CASE("gradients agree with finite differences where a token brings none, one or two augment tokens") {
  Two model(make_anchor(), {make_augment(), make_plain()}, many_links, {.rotary = true}, uneven());
  randomise(model, 8);
  check_gradients<calm::CpuBackend>(model, random_batch({{9, 3}, {2, 0}, {1, 1}}, 11, 6));
}

TEST_CASE("a fresh bridge has the gradient that lets it begin to learn") {
  Two model(make_anchor(), {make_augment(), make_plain()}, many_links);
  check_gradients<calm::CpuBackend>(model);
  Cpu ctx(1);
  calm::Gradients<double> grads(model);
  random_target_loss(model, ctx, small_batch(), grads);
  calm::for_each_parameter(model, [&](const std::string& name, auto& parameter) {
    double largest = 0;
    for (const double g : calm::flat(grads[parameter])) largest = std::max(largest, std::abs(g));
    CAPTURE(name);
    CHECK((largest > 0) == contains(name, "o_proj"));
  });
}

TEST_CASE("gradients of a batch are the sums of those of its parts, and are added to what was there") {
  Two model(make_anchor(), {make_augment(), make_plain()}, many_links);
  randomise(model, 8);
  Cpu ctx(1);
  calm::Gradients<double> once(model), twice(model);
  random_target_loss(model, ctx, small_batch(), once);
  random_target_loss(model, ctx, small_batch(), twice);
  random_target_loss(model, ctx, small_batch(), twice);
  for (std::size_t i = 0; i < once.values().size(); ++i)
    CHECK(twice.values()[i] == doctest::Approx(2 * once.values()[i]).epsilon(1e-12));
}

TEST_CASE("the backends agree on the logits of a composed model") {
  Two model(make_anchor(), {make_augment(), make_plain()}, many_links, {.rotary = true, .rank = 3}, uneven());
  randomise(model, 8);
  Cpu cpu(2);
  calm::Context<calm::ReferenceBackend> reference(1);
  CHECK(relative_difference(forward_logits(model, cpu, small_batch()),
                            forward_logits(model, reference, small_batch())) < 1e-12);
}

TEST_CASE("links that write after one block add up, and each reads the stream as it was before any of them") {
  const auto one_link = [](const calm::Link& link) {
    return Two(make_anchor(), {make_augment(), make_plain()}, Links{link});
  };
  const calm::Link first{0, 1, 2}, second{1, 0, 2};  // after the last block, so that nothing follows
  Two both(make_anchor(), {make_augment(), make_plain()}, {first, second});
  randomise(both, 8);
  const auto values_of = [&](Two& single, const std::string& from) {
    calm::for_each_parameter(single, [&](const std::string& name, auto& target) {
      calm::for_each_parameter(both, [&](const std::string& other, auto& source) {
        if (other == from + name.substr(7)) target.value = source.value;  // after "links.0"
      });
    });
    return stream_of(single, small_batch());
  };
  Two single_first = one_link(first), single_second = one_link(second);
  const Matrix<double> after_first = values_of(single_first, "links.0"),
                       after_second = values_of(single_second, "links.1"),
                       before = stream_of(*make_anchor(), small_batch()), found = stream_of(both, small_batch());
  Matrix<double> expected = before;
  for (Index i = 0; i < before.size(); ++i)
    expected.data()[i] =
        before.data()[i] + (after_first.data()[i] - before.data()[i]) + (after_second.data()[i] - before.data()[i]);
  CHECK(relative_difference(found, expected) < 1e-12);
  CHECK(relative_difference(after_first, before) > 1e-3);
  CHECK(relative_difference(after_second, before) > 1e-3);
}

TEST_CASE("a bridge computes the formula of the paper") {
  // One link after the last block, no norms, two heads: Y[t] = sum of softmax(q k / sqrt(width)) v over s <= t.
  Inner model(make_anchor(), {make_augment()}, {{0, 1, 2}}, {.heads = 2, .norms = false});
  randomise(model, 4);
  Batch batch;
  batch.add(random_tokens(5, 11, 2));
  Cpu ctx(1);
  calm::TappedStates<double> tapped({1});
  Llama::States none;
  MatrixView<double> a_stream = model.augment<0>().embed(ctx, batch.view());
  model.augment<0>().run(ctx, batch.view(), none, a_stream, 0, 2, nullptr, calm::LayerTap<double>(tapped));
  const auto a = tapped.after(1);
  const Matrix<double> x = stream_of(*make_anchor(), batch);
  std::vector<const Matrix<double>*> w;  // projection, q, k, v, o
  calm::for_each_parameter(model, [&](const std::string&, auto& parameter) { w.push_back(&parameter.value); });
  REQUIRE(w.size() == 5);
  const auto times = [](MatrixView<const double> m, const Matrix<double>& weight) {
    Matrix<double> y(m.rows, weight.rows());
    for (Index t = 0; t < m.rows; ++t)
      for (Index i = 0; i < weight.rows(); ++i)
        for (Index j = 0; j < m.cols; ++j) y(t, i) += m(t, j) * weight(i, j);
    return y;
  };
  const Matrix<double> p = times(a, *w[0]), q = times(x.view(), *w[1]), k = times(p.view(), *w[2]),
                       v = times(p.view(), *w[3]);
  Matrix<double> y(5, 8);
  for (Index t = 0; t < 5; ++t) {
    for (Index head = 0; head < 2; ++head) {
      double total = 0;
      for (Index s = 0; s <= t; ++s) {
        double score = 0;
        for (Index i = 4 * head; i < 4 * head + 4; ++i) score += q(t, i) * k(s, i) / 2;
        total += std::exp(score);
        for (Index i = 4 * head; i < 4 * head + 4; ++i) y(t, i) += std::exp(score) * v(s, i);
      }
      for (Index i = 4 * head; i < 4 * head + 4; ++i) y(t, i) /= total;
    }
  }
  Matrix<double> expected = times(y.view(), *w[4]);
  for (Index i = 0; i < expected.size(); ++i) expected.data()[i] += x.data()[i];
  CHECK(relative_difference(stream_of(model, batch), expected) < 1e-12);
}

// Promise 5: closure.

TEST_CASE("a composition can be the anchor of another: caches agree with the pass of training") {
  Outer model(std::make_shared<const Inner>(make_inner()), {make_plain()}, {{0, 0, 0}, {0, 1, 1}, {0, 1, 2}},
              {.rotary = true});
  randomise(model, 31);
  check_caches_against_forward(model);
}

TEST_CASE("a composition can be an augment of another: caches agree with the pass of training") {
  Around model(make_anchor(), {std::make_shared<const Inner>(make_inner()), make_augment()},
               {{0, 1, 0}, {0, 2, 2}, {1, 0, 1}}, {}, uneven());
  randomise(model, 31);
  check_caches_against_forward(model);
}

TEST_CASE("the outer bridges' gradients pass through the inner bridges") {
  // Inner links at, above and below those of the outer composition.
  for (const Links& inner_links :
       {Links{{0, 0, 1}, {0, 1, 2}}, Links{{0, 1, 0}}, Links{{0, 0, 0}, {0, 0, 1}, {0, 1, 1}}}) {
    Outer model(std::make_shared<const Inner>(make_inner(inner_links)), {make_plain()}, {{0, 0, 0}, {0, 1, 1}});
    randomise(model, 31);
    check_gradients<calm::CpuBackend>(model);
  }
}

TEST_CASE("the gradients of a model whose augment is a composition agree with finite differences") {
  Around model(make_anchor(), {std::make_shared<const Inner>(make_inner()), make_augment()},
               {{0, 1, 0}, {0, 2, 1}, {1, 0, 1}});
  randomise(model, 31);
  check_gradients<calm::CpuBackend>(model);
}

TEST_CASE("outer links read the stream after inner links") {
  // Outer and inner write after the last block: the outer bridge must see what the inner one wrote.
  const auto inner = std::make_shared<const Inner>(make_inner({{0, 1, 2}}));
  Outer model(inner, {make_plain()}, {{0, 1, 2}}, {.heads = 2, .norms = false});
  randomise(model, 31);
  calm::ComposedModel<Llama, Plain> around_anchor(make_anchor(), {make_plain()}, {{0, 1, 2}},
                                                  {.heads = 2, .norms = false});
  randomise(around_anchor, 31);  // the same bridge
  const auto with_inner = stream_of(model, small_batch()), inner_alone = stream_of(*inner, small_batch()),
             outer_alone = stream_of(around_anchor, small_batch()), neither = stream_of(*make_anchor(), small_batch());
  // Were the outer bridge to read the stream before the inner link, its contribution would be that on the bare anchor.
  double difference = 0;
  for (Index i = 0; i < neither.size(); ++i)
    difference = std::max(difference, std::abs((with_inner.data()[i] - inner_alone.data()[i]) -
                                               (outer_alone.data()[i] - neither.data()[i])));
  CHECK(difference > 1e-3);
}

TEST_CASE("fresh outer bridges give the composition inside bit for bit, and so does switching the outer augments off") {
  const auto inner = std::make_shared<const Inner>(make_inner());
  Outer model(inner, {make_plain()}, {{0, 0, 0}, {0, 1, 1}});
  Cpu ctx(1);
  const Batch batch = small_batch();
  const auto expected = forward_logits(*inner, ctx, batch);
  CHECK(same_bits(forward_logits(model, ctx, batch), expected));

  randomise(model, 31);
  Outer::States states;
  states.augments = false;
  CHECK(same_bits(forward_logits(model, ctx, batch, states), expected));
  auto session = model.make_session(ctx, 4, 10, {.augments = false});
  auto inner_session = inner->make_session(ctx, 4, 10);
  CHECK(same_bits(advance_logits(model, ctx, session, batch), advance_logits(*inner, ctx, inner_session, batch)));
}

}  // namespace compose_gradient_test
