// The promises of a composition, in f32. Gradients and closure, in double: compose_gradient_test.cpp.
#include <doctest/doctest.h>
#include <calm/compose/any_augment.hpp>
#include <support/models.hpp>

#include <optional>

namespace compose_test {
using namespace calm_test;
using calm::BridgeOptions;
using calm::Links;
using calm::ModelSpec;

namespace {

using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, float>;
using Plain = calm::Transformer<PlainArchitecture, calm::Frozen, float>;
using Composed = calm::ComposedModel<Llama, Llama, Plain>;

ModelSpec anchor_spec() {
  return {.vocabulary = 31, .width = 32, .hidden = 48, .blocks = 4, .heads = {4, 2, 8}, .context = 200};
}
ModelSpec augment_spec() {
  return {.vocabulary = 31, .width = 24, .hidden = 40, .blocks = 3, .heads = {3, 3, 8}, .context = 401};
}
ModelSpec plain_spec() {
  return {.vocabulary = 31, .width = 40, .hidden = 32, .blocks = 2, .heads = {2, 1, 20}, .context = 401};
}

std::shared_ptr<const Llama> make_anchor(calm::DType dtype = calm::DType::f32) {
  return std::make_shared<const Llama>(anchor_spec(), TestWeights{1, dtype});
}
std::shared_ptr<const Llama> make_augment() {
  return std::make_shared<const Llama>(augment_spec(), TestWeights{2, calm::DType::f32});
}
std::shared_ptr<const Plain> make_plain() {
  return std::make_shared<const Plain>(plain_spec(), TestWeights{3, calm::DType::f32});
}

/// Several links into one block, one tap that feeds several, from both augments.
const Links many_links = {{0, 0, 1}, {0, 2, 1}, {1, 1, 1}, {0, 2, 3}, {1, 0, 2}};

std::vector<std::shared_ptr<const calm::Aligner>> aligners(bool uneven) {
  if (!uneven) return {};
  return {std::make_shared<UnevenAligner>(31), std::make_shared<UnevenAligner>(29)};
}

Composed make_composed(const BridgeOptions& options = {}, bool uneven = false, const Links& links = many_links) {
  return {make_anchor(), {make_augment(), make_plain()}, links, options, aligners(uneven)};
}

Composed make_trained(const BridgeOptions& options = {}, bool uneven = false) {
  Composed model = make_composed(options, uneven);
  randomise(model, 9);
  return model;
}

/// A mixture of lengths, one of them over a tile of queries, and prompts of all, some and none of the tokens.
Batch mixed_batch(std::uint64_t seed = 5) {
  return random_batch({{70, 20}, {1, 0}, {13, 13}, {0, 0}, {9, 4}}, 31, seed);
}

std::vector<BridgeOptions> all_options() {
  return {{}, calm::preset::paper(), {.gate = calm::Gate::tanh}, {.rotary = true}, {.heads = 2, .rank = 5}};
}

/// Every value's bits of a pass forward and backward.
Matrix<float> gradient_bits(Composed& model, int threads, const Batch& batch) {
  Cpu ctx(threads);
  calm::Gradients<float> grads(model);
  const double loss = random_target_loss(model, ctx, batch, grads);
  Matrix<float> all(1, static_cast<Index>(grads.values().size()) + 1);
  std::copy(grads.values().begin(), grads.values().end(), all.data());
  all(0, all.cols() - 1) = static_cast<float>(loss);
  return all;
}

}  // namespace

// Promise 1: causal by construction.

TEST_CASE("changing a token leaves every logit before it bitwise as it was") {
  for (const bool uneven : {false, true}) {
    CAPTURE(uneven);
    const Composed model = make_trained({}, uneven);
    Cpu ctx(2);
    const Index prompt = 5;
    Batch batch;
    batch.add(random_tokens(70, 31, 1), prompt);
    const auto before = forward_logits(model, ctx, batch);
    for (const Index t : {prompt, Index{6}, Index{33}, Index{63}, Index{64}, Index{69}}) {
      for (const int step : {1, 2}) {  // the aligner's number of tokens changes with the token
        CAPTURE(t);
        Batch changed = batch;
        auto& id = changed.ids[static_cast<std::size_t>(t)];
        id = static_cast<TokenId>((id + step) % 31);
        const auto after = forward_logits(model, ctx, changed);
        CHECK(same_bits(constant(before).middle_rows(0, t), constant(after).middle_rows(0, t)));
        CHECK(!same_bits(constant(before).middle_rows(t, 1), constant(after).middle_rows(t, 1)));
      }
    }
  }
}

TEST_CASE("nor does a last token that brings an augment as many tokens as make folding pay change a bit before it") {
  const ModelSpec spec{.vocabulary = 31, .width = 16, .hidden = 32, .blocks = 2, .heads = {2, 2, 8}};
  const auto anchor = std::make_shared<const Llama>(spec, TestWeights{1, calm::DType::f32});
  const auto augment = std::make_shared<const Llama>(spec, TestWeights{2, calm::DType::f32});
  calm::ComposedModel<Llama, Llama> model(anchor, {augment}, calm::links::evenly_spaced(2), {},
                                          {std::make_shared<UnevenAligner>(31)});
  randomise(model, 3);
  REQUIRE(calm::folding_pays(16, 16, 0, 40));
  REQUIRE(!calm::folding_pays(16, 16, 0, 25));
  Cpu ctx(1);
  for (Index n = 25; n < 40; ++n) {  // one of these lengths lies on the border
    CAPTURE(n);
    const auto logits_ending_in = [&](TokenId last) {
      Batch batch;
      batch.add(random_tokens(n, 31, static_cast<std::uint64_t>(n)), 2);
      batch.ids.back() = last;
      return forward_logits(model, ctx, batch);
    };
    const auto without = logits_ending_in(3), with_two = logits_ending_in(5);
    CHECK(same_bits(constant(without).middle_rows(0, n - 1), constant(with_two).middle_rows(0, n - 1)));
  }
}

TEST_CASE("changing a token leaves every cached logit before it bitwise as it was") {
  for (const bool uneven : {false, true}) {
    CAPTURE(uneven);
    const Composed model = make_trained({.rotary = true}, uneven);
    Cpu ctx(1);
    const Index prompt = 5;
    const auto ids = random_tokens(40, 31, 1);
    auto session = model.make_session(ctx, 1, 40);
    const std::vector<Index> pieces = {7, 1, 2};
    const auto before = cached_logits(model, ctx, session, 0, ids, prompt, pieces);
    for (const Index t : {prompt, Index{6}, Index{11}, Index{12}, Index{39}}) {
      CAPTURE(t);
      auto changed = ids;
      auto& id = changed[static_cast<std::size_t>(t)];
      id = static_cast<TokenId>((id + 1) % 31);
      session.clear(0);
      const auto after = cached_logits(model, ctx, session, 0, changed, prompt, pieces);
      CHECK(same_bits(constant(before).middle_rows(0, t), constant(after).middle_rows(0, t)));
      CHECK(!same_bits(constant(before).middle_rows(t, 1), constant(after).middle_rows(t, 1)));
    }
  }
}

TEST_CASE("what an augment has not yet been shown does not reach the anchor") {
  // The augment alone changes: token 20 of the anchor is another, but the anchor reads it nowhere before position 20;
  // and a link that writes after the last block feeds nothing but its own position.
  const Composed model(make_anchor(), {make_augment(), make_plain()}, {{0, 2, 3}, {1, 1, 3}});
  Composed trained = model;
  randomise(trained, 4);
  Cpu ctx(1);
  Batch batch;
  batch.add(random_tokens(30, 31, 2));
  const auto before = forward_logits(trained, ctx, batch);
  batch.ids[20] = static_cast<TokenId>((batch.ids[20] + 1) % 31);
  const auto after = forward_logits(trained, ctx, batch);
  CHECK(same_bits(constant(before).middle_rows(0, 20), constant(after).middle_rows(0, 20)));
  for (Index t = 20; t < 30; ++t)
    CHECK(!same_bits(constant(before).middle_rows(t, 1), constant(after).middle_rows(t, 1)));
}

TEST_CASE("a sequence does not see its neighbours in the batch") {
  const Composed model = make_trained();
  Cpu ctx(2);
  Batch batch = mixed_batch();
  const auto before = forward_logits(model, ctx, batch);
  for (std::size_t i = 0; i < 70; ++i) batch.ids[i] = static_cast<TokenId>((batch.ids[i] + 1) % 31);
  const auto after = forward_logits(model, ctx, batch);
  const Index others = before.rows() - 70;
  CHECK(same_bits(constant(before).middle_rows(70, others), constant(after).middle_rows(70, others)));
}

// Promise 2: identity at the start.

TEST_CASE("bridges that were never trained leave the anchor's logits as they are, bit for bit") {
  for (const BridgeOptions& options : {BridgeOptions{}, {.gate = calm::Gate::tanh}, {.rotary = true, .rank = 3}}) {
    for (const bool uneven : {false, true}) {
      const Composed model = make_composed(options, uneven);
      Cpu ctx(2);
      const Batch batch = mixed_batch();
      CHECK(same_bits(forward_logits(model, ctx, batch), forward_logits(model.anchor(), ctx, batch)));

      auto session = model.make_session(ctx, 5, 70);
      auto alone = model.anchor().make_session(ctx, 5, 70);
      CHECK(same_bits(advance_logits(model, ctx, session, batch), advance_logits(model.anchor(), ctx, alone, batch)));
      Batch next;
      for (const Index slot : {4, 1, 2}) next.add({7, 8}, 0, slot);
      CHECK(same_bits(advance_logits(model, ctx, session, next), advance_logits(model.anchor(), ctx, alone, next)));
    }
  }
}

TEST_CASE("the paper's preset does not start as the anchor, nor does a trained bridge") {
  Cpu ctx(1);
  const Batch batch = mixed_batch();
  for (const Composed& model : {make_composed(calm::preset::paper()), make_trained()})
    CHECK(!same_bits(forward_logits(model, ctx, batch), forward_logits(model.anchor(), ctx, batch)));
}

TEST_CASE("a composed model whose augments are switched off is its anchor, bit for bit, whatever its bridges hold") {
  for (const BridgeOptions& options : all_options()) {
    const Composed model = make_trained(options);
    Cpu ctx(2);
    const Batch batch = mixed_batch();
    Composed::States states;
    states.augments = false;
    CHECK(same_bits(forward_logits(model, ctx, batch, states), forward_logits(model.anchor(), ctx, batch)));

    auto session = model.make_session(ctx, 5, 70, {.augments = false});
    auto alone = model.anchor().make_session(ctx, 5, 70);
    CHECK(same_bits(advance_logits(model, ctx, session, batch), advance_logits(model.anchor(), ctx, alone, batch)));
    CHECK(session.length(0) == 70);
    session.clear(0);
    CHECK(session.length(0) == 0);
  }
}

TEST_CASE("links that are disabled one by one write nothing, and all of them disabled is the anchor") {
  const Composed model = make_trained();
  Cpu ctx(1);
  const Batch batch = mixed_batch();
  const auto all = forward_logits(model, ctx, batch);
  for (std::size_t k = 0; k < model.links().size(); ++k) {
    Composed::States states;
    states.disabled.assign(model.links().size(), false);
    states.disabled[k] = true;
    CHECK(relative_difference(forward_logits(model, ctx, batch, states), all) > 1e-4);
  }
  Composed::States states;
  states.disabled.assign(model.links().size(), true);
  CHECK(same_bits(forward_logits(model, ctx, batch, states), forward_logits(model.anchor(), ctx, batch)));
}

// Promise 3: frozen means frozen.

TEST_CASE("a frozen weight is packed once for each product, by the first that needs it, and only if it is multiplied") {
  const Batch batch = mixed_batch();
  for (const auto dtype : {calm::DType::f32, calm::DType::bf16}) {
    const auto anchor = make_anchor(dtype);
    const auto packed_bytes = [&] {
      std::vector<std::size_t> bytes;
      calm::for_each_weight(*anchor, [&](const std::string& name, const calm::StoredMatrix& w) {
        bytes.push_back(w.packed_bytes());
        const bool multiplied = !contains(name, "norm") && !contains(name, "embed");
        // One form for each of the two products, in f32, perhaps with a ragged edge filled up.
        const Index padded = (w.rows() + 64) * (w.cols() + 64);
        CHECK(bytes.back() <= (multiplied ? 2 * 4 * static_cast<std::size_t>(padded) : 0));
      });
      return bytes;
    };
    CHECK(packed_bytes() == std::vector<std::size_t>(packed_bytes().size(), 0));
    std::vector<std::size_t> first;
    for (int i = 0; i < 2; ++i) {  // the second composition stands on the same anchor
      Composed model(anchor, {make_augment(), make_plain()}, many_links);
      Cpu ctx(2);
      calm::Gradients<float> grads(model);
      for (int pass = 0; pass < 3; ++pass) {
        random_target_loss(model, ctx, batch, grads);
        auto session = model.make_session(ctx, 5, 70);
        advance_logits(model, ctx, session, batch);
        if (first.empty()) first = packed_bytes();
        CHECK(packed_bytes() == first);
      }
    }
    if (dtype == calm::DType::bf16) CHECK(*std::max_element(first.begin(), first.end()) > 0);
  }
}

TEST_CASE("an augment runs up to its highest tap and has no output head") {
  const auto nan_above = [](const std::string& name, Index rows, Index cols) {
    const bool unused = contains(name, "layers.2") || contains(name, "lm_head") || name == "model.norm.weight";
    return unused ? calm::StoredMatrix::from(poisoned<float>(rows, cols))
                  : TestWeights{2, calm::DType::f32}(name, rows, cols);
  };
  const auto augment = std::make_shared<const Llama>(augment_spec(), nan_above);
  const Links lower = {{0, 0, 1}, {0, 1, 2}};
  calm::ComposedModel<Llama, Llama> model(make_anchor(), {augment}, lower),
      expected(make_anchor(), {make_augment()}, lower);
  randomise(model, 3);
  randomise(expected, 3);
  Cpu ctx(1);
  const Batch batch = mixed_batch();
  CHECK(same_bits(forward_logits(model, ctx, batch), forward_logits(expected, ctx, batch)));
  auto session = model.make_session(ctx, 5, 70), expected_session = expected.make_session(ctx, 5, 70);
  CHECK(same_bits(advance_logits(model, ctx, session, batch), advance_logits(expected, ctx, expected_session, batch)));
}

namespace {

/// The CPU backend, which notes the frozen weights that it multiplies by (nullptr for trainable ones).
struct NotingBackend : calm::CpuBackend {
  using CpuBackend::CpuBackend;
  std::vector<const void*> forward, backward, gradients;
  const void* frozen = nullptr;  // asked for since the last product

