#include <doctest/doctest.h>
#include <calm/backend/reference.hpp>
#include <calm/model/zoo/zoo.hpp>
#include <calm/train/gradient_check.hpp>
#include <support/models.hpp>

#include <limits>

namespace transformer_test {
using namespace calm_test;
using calm::ModelSpec;

namespace {

template <class Scalar>
using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, Scalar>;
using TrainableLlama = calm::Transformer<calm::zoo::Llama, calm::Trainable, double>;
using TrainablePlain = calm::Transformer<PlainArchitecture, calm::Trainable, double>;
using LoraLlama = calm::Transformer<calm::zoo::Llama, calm::Lora, double>;

static_assert(calm::Decoder<Llama<float>, Cpu>);
static_assert(calm::Decoder<TrainableLlama, calm::Context<calm::ReferenceBackend>>);

// The empty observer is empty, and a loop over blocks keeps no byte of it.
static_assert(std::is_empty_v<calm::NullObserver>);
static_assert(std::is_trivially_copyable_v<calm::NullObserver>);
static_assert(std::is_empty_v<Llama<float>::States>);

ModelSpec tiny_spec(bool tied = false) {
  return {.vocabulary = 7,
          .width = 6,
          .hidden = 5,
          .blocks = 2,
          .heads = {2, 1, 4},
          .context = 12,
          .tied_embeddings = tied};
}
ModelSpec small_spec() {
  return {.vocabulary = 29, .width = 24, .hidden = 36, .blocks = 3, .heads = {4, 2, 6}, .context = 160};
}

template <class Backend, class Model>
void check_gradients(Model& model) {
  calm::Context<Backend> ctx(1);
  calm::Gradients<double> grads(model);
  const Batch batch = random_batch({{4, 0}, {0, 0}, {1, 0}, {3, 0}}, 7, 2);
  random_target_loss(model, ctx, batch, grads);
  const auto result =
      calm::check_parameter_gradients(model, grads, [&] { return random_target_loss(model, ctx, batch); });
  INFO(calm::to_string(result));
  CHECK(result.checked == calm::count_parameters(model));
  CHECK(result.worst_error < 1e-6);
}

template <class Scalar>
void check_caches(double tolerance) {
  const Llama<Scalar> model(small_spec(), TestWeights{4});
  Cpu ctx(2);
  const Batch batch = random_batch({{5, 0}, {70, 0}, {0, 0}, {1, 0}, {33, 0}}, 29, 1);
  const auto expected = forward_logits(model, ctx, batch);
  auto together = model.make_session(ctx, 5, 160);
  CHECK(relative_difference(advance_logits(model, ctx, together, batch), expected) < tolerance);
  for (const std::size_t s : {0U, 1U, 3U, 4U}) {
    const Index first = batch.offsets[s], count = batch.offsets[s + 1] - first;
    const std::vector<TokenId> ids(batch.ids.begin() + first, batch.ids.begin() + first + count);
    const auto part = constant(expected).middle_rows(first, count);
    Batch single;
    single.add(ids);
    CHECK(relative_difference(constant(forward_logits(model, ctx, single)), part) < tolerance);
    for (const auto& pieces : {std::vector<Index>{1}, {3, 1, 40}, {160}}) {
      auto session = model.make_session(ctx, 3, count);
      CHECK(relative_difference(constant(cached_logits(model, ctx, session, 2, ids, 0, pieces)), part) < tolerance);
      CHECK(session.length(2) == count);
      CHECK(session.length(1) == 0);
    }
  }
}

}  // namespace

TEST_CASE("the gradients of all weights of a Transformer agree with finite differences, on both backends") {
  TrainableLlama model(tiny_spec(), TestWeights{1});
  check_gradients<calm::CpuBackend>(model);
  check_gradients<calm::ReferenceBackend>(model);
}

TEST_CASE("so they do where the embeddings are the output head too") {
  TrainableLlama model(tiny_spec(true), TestWeights{1});
  check_gradients<calm::CpuBackend>(model);
  bool head = false;
  calm::for_each_parameter(model, [&](const std::string& name, const auto&) { head |= contains(name, "lm_head"); });
  CHECK(!head);
}

TEST_CASE("so they do for an architecture of the user's own") {
  TrainablePlain model(tiny_spec(), TestWeights{1});
  check_gradients<calm::CpuBackend>(model);
}

TEST_CASE("so they do for layer norms, biases, learned positions, parallel blocks, norms elsewhere and windows") {
  const auto check = [](auto architecture, calm::ModelSpec spec) {
    using Model = calm::Transformer<decltype(architecture), calm::Trainable, double>;
    Model model(spec, TestWeights{1});
    CAPTURE(std::string(decltype(architecture)::model_type));
    check_gradients<calm::CpuBackend>(model);
    check_gradients<calm::ReferenceBackend>(model);
    const Batch batch = random_batch({{9, 0}, {1, 0}}, 7, 3);
    Cpu ctx(1);
    const auto expected = forward_logits(model, ctx, batch);
    auto session = model.make_session(ctx, 2, 9);
    CHECK(relative_difference(advance_logits(model, ctx, session, batch), expected) < 1e-10);
  };
  calm::ModelSpec spec = tiny_spec();
  check(calm::zoo::Qwen2{}, spec);
  check(calm::zoo::Olmo2{}, spec);
  check(calm::zoo::Gpt2{}, spec);
  spec.rotary_width = 2;
  check(calm::zoo::GptNeoX{}, spec);
  spec = tiny_spec();
  spec.query_scale = 1.5;
  spec.window = 2;
  spec.window_rotary_base = 100;
  spec.windowed = {true, false};
  check(calm::zoo::Qwen3{}, spec);
}

TEST_CASE("so they do for LoRA, which trains its additions alone and begins as the model it stands on") {
  LoraLlama model(tiny_spec(), calm::LoraWeights<TestWeights>{TestWeights{1}, 2, 0.7, 5});
  Cpu ctx(1);
  const Batch batch = random_batch({{5, 0}}, 7, 9);
  const Llama<double> base(tiny_spec(), TestWeights{1});
  CHECK(relative_difference(forward_logits(model, ctx, batch), forward_logits(base, ctx, batch)) == 0);
  randomise(model, 3);
  CHECK(relative_difference(forward_logits(model, ctx, batch), forward_logits(base, ctx, batch)) > 1e-3);
  check_gradients<calm::CpuBackend>(model);
  calm::for_each_parameter(model, [&](const std::string& name, const auto&) { CHECK(contains(name, ".lora_")); });
}

TEST_CASE("the gradient checker finds a gradient that is wrong, and says where") {
  TrainableLlama model(tiny_spec(), TestWeights{1});
  Cpu ctx(1);
  const Batch batch = random_batch({{4, 0}}, 7, 2);
  calm::Gradients<double> grads(model);
  random_target_loss(model, ctx, batch, grads);
  const auto check = [&] {
    return calm::check_parameter_gradients(model, grads, [&] { return random_target_loss(model, ctx, batch); },
                                           {.values = 6});
  };
  const auto correct = check();
  CHECK(correct.worst_error < 1e-6);
  CHECK(correct.checked == 6 * 21);  // 2 x 9 in the blocks, embeddings, norm and head
  const auto logits = forward_logits(model, ctx, batch);
  calm::for_each_parameter(model, [&](const std::string& name, auto& parameter) {
    if (name != "model.layers.1.mlp.up_proj.weight") return;
    const double before = grads[parameter](0, 0);
    grads[parameter](0, 0) += 1e-3;
    CHECK(check().name == name);
    CHECK(check().worst_error > 1e-3);
    grads[parameter](0, 0) = not_a_number<double>;
    CHECK(check().worst_error == std::numeric_limits<double>::infinity());
    CHECK(contains(calm::to_string(check()), name + "[0, 0]"));
    grads[parameter](0, 0) = before;
  });
  CHECK(same_bits(forward_logits(model, ctx, batch), logits));  // the values are as they were
}

TEST_CASE("caches, chunked prefill, batches and single sequences agree with the pass of training") {
  check_caches<float>(1e-4);
  check_caches<double>(1e-10);
}

TEST_CASE("the backends agree on logits") {
  const Llama<double> model(small_spec(), TestWeights{4});
  Cpu cpu(2);
  calm::Context<calm::ReferenceBackend> reference;
  const Batch batch = random_batch({{5, 0}, {70, 0}, {1, 0}}, 29, 1);
  CHECK(relative_difference(forward_logits(model, cpu, batch), forward_logits(model, reference, batch)) < 1e-12);
}

TEST_CASE("a Transformer is causal to the bit") {
  const Llama<float> model(small_spec(), TestWeights{4});
  Cpu ctx(2);
  Batch batch = random_batch({{140, 0}}, 29, 1);
  const auto before = forward_logits(model, ctx, batch);
  for (const Index t : {0, 1, 63, 64, 100, 139}) {
    Batch changed = batch;
    auto& id = changed.ids[static_cast<std::size_t>(t)];
    id = (id + 1) % 29;
    const auto after = forward_logits(model, ctx, changed);
    CHECK(same_bits(constant(before).middle_rows(0, t), constant(after).middle_rows(0, t)));
    CHECK(!same_bits(constant(before).middle_rows(t, 1), constant(after).middle_rows(t, 1)));
  }
}

TEST_CASE("a pass that keeps nothing for a gradient has the bits of one that does, a few rows at a time or all") {
  const auto check = [](auto architecture, calm::ModelSpec spec) {
    using Model = calm::Transformer<decltype(architecture), calm::Frozen, float>;
    CAPTURE(std::string(decltype(architecture)::model_type));
    for (const Index hidden : {36, 1000}) {  // narrow enough to be cut into rows, and too wide
      CAPTURE(hidden);
      spec.hidden = hidden;
      const Model model(spec, TestWeights{4});
      Cpu ctx(2);
      const Batch batch = random_batch({{5, 0}, {70, 0}, {0, 0}, {64, 0}, {12, 0}}, 29, 1);
      typename Model::Tape tape;
      ctx.arena.reset();
      const auto kept = copy_of(model.forward(ctx, batch.view(), {}, &tape));
      ctx.arena.reset();
      CHECK(same_bits(copy_of(model.forward(ctx, batch.view(), {}, nullptr)), kept));
    }
  };
  calm::ModelSpec spec = small_spec();
  check(calm::zoo::Llama{}, spec);
  check(calm::zoo::Olmo2{}, spec);
  check(calm::zoo::Gpt2{}, spec);
  check(calm::zoo::Gemma3{}, spec);
  spec.rotary_width = 4;
  check(calm::zoo::GptNeoX{}, spec);
}

TEST_CASE("a frozen, a trainable and a LoRA model of the same weights give the same logits") {
  const Llama<double> frozen(small_spec(), TestWeights{4});
  const calm::Transformer<calm::zoo::Llama, calm::Trainable, double> trainable(small_spec(), calm::weights_of(frozen));
  Cpu ctx(1);
  const Batch batch = random_batch({{9, 0}}, 29, 1);
  CHECK(same_bits(forward_logits(frozen, ctx, batch), forward_logits(trainable, ctx, batch)));
}

TEST_CASE("an observer is offered the stream after each block and may change it") {
  const Llama<double> model(small_spec(), TestWeights{4});
  Cpu ctx(1);
  const Batch batch = random_batch({{3, 0}}, 29, 1);
  struct Counting {
    std::vector<Index> seen;
    Index doubled = -1;
    void after_block(Cpu& context, Index block, MatrixView<double>& x) {
      seen.push_back(block);
      if (block == doubled) context.backend.scale(MatrixView<const double>(x), 2, x);
    }
  };
  const auto run = [&](Counting& observer, Index first, Index last, MatrixView<double> x) {
    model.run(ctx, batch.view(), {}, x, first, last, nullptr, observer);
    return copy_of(x);
  };
  Counting all, twice{{}, 1};
  const auto plain = run(all, 0, 3, model.embed(ctx, batch.view()));
  const auto changed = run(twice, 0, 3, model.embed(ctx, batch.view()));
  CHECK(all.seen == std::vector<Index>{0, 1, 2});
  CHECK(relative_difference(changed, plain) > 1e-3);
  Counting lower{{}, 1}, upper;
  Matrix<double> middle = run(lower, 0, 2, model.embed(ctx, batch.view()));
  CHECK(same_bits(run(upper, 2, 3, middle.view()), changed));
  CHECK(upper.seen == std::vector<Index>{2});
}

TEST_CASE("a session may run the lower blocks alone") {
  const Llama<double> model(small_spec(), TestWeights{4});
  Cpu ctx(1);
  Batch batch = random_batch({{6, 0}}, 29, 1);
  MatrixView<double> x = model.embed(ctx, batch.view());
  model.run(ctx, batch.view(), {}, x, 0, 2, nullptr, calm::NullObserver{});
  const auto expected = copy_of(x);
  auto session = model.make_session(ctx, 1, 6, {.blocks = 2});
  CHECK(relative_difference(copy_of(model.advance(ctx, session, batch.cached(), calm::NullObserver{})), expected) <
        1e-12);
}

TEST_CASE("a token outside the vocabulary is refused with its position") {
  const Llama<float> model(small_spec(), TestWeights{4});
  Cpu ctx(1);
  for (const TokenId wrong : {29, -1}) {
    Batch batch;
    batch.add({1, 2, wrong});
    const std::string expected = "token 2 is " + std::to_string(wrong) + ", which is outside the vocabulary of 29";
    CHECK(message_of<calm::ShapeError>([&] { forward_logits(model, ctx, batch); }) == expected);
    auto session = model.make_session(ctx, 1, 4);
    CHECK(message_of<calm::ShapeError>([&] { advance_logits(model, ctx, session, batch); }) == expected);
    CHECK(session.length(0) == 0);
  }
}

TEST_CASE("more tokens than the context are refused, in a pass, a session and its making") {
  const Llama<float> model(tiny_spec(), TestWeights{4});
  Cpu ctx(1);
  const Batch full = random_batch({{12, 0}}, 7, 1), longer = random_batch({{2, 0}, {13, 0}}, 7, 1);
  CHECK_NOTHROW(forward_logits(model, ctx, full));
  CHECK(message_of<calm::ContextLimitError>([&] { forward_logits(model, ctx, longer); }) ==
        "sequence 1 has 13 tokens, but the model's context is 12");
  CHECK(contains(message_of<calm::ContextLimitError>([&] { model.make_session(ctx, 1, 13); }), "12"));
  auto session = model.make_session(ctx, 2, 5);
  Batch start, more;
  start.add({1, 2, 3}, 0, 1);
  more.add({4}, 0, 0);
  more.add({4, 5, 6}, 0, 1);
  advance_logits(model, ctx, session, start);
  CHECK(contains(message_of<calm::ContextLimitError>([&] { advance_logits(model, ctx, session, more); }),
                 "slot 1 holds 3 tokens and 3 more were given"));
  CHECK(session.length(0) == 0);
  CHECK(session.length(1) == 3);
}

TEST_CASE("a cache of more bytes than can be counted is refused") {
  constexpr Index most = std::numeric_limits<Index>::max();
  CHECK_THROWS_AS(calm::KvCache<float>(1, 1, most, 1), calm::FormatError);
  CHECK_THROWS_AS(calm::KvCache<float>(1, 1, Index{1} << 52, 1 << 10), calm::FormatError);
  CHECK_THROWS_AS(calm::KvCache<float>(1, most, 100, 1), calm::FormatError);
  CHECK(calm::KvCache<float>(3, 2, 65, 4).bytes() == 3 * 2 * 2 * 128 * 4 * sizeof(float));
}

TEST_CASE("offsets and slots that do not fit the tokens are refused") {
  const Llama<float> model(tiny_spec(), TestWeights{4});
  Cpu ctx(1);
  const std::vector<TokenId> ids = {1, 2, 3};
  const auto run = [&](const std::vector<Index>& offsets, const std::vector<Index>& slots = {}) {
    return message_of<calm::ShapeError>([&] {
      auto session = model.make_session(ctx, 2, 5);
      model.advance(ctx, session, {ids, offsets, {}, slots}, calm::NullObserver{});
    });
  };
  CHECK(contains(run({}, {}), "offsets"));
  CHECK(contains(run({1, 3}, {0}), "begin with 0"));
  CHECK(contains(run({0, 2}, {0}), "number of tokens, 3"));
  CHECK(contains(run({0, 2, 1, 3}, {0, 1, 0}), "offset 2"));
  CHECK(contains(run({0, 3}, {}), "slot"));
  CHECK(contains(run({0, 3}, {0, 1}), "2 slots for 1"));
  CHECK(contains(run({0, 1, 3}, {1, 1}), "the sequences 0 and 1 both continue slot 1"));
  CHECK(contains(run({0, 3}, {2}), "slot 2 of a session with 2"));
  CHECK(contains(run({0, 3}, {-1}), "slot -1"));
  CHECK(run({0, 3}, {1}).empty());
  const std::vector<Index> offsets = {0, 3}, slot = {0};
  const auto ask = [&](const std::vector<Index>& rows, const std::vector<Index>& slots = {}) {
    return message_of<calm::ShapeError>([&] {
      const calm::TokenBatch batch{ids, offsets, {}, slots, rows};
      if (slots.empty()) {
        model.forward(ctx, batch, {}, nullptr);
      } else {
        auto session = model.make_session(ctx, 2, 5);
        model.advance(ctx, session, batch, calm::NullObserver{});
      }
    });
  };
  CHECK(contains(ask({0, 3}), "row 1 is 3"));
  CHECK(contains(ask({-1}), "row 0 is -1"));
  CHECK(contains(ask({1, 1}), "row 1 is 1"));
  CHECK(contains(ask({0, 3}, slot), "row 1 is 3"));
  CHECK(ask({2}, slot).empty());
  auto shorter = model.make_session(ctx, 1, 5, {.blocks = model.spec().blocks - 1});
  const std::vector<Index> last = {2};
  CHECK(contains(message_of<calm::ShapeError>([&] {
                   model.advance(ctx, shorter, {ids, offsets, {}, slot, last}, calm::NullObserver{});
                 }),
                 "this session ends at block 1"));
  CHECK(shorter.length(0) == 0);
  CHECK(ask({0, 2}).empty());
  const calm::Transformer<calm::zoo::Gpt2> with_positions(tiny_spec(), TestWeights{4});
  const std::vector<Index> far = {0, 300000000};
  CHECK(contains(message_of<calm::ShapeError>([&] {
                   with_positions.forward(ctx, {ids, far, {}, {}}, {}, nullptr);
                 }),
                 "number of tokens, 3"));
  calm::Transformer<calm::zoo::Gpt2>::Tape tape;
  CHECK(contains(message_of<calm::ShapeError>([&] {
                   with_positions.forward(ctx, {ids, far, {}, {}}, {}, &tape);
                 }),
                 "number of tokens, 3"));
  auto session = model.make_session(ctx, 2, 5);
  CHECK(contains(message_of<calm::ShapeError>([&] { session.clear(7); }), "slot 7 of a session with 2"));
  CHECK(contains(message_of<calm::ShapeError>([&] { session.length(-1); }), "slot -1"));
  CHECK(contains(message_of<calm::ShapeError>([&] { model.make_session(ctx, -1, 5); }), "-1"));
}

TEST_CASE("sizes that make no model are refused by name") {
  const auto refusal = [](auto change) {
    ModelSpec spec = tiny_spec();
    change(spec);
    return message_of<calm::ConfigError>([&] { Llama<float>(spec, TestWeights{}); });
  };
  CHECK(contains(refusal([](ModelSpec& s) { s.vocabulary = 0; }), "vocabulary"));
  CHECK(contains(refusal([](ModelSpec& s) { s.blocks = -1; }), "blocks"));
  CHECK(contains(refusal([](ModelSpec& s) { s.heads = {3, 2, 4}; }), "3 heads cannot share 2"));
  CHECK(contains(refusal([](ModelSpec& s) { s.heads.width = 3; }), "even head width"));
  CHECK(refusal([](ModelSpec&) {}).empty());
}

TEST_CASE("weights bear the names of Hugging Face's Llama, each once, and their gradients lie in that order") {
  TrainableLlama model(tiny_spec(), TestWeights{1});
  std::vector<std::string> names;
  Index offset = 0;
  calm::assign_offsets(model);
  calm::for_each_parameter(model, [&](const std::string& name, const auto& parameter) {
    names.push_back(name);
    CHECK(parameter.offset == offset);
    offset += parameter.value.size();
  });
  CHECK(names.size() == 21);
  CHECK(names.front() == "model.embed_tokens.weight");
  CHECK(names.back() == "lm_head.weight");
  for (const char* part :
       {"input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
    CHECK(std::count(names.begin(), names.end(), calm::message("model.layers.1.", part, ".weight")) == 1);
}

}  // namespace transformer_test