  template <class S>
  auto packed(const calm::StoredMatrix& weight) {
    frozen = weight.data();
    return CpuBackend::packed<S>(weight);
  }
  template <class... Arguments>
  void multiply(const Arguments&... arguments) {
    forward.push_back(std::exchange(frozen, nullptr));
    CpuBackend::multiply(arguments...);
  }
  template <class S>
  void multiply_each(MatrixView<const S> x, std::span<const calm::FrozenProduct<S>> products) {
    for (const auto& product : products) forward.push_back(product.weight->data());
    CpuBackend::multiply_each(x, products);
  }
  template <class... Arguments>
  void multiply_input_gradient(const Arguments&... arguments) {
    backward.push_back(std::exchange(frozen, nullptr));
    CpuBackend::multiply_input_gradient(arguments...);
  }
  template <class S>
  void multiply_weight_gradient(MatrixView<const S> dy, MatrixView<const S> x, MatrixView<S> dw) {
    gradients.push_back(dw.data);
    CpuBackend::multiply_weight_gradient(dy, x, dw);
  }
};

}  // namespace

TEST_CASE(
    "no pass after prepare() touches the anchor at or below the lowest link, and weight gradients are the bridges'") {
  const Links upper = {{0, 0, 2}, {1, 1, 3}};
  Composed model(make_anchor(), {make_augment(), make_plain()}, upper);
  randomise(model, 3);
  CHECK(model.lowest_write() == 2);
  calm::Context<NotingBackend> ctx(1);
  calm::Gradients<float> grads(model);
  const Batch batch = mixed_batch();
  Composed::States states;
  model.prepare(ctx, batch.view(), states);
  ctx.backend.forward.clear();

  Composed::Tape tape;
  Composed::HeadCache head;
  const auto x = model.forward(ctx, batch.view(), states, &tape);
  Matrix<float> logits(x.rows, 31), dx(x.rows, x.cols);
  model.head(ctx, MatrixView<const float>(x), logits.view(), head);
  model.head_backward(ctx, MatrixView<const float>(x), constant(logits), dx.view(), head, grads);
  model.backward(ctx, batch.view(), states, tape, dx.view(), grads);

  const auto uses = [](const std::vector<const void*>& list, const calm::StoredMatrix& w) {
    return std::count(list.begin(), list.end(), w.data());
  };
  calm::for_each_weight(model.anchor(), [&](const std::string& name, const calm::StoredMatrix& w) {
    CAPTURE(name);
    if (contains(name, "norm") || contains(name, "embed")) return;
    const int expected = contains(name, "layers.3") || contains(name, "lm_head") ? 1 : 0;
    CHECK(uses(ctx.backend.forward, w) == expected);
    CHECK(uses(ctx.backend.backward, w) == expected);
  });
  const auto no_augment = [&](const std::string& name, const calm::StoredMatrix& w) {
    CAPTURE(name);
    CHECK(uses(ctx.backend.forward, w) == 0);
    CHECK(uses(ctx.backend.backward, w) == 0);
  };
  calm::for_each_weight(model.augment<0>(), no_augment);
  calm::for_each_weight(model.augment<1>(), no_augment);
  // Projection, q, k, v and o of one bridge; q and o of the other, whose keys and values are folded: [D_B, D_A] of
  // each, and two products that take these back to the projection.
  const auto in_range = std::count_if(ctx.backend.gradients.begin(), ctx.backend.gradients.end(), [&](const void* p) {
    const auto* value = static_cast<const float*>(p);
    return value >= grads.values().data() && value < grads.values().data() + grads.values().size();
  });
  CHECK(in_range == 5 + 2);
  CHECK(ctx.backend.gradients.size() == 5 + 2 + 4);
}

namespace {

template <class M>
concept GivesWeightGradients = requires(const M& m, Cpu& ctx, MatrixView<const float> in, MatrixView<float> out,
                                        calm::Gradients<float>& grads) {
  m.backward(ctx, in, in, out, calm::Assign{}, grads);
};
template <class M>
concept ModelGivesWeightGradients = requires(const M& m, Cpu& ctx, const calm::TokenBatch& batch,
                                             const typename M::States& states, const typename M::Tape& tape,
                                             MatrixView<float> dx, calm::Gradients<float>& grads) {
  m.backward(ctx, batch, states, tape, dx, grads);
};

static_assert(!GivesWeightGradients<calm::Linear<calm::Frozen, float>>);
static_assert(GivesWeightGradients<calm::Linear<calm::Trainable, float>>);
static_assert(!ModelGivesWeightGradients<Llama>);
static_assert(ModelGivesWeightGradients<calm::Transformer<calm::zoo::Llama, calm::Trainable, float>>);
static_assert(ModelGivesWeightGradients<Composed>);

}  // namespace

TEST_CASE("the trainable values of a composed model are its bridges' and nothing else") {
  Composed model(make_anchor(), {make_augment(), make_plain()}, {{0, 0, 1}, {1, 1, 2}}, {.gate = calm::Gate::tanh});
  const Index d = 32, first = d * 24 + 4 * d * d + d + 24 + 1, second = d * 40 + 4 * d * d + d + 40 + 1;
  CHECK(calm::count_parameters(model) == first + second);
  std::vector<std::string> names;
  calm::for_each_parameter(model, [&](const std::string& name, const auto&) { names.push_back(name); });
  for (const char* name : {"links.0.projection.weight", "links.0.q_proj.weight", "links.0.k_proj.weight",
                           "links.0.v_proj.weight", "links.0.o_proj.weight", "links.0.norm_anchor.weight",
                           "links.0.norm_augment.weight", "links.0.gate", "links.1.gate"})
    CHECK(std::count(names.begin(), names.end(), name) == 1);
  CHECK(names.size() == 16);
}

// Promise 4: one answer.

TEST_CASE("prefill, decoding with caches, batches and training agree") {
  for (const BridgeOptions& options : all_options()) {
    for (const bool uneven : {false, true}) {
      CAPTURE(uneven);
      const Composed model = make_trained(options, uneven);
      Cpu ctx(2);
      const Batch batch = mixed_batch();
      const auto expected = forward_logits(model, ctx, batch);

      auto session = model.make_session(ctx, 5, 70);
      CHECK(relative_difference(advance_logits(model, ctx, session, batch), expected) < 1e-4);

      for (const std::size_t s : {0U, 2U, 4U}) {
        const Index first = batch.offsets[s], count = batch.offsets[s + 1] - first;
        const std::vector<TokenId> ids(batch.ids.begin() + first, batch.ids.begin() + first + count);
        const auto part = constant(expected).middle_rows(first, count);
        Batch single;
        single.add(ids, batch.prompts[s]);
        CHECK(relative_difference(constant(forward_logits(model, ctx, single)), part) < 1e-4);
        for (const auto& pieces : {std::vector<Index>{1}, {5, 2}, {64}}) {
          auto alone = model.make_session(ctx, 1, 70);
          const auto decoded = cached_logits(model, ctx, alone, 0, ids, batch.prompts[s], pieces);
          CHECK(relative_difference(constant(decoded), part) < 1e-4);
        }
      }
    }
  }
}

TEST_CASE("augments behind an erased interface give the bits of those whose types are known") {
  using Erased = calm::ComposedModel<Llama, calm::AnyAugments<Cpu>>;
  using Augment = calm::AnyAugment<Cpu>;
  for (const bool uneven : {false, true}) {
    const Composed typed = make_trained({}, uneven);
    Erased erased(make_anchor(),
                  {std::make_shared<const Augment>(make_augment()), std::make_shared<const Augment>(make_plain())},
                  many_links, {}, aligners(uneven));
    randomise(erased, 9);
    Cpu ctx(2);
    const Batch batch = mixed_batch();
    CHECK(same_bits(forward_logits(typed, ctx, batch), forward_logits(erased, ctx, batch)));
    auto one = typed.make_session(ctx, 5, 70);
    auto other = erased.make_session(ctx, 5, 70);
    CHECK(same_bits(advance_logits(typed, ctx, one, batch), advance_logits(erased, ctx, other, batch)));
    CHECK(one.bytes() == other.bytes());
    CHECK(contains(message_of<calm::ConfigError>([&] { Erased(make_anchor(), {}, many_links); }),
                   "at least one augment"));
  }
}

TEST_CASE("slots are decoded together as they are alone, in any order") {
  const Composed model = make_trained({.rotary = true}, true);
  Cpu ctx(2);
  auto session = model.make_session(ctx, 3, 40);
  std::vector<std::vector<TokenId>> texts;
  for (std::uint64_t s = 0; s < 3; ++s) texts.push_back(random_tokens(20 + static_cast<Index>(s), 31, 40 + s));
  std::vector<Matrix<float>> expected;
  for (const auto& ids : texts) {
    auto alone = model.make_session(ctx, 1, 40);
    expected.push_back(cached_logits(model, ctx, alone, 0, ids, 4, {1}));
  }
  Batch prompts;
  for (const Index slot : {2, 0, 1}) {
    const auto& ids = texts[static_cast<std::size_t>(slot)];
    prompts.add({ids.begin(), ids.begin() + 4}, 4, slot);
  }
  advance_logits(model, ctx, session, prompts);
  for (std::size_t t = 4; t < 20; ++t) {
    Batch step;
    std::vector<Index> order = t % 2 ? std::vector<Index>{1, 2, 0} : std::vector<Index>{0, 2};
    if (t == 7) order = {1};
    for (const Index slot : order) {
      const auto length = static_cast<std::size_t>(session.length(slot));
      step.add({texts[static_cast<std::size_t>(slot)][length]}, 0, slot);
    }
    std::vector<Index> positions;
    for (const Index slot : order) positions.push_back(session.length(slot));
    const auto logits = advance_logits(model, ctx, session, step);
    for (std::size_t i = 0; i < order.size(); ++i)
      CHECK(relative_difference(constant(logits).middle_rows(static_cast<Index>(i), 1),
                                constant(expected[static_cast<std::size_t>(order[i])]).middle_rows(positions[i], 1)) <
            1e-4);
  }
}

TEST_CASE("decoding on folded weights and on separate ones gives the same answer") {
  Cpu ctx(1);
  const auto ids = random_tokens(20, 31, 1);
  struct Case {
    Index augment_width, rank;
    bool folded;
  };
  // Two products of [32, D_A] against D_A x 32 (or through the rank) and two of [32, 32].
  for (const Case& c : {Case{24, 0, true},
                        {63, 0, true},
                        {64, 0, false},
                        {96, 0, false},
                        {24, 2, true},
                        {40, 2, false},
                        {40, 8, true},
                        {96, 8, false}}) {
    CAPTURE(c.augment_width);
    CAPTURE(c.rank);
    const ModelSpec spec{
        .vocabulary = 31, .width = c.augment_width, .hidden = 16, .blocks = 1, .heads = {1, 1, 8}, .context = 50};
    calm::ComposedModel<Llama, Llama> model(make_anchor(),
                                            {std::make_shared<const Llama>(spec, TestWeights{5, calm::DType::f32})},
                                            {{0, 0, 2}}, {.rank = c.rank});
    randomise(model, 6);
    CHECK(model.bridges()[0].fold(ctx).k.empty() == !c.folded);
    Batch batch;
    batch.add(ids);
    auto session = model.make_session(ctx, 1, 20);
    CHECK(relative_difference(cached_logits(model, ctx, session, 0, ids, 0, {1}), forward_logits(model, ctx, batch)) <
          1e-4);
  }
}

TEST_CASE("logits, loss and gradients have the same bits for 1, 2, 3 and 4 threads and from run to run") {
  for (const bool uneven : {false, true}) {
    Composed model = make_trained({.gate = calm::Gate::tanh, .rotary = true}, uneven);
    const Batch batch = random_batch({{140, 20}, {33, 0}, {1, 1}}, 31, 8);
    const auto logits_on = [&](int threads) {
      Cpu ctx(threads);
      return forward_logits(model, ctx, batch);
    };
    const auto decoded_on = [&](int threads) {
      Cpu ctx(threads);
      auto session = model.make_session(ctx, 3, 150);
      advance_logits(model, ctx, session, batch);
      Batch next;
      next.add({1}, 0, 2);
      next.add({2, 3}, 0, 0);
      return advance_logits(model, ctx, session, next);
    };
    const auto gradients = gradient_bits(model, 1, batch), logits = logits_on(1), decoded = decoded_on(1);
    for (const int threads : {1, 2, 3, 4}) {
      CHECK(same_bits(gradient_bits(model, threads, batch), gradients));
      CHECK(same_bits(logits_on(threads), logits));
      CHECK(same_bits(decoded_on(threads), decoded));
    }
  }
}

TEST_CASE("states that were kept give the same bits as states that are prepared again") {
  const Composed model = make_trained({}, true);
  Cpu ctx(2);
  const Batch batch = mixed_batch();
  Composed::States states;
  const auto expected = forward_logits(model, ctx, batch, states);
  Composed other = model;
  randomise(other, 77);  // kept states depend on no bridge
  const auto others = forward_logits(other, ctx, batch);
  for (const auto& [m, logits] : {std::pair{&model, &expected}, {static_cast<const Composed*>(&other), &others}}) {
    ctx.arena.reset();
    const auto x = m->forward(ctx, batch.view(), states, nullptr);
    Composed::HeadCache head;
    Matrix<float> found(x.rows, 31);
    m->head(ctx, MatrixView<const float>(x), found.view(), head);
    CHECK(same_bits(found, *logits));
  }
}

TEST_CASE("two sessions over one model do not disturb each other") {
  const Composed model = make_trained({}, true);
  Cpu first(1), second(2);
  auto a = model.make_session(first, 1, 30), b = model.make_session(second, 1, 30);
  const auto one = random_tokens(30, 31, 1), two = random_tokens(30, 31, 2);
  Matrix<float> found_one(30, 31), found_two(30, 31);
  for (Index t = 0; t < 30; ++t) {
    Batch batch_one, batch_two;
    batch_one.add({one[static_cast<std::size_t>(t)]}, 0, 0);
    batch_two.add({two[static_cast<std::size_t>(t)]}, 0, 0);
    const auto logits_one = advance_logits(model, first, a, batch_one),
               logits_two = advance_logits(model, second, b, batch_two);
    std::copy_n(logits_one.data(), 31, found_one.view().row(t));
    std::copy_n(logits_two.data(), 31, found_two.view().row(t));
  }
  a.clear(0);  // a slot that was cleared is as new
  CHECK(same_bits(found_one, cached_logits(model, first, a, 0, one, 0, {1})));
  auto fresh = model.make_session(first, 1, 30);
  CHECK(same_bits(found_two, cached_logits(model, first, fresh, 0, two, 0, {1})));
}

// Errors

TEST_CASE("an error leaves the session as it was") {
  // Token 40 is one of the first augment alone, or of both augments, but never of the anchor.
  for (const Index second_vocabulary : {31, 100}) {
    const ModelSpec first{
        .vocabulary = 100, .width = 24, .hidden = 40, .blocks = 3, .heads = {3, 3, 8}, .context = 401};
    ModelSpec second = plain_spec();
    second.vocabulary = second_vocabulary;
    calm::ComposedModel<Llama, Llama, Plain> model(
        make_anchor(),
        {std::make_shared<const Llama>(first, TestWeights{2, calm::DType::f32}),
         std::make_shared<const Plain>(second, TestWeights{3, calm::DType::f32})},
        many_links);
    randomise(model, 5);
    Cpu ctx(1);
    const auto ids = random_tokens(10, 31, 1);
    auto session = model.make_session(ctx, 2, 10), untouched = model.make_session(ctx, 2, 10);
    Batch start, too_long, not_a_token, no_slot, rest;
    start.add({ids.begin(), ids.begin() + 8}, 0, 0);
    too_long.add({1}, 0, 1);
    too_long.add({1, 2, 3}, 0, 0);
    not_a_token.add({5, 40}, 0, 0);
    no_slot.add({1}, 0, 2);
    rest.add({ids.begin() + 8, ids.end()}, 0, 0);
    advance_logits(model, ctx, session, start);
    advance_logits(model, ctx, untouched, start);

    CHECK(contains(message_of<calm::ContextLimitError>([&] { advance_logits(model, ctx, session, too_long); }),
                   "slot 0 holds 8"));
    CHECK(contains(message_of<calm::ShapeError>([&] { advance_logits(model, ctx, session, not_a_token); }),
                   "token 1 is 40"));
    CHECK(contains(message_of<calm::ShapeError>([&] { advance_logits(model, ctx, session, no_slot); }), "slot 2"));
    CHECK(session.length(0) == 8);
    CHECK(session.length(1) == 0);
    CHECK(same_bits(advance_logits(model, ctx, session, rest), advance_logits(model, ctx, untouched, rest)));
  }
}

TEST_CASE("a session larger than the context of a model is refused, and so are states of another batch") {
  const Composed model = make_trained();
  Cpu ctx(1);
  CHECK(contains(message_of<calm::ContextLimitError>([&] { model.make_session(ctx, 1, 201); }), "200"));
  Composed::States states;
  model.prepare(ctx, mixed_batch().view(), states);
  Batch other;
  other.add({1, 2, 3});
  CHECK(contains(message_of<calm::ShapeError>([&] { model.forward(ctx, other.view(), states, nullptr); }), "3"));
  // As many tokens, in other sequences.
  Batch of_three, of_one_and_two;
  of_three.add({1, 2, 3}), of_one_and_two.add({1}), of_one_and_two.add({2, 3});
  model.prepare(ctx, of_three.view(), states);
  CHECK(contains(message_of<calm::ShapeError>([&] { model.forward(ctx, of_one_and_two.view(), states, nullptr); }),
                 "prepared for another batch"));
  states.augments = false;
  model.prepare(ctx, of_three.view(), states);
  states.augments = true;
  CHECK(contains(message_of<calm::ShapeError>([&] { model.forward(ctx, of_three.view(), states, nullptr); }),
                 "augments were switched off"));
  model.prepare(ctx, of_three.view(), states);
  states.disabled = {true};
  CHECK(contains(message_of<calm::ConfigError>([&] { model.forward(ctx, of_three.view(), states, nullptr); }),
                 "1 entries for 5 links"));
  for (const Index blocks : {5, -2})
    CHECK_THROWS_AS(model.anchor().make_session(ctx, 1, 8, {blocks, true}), calm::ConfigError);
}

TEST_CASE("tokens that an augment does not have are refused with its number") {
  ModelSpec small = augment_spec(), brief = plain_spec();
  small.vocabulary = 20;
  brief.context = 4;
  const Composed model(make_anchor(),
                       {std::make_shared<const Llama>(small, TestWeights{2, calm::DType::f32}),
                        std::make_shared<const Plain>(brief, TestWeights{3, calm::DType::f32})},
                       many_links);
  Cpu ctx(1);
  Batch unknown, longer;
  unknown.add({1, 25}), longer.add({1, 2, 3, 4, 5});
  CHECK(contains(message_of<calm::ShapeError>([&] { forward_logits(model, ctx, unknown); }),
                 "token 1 of augment 0 is 25, which is outside its vocabulary of 20"));
  CHECK(contains(message_of<calm::ContextLimitError>([&] { forward_logits(model, ctx, longer); }),
                 "5 tokens of augment 1, but its context is 4"));
  auto session = model.make_session(ctx, 1, 4);
  CHECK(contains(message_of<calm::ShapeError>([&] { advance_logits(model, ctx, session, unknown); }), "augment 0"));
}

TEST_CASE("an aligner that breaks its contract, or is none, is found out") {
  struct Forgetful final : calm::Aligner {
    void append(calm::AlignmentState& state, std::span<const TokenId> ids, bool, std::vector<TokenId>& augment_ids,
                std::vector<Index>& visible) const override {
      augment_ids.push_back(0);
      ++state.augment_tokens;
      for (std::size_t t = 0; t < ids.size(); ++t) visible.push_back(t == 1 ? 0 : 1);  // takes a token back
    }
  };
  const auto composed_with = [](std::shared_ptr<const calm::Aligner> first) {
    return Composed(make_anchor(), {make_augment(), make_plain()}, many_links, {},
                    {std::move(first), std::make_shared<calm::IdentityAligner>()});
  };
  CHECK(contains(message_of<calm::ConfigError>([&] { composed_with(nullptr); }), "augment 0"));
  const Composed model = composed_with(std::make_shared<Forgetful>());
  Cpu ctx(1);
  CHECK(
      contains(message_of<calm::ShapeError>([&] { forward_logits(model, ctx, mixed_batch()); }), "the aligner made 0"));
}

TEST_CASE("a link that does not fit is refused by name") {
  const auto refusal = [](const Links& links) {
    return message_of<calm::ConfigError>([&] { Composed(make_anchor(), {make_augment(), make_plain()}, links); });
  };
  CHECK(refusal({{0, 0, 0}, {2, 0, 0}}) ==
        "link 1 (2:0>0): there is no augment 2; they are counted from 0 and there are 2");
  CHECK(refusal({{-1, 0, 0}}) == "link 0 (-1:0>0): there is no augment -1; they are counted from 0 and there are 2");
  CHECK(refusal({{0, 3, 0}}) == "link 0 (0:3>0): augment 0 has no block 3; its blocks are 0 to 2");
  CHECK(refusal({{1, 2, 0}}) == "link 0 (1:2>0): augment 1 has no block 2; its blocks are 0 to 1");
  CHECK(refusal({{0, 0, 1}, {0, 1, 4}}) == "link 1 (0:1>4): the anchor has no block 4; its blocks are 0 to 3");
  CHECK(refusal({{0, 0, 1}, {1, 0, 1}, {0, 0, 1}}) == "link 2 (0:0>1) stands twice (also as link 0)");
  CHECK(contains(refusal(std::vector<calm::Link>{}), "at least one link"));
  CHECK(contains(refusal(calm::links::evenly_spaced(5)), "cannot be spread"));  // more than either model has blocks
}

TEST_CASE("bridge options that do not fit are refused by name") {
  const auto refusal = [](const BridgeOptions& options) {
    return message_of<calm::ConfigError>([&] { make_composed(options); });
  };
  CHECK(refusal({.heads = 5}) == "links.0: 5 heads do not divide the anchor's width 32");
  CHECK(contains(refusal({.heads = 32, .rotary = true}), "even head width"));
  CHECK(contains(refusal({.rank = 25}), "links.0"));
  CHECK(contains(refusal({.rank = -1}), "rank -1"));
  CHECK(contains(message_of<calm::ConfigError>([] {
                   Composed(nullptr, {make_augment(), make_plain()}, many_links);
                 }),
                 "anchor"));
  CHECK(contains(message_of<calm::ConfigError>([] {
                   Composed(make_anchor(), {make_augment(), nullptr}, many_links);
                 }),
                 "augment"));
  CHECK(contains(message_of<calm::ConfigError>([] {
                   Composed(make_anchor(), {make_augment(), make_plain()}, many_links, {},
                            {std::make_shared<calm::IdentityAligner>()});
                 }),
                 "1 aligners for 2 augments"));
}

TEST_CASE("evenly spaced links end in the last blocks, as section 3.1 of the paper has them") {
  using calm::Link;
  CHECK(Links(calm::links::evenly_spaced(3)).resolve(12, {12}) == std::vector<Link>{{0, 3, 3}, {0, 7, 7}, {0, 11, 11}});
  CHECK(Links(calm::links::evenly_spaced(3)).resolve(7, {5}) == std::vector<Link>{{0, 1, 2}, {0, 3, 4}, {0, 4, 6}});
  CHECK(Links(calm::links::evenly_spaced(1)).resolve(4, {3, 2}) == std::vector<Link>{{0, 2, 3}, {1, 1, 3}});
  CHECK(Links(calm::links::evenly_spaced(4)).resolve(28, {4}) ==
        std::vector<Link>{{0, 0, 6}, {0, 1, 13}, {0, 2, 20}, {0, 3, 27}});
}

TEST_CASE("a composition from a rule holds the links of the rule") {
  const Composed model(make_anchor(), {make_augment(), make_plain()}, calm::links::evenly_spaced(2));
  CHECK(model.links() == std::vector<calm::Link>{{0, 1, 1}, {0, 2, 3}, {1, 0, 1}, {1, 1, 3}});
}

}  // namespace compose_test
