// Schedule, packed batches, optimizer, trainer, and runs that are killed and resumed.
#include <doctest/doctest.h>
#include <calm/io/model_folder.hpp>
#include <calm/train/checkpoint.hpp>
#include <support/models.hpp>
#include <support/temporary_folder.hpp>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>

namespace train_test {
using namespace calm_test;
using calm::Example;
using calm::PackedBatch;
using calm::PackedDataset;
using calm::RunOptions;
using calm::StepReport;

namespace {

using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, float>;
using Composed = calm::ComposedModel<Llama, Llama>;
using Trainer = calm::Trainer<Composed, Cpu>;
using TrainingBatch = calm::TrainingBatch<Composed>;

constexpr Index vocabulary = 17;

Composed make_model(const calm::BridgeOptions& options = {}, std::uint64_t augment_seed = 2) {
  const calm::ModelSpec anchor{
      .vocabulary = vocabulary, .width = 16, .hidden = 24, .blocks = 2, .heads = {2, 1, 8}, .context = 64};
  const calm::ModelSpec augment{
      .vocabulary = vocabulary, .width = 12, .hidden = 16, .blocks = 2, .heads = {2, 2, 6}, .context = 64};
  Composed model(std::make_shared<const Llama>(anchor, TestWeights{1, calm::DType::f32}),
                 {std::make_shared<const Llama>(augment, TestWeights{augment_seed, calm::DType::f32})},
                 {{0, 0, 0}, {0, 1, 1}}, options);
  randomise(model, 9);
  return model;
}

std::vector<Example> random_examples(Index count, std::uint64_t seed) {
  calm::Random random(seed, 5);
  std::vector<Example> examples;
  for (Index i = 0; i < count; ++i) {
    const auto number = seed * 1000 + 2 * static_cast<std::uint64_t>(i);
    examples.push_back({random_tokens(1 + random.below(5), vocabulary, number),
                        random_tokens(1 + random.below(6), vocabulary, number + 1)});
  }
  return examples;
}

/// All trained weights of a model behind each other.
Matrix<float> weights_in(const Composed& model) {
  Matrix<float> all(1, calm::count_parameters(model));
  Index at = 0;
  calm::for_each_parameter(model, [&](const std::string&, const auto& parameter) {
    std::copy_n(parameter.value.data(), parameter.value.size(), all.data() + at);
    at += parameter.value.size();
  });
  return all;
}

void set_weight(Composed& model, const std::string& name, auto&& change) {
  calm::for_each_parameter(model, [&](const std::string& found, auto& parameter) {
    if (found != name) return;
    for (float& x : parameter.value.values()) change(x);
  });
}

Matrix<float> gradients_in(const Trainer& trainer) {
  Matrix<float> all(1, static_cast<Index>(trainer.gradients().values().size()));
  std::copy(trainer.gradients().values().begin(), trainer.gradients().values().end(), all.data());
  return all;
}

/// The cross entropy of row t of the logits.
double cross_entropy(const Matrix<float>& logits, Index t, TokenId target) {
  double total = 0;
  for (Index v = 0; v < logits.cols(); ++v) total += std::exp(static_cast<double>(logits(t, v)));
  return std::log(total) - static_cast<double>(logits(t, target));
}

using Folder = calm_test::TemporaryFolder;

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
void write(const std::filesystem::path& path, const std::string& bytes) {
  std::filesystem::remove(path);  // some file systems wait for the disk where a file is cut to nothing first
  std::ofstream(path, std::ios::binary) << bytes;
}

const calm::CosineSchedule schedule_of_nine{.peak = 0.02, .warmup = 2, .steps = 9};

struct Killed {};

/// How one run over a dataset ends: its weights and losses.
struct Ending {
  Matrix<float> weights;
  std::vector<double> losses, validation_losses;
};

/// Trains a fresh model for nine steps of two batches; `killed_after` throws after that step.
Ending run(const PackedDataset& data, const RunOptions& options, const PackedDataset* validation = nullptr,
           Index killed_after = -1, std::size_t keep_bytes = 0) {
  Cpu ctx(1);
  Composed model = make_model();
  Trainer trainer(ctx, model, schedule_of_nine);
  calm::DatasetBatches<Composed> batches(data, 2, keep_bytes);
  std::function<double()> validate;
  if (validation) validate = [&] { return calm::mean_loss(ctx, model, validation->batches()); };
  Ending ending;
  calm::run_training<Composed, Cpu>(trainer, std::ref(batches), options, validate, [&](const StepReport& report) {
    ending.losses.push_back(report.result.loss);
    if (std::isfinite(report.validation_loss)) ending.validation_losses.push_back(report.validation_loss);
    if (report.step == killed_after) throw Killed{};
  });
  ending.weights = weights_in(model);
  return ending;
}

}  // namespace

TEST_CASE("the learning rate rises linearly and falls along a cosine to its last fraction") {
  const calm::CosineSchedule plain{.peak = 2, .warmup = 0, .steps = 100, .final_fraction = 0.1};
  CHECK(plain(0) == doctest::Approx(2));
  CHECK(plain(50) == doctest::Approx(2 * (0.1 + 0.9 * 0.5)));
  CHECK(plain(25) == doctest::Approx(2 * (0.1 + 0.9 * 0.5 * (1 + std::sqrt(0.5)))));
  CHECK(plain(100) == doctest::Approx(0.2));
  CHECK(plain(1000) == doctest::Approx(0.2));
  const calm::CosineSchedule warm{.peak = 2, .warmup = 10, .steps = 100, .final_fraction = 0.1};
  for (const Index step : {1, 5, 9}) CHECK(warm(step) == doctest::Approx(plain(step) * static_cast<double>(step) / 10));
  for (const Index step : {10, 11, 99, 100}) CHECK(warm(step) == plain(step));
  CHECK(warm(1) > 0);
}

TEST_CASE("a packed batch holds inputs without padding, and the rows that predict the completion") {
  PackedBatch batch;
  batch.add({{1, 2, 3}, {4, 5}});
  batch.add({{6}, {7}});
  batch.add({{8, 9}, {10, 11, 12}, {true, false, true}});
  const calm::TokenBatch tokens = batch.tokens();
  CHECK(std::vector<TokenId>(tokens.ids.begin(), tokens.ids.end()) ==
        std::vector<TokenId>{1, 2, 3, 4, 6, 8, 9, 10, 11});
  CHECK(std::vector<Index>(tokens.offsets.begin(), tokens.offsets.end()) == std::vector<Index>{0, 4, 5, 9});
  CHECK(std::vector<Index>(tokens.prompt_lengths.begin(), tokens.prompt_lengths.end()) == std::vector<Index>{3, 1, 2});
  CHECK(std::vector<Index>(batch.rows().begin(), batch.rows().end()) == std::vector<Index>{2, 3, 4, 6, 8});
  CHECK(std::vector<TokenId>(batch.targets().begin(), batch.targets().end()) == std::vector<TokenId>{4, 5, 7, 10, 12});
  CHECK(!batch.empty());
  CHECK(PackedBatch().empty());
}

TEST_CASE("examples that cannot be learned from are refused by number") {
  PackedBatch batch;
  batch.add({{1}, {2}});
  CHECK(contains(message_of<calm::ShapeError>([&] { batch.add({{}, {2}}); }), "example 1 has 0 prompt"));
  CHECK(contains(message_of<calm::ShapeError>([&] { batch.add({{1, 2}, {}}); }), "2 prompt and 0 completion"));
  CHECK(contains(message_of<calm::ShapeError>([&] {
                   batch.add({{1}, {2, 3}, {true}});
                 }),
                 "example 1 says of 1 tokens"));
  CHECK(batch.tokens().tokens() == 1);  // none of them left a trace
  CHECK(batch.tokens().sequences() == 1);
  const auto examples = random_examples(3, 1);
  CHECK_THROWS_AS(PackedDataset({}, 10, 1), calm::ConfigError);
  CHECK_THROWS_AS(PackedDataset(examples, 0, 1), calm::ConfigError);
  const PackedDataset data(examples, 10, 1);
  CHECK_THROWS_AS(calm::DatasetBatches<Composed>(data, 0, 0), calm::ConfigError);
}

TEST_CASE("a dataset visits each batch once an epoch, in an order that only its seed fixes") {
  const auto examples = random_examples(40, 1);
  const PackedDataset data(examples, 20, 7), same(examples, 20, 7), other(examples, 20, 8);
  CHECK(data.size() > 5);
  Index tokens = 0;
  for (const PackedBatch& batch : data.batches()) {
    CHECK(batch.tokens().tokens() <= 20);
    tokens += batch.tokens().tokens();
  }
  Index expected = 0;
  for (const Example& example : examples) expected += example.tokens();
  CHECK(tokens == expected);
  std::vector<Index> first, second;
  for (Index n = 0; n < data.size(); ++n) {
    first.push_back(data.at(n));
    second.push_back(data.at(data.size() + n));
    CHECK(data.at(n) == same.at(n));
  }
  CHECK(first != second);
  CHECK(std::set<Index>(first.begin(), first.end()).size() == first.size());
  CHECK(std::set<Index>(second.begin(), second.end()).size() == second.size());
  bool differs = other.size() != data.size();
  for (Index n = 0; !differs && n < data.size(); ++n) differs = other.at(n) != data.at(n);
  CHECK(differs);
}

TEST_CASE("the loss is that of the scored completion tokens, and of nothing else") {
  Cpu ctx(1);
  const Composed model = make_model();
  const Example masked{
      random_tokens(4, vocabulary, 1), random_tokens(5, vocabulary, 2), {true, false, true, true, false}};
  Batch whole;
  whole.add(masked.prompt, 4);
  whole.ids.insert(whole.ids.end(), masked.completion.begin(), masked.completion.end() - 1);
  whole.offsets.back() = static_cast<Index>(whole.ids.size());
  const Matrix<float> logits = forward_logits(model, ctx, whole);
  double expected = 0;
  for (const Index i : {0, 2, 3})
    expected += cross_entropy(logits, 3 + i, masked.completion[static_cast<std::size_t>(i)]);
  const PackedBatch batch(std::span(&masked, 1));
  CHECK(calm::mean_loss(ctx, model, std::span(&batch, 1)) == doctest::Approx(expected / 3).epsilon(1e-6));

  // The last token is no input: what it is matters where it counts, and only there.
  for (const bool counts : {false, true}) {
    CAPTURE(counts);
    Example one = masked, two = masked;
    one.scored[4] = two.scored[4] = counts;
    two.completion[4] = static_cast<TokenId>((two.completion[4] + 1) % vocabulary);
    Composed first = make_model(), second = make_model();
    Trainer trainer_one(ctx, first, schedule_of_nine), trainer_two(ctx, second, schedule_of_nine);
    const double loss_one = trainer_one.step(PackedBatch(std::span(&one, 1))).loss;
    const double loss_two = trainer_two.step(PackedBatch(std::span(&two, 1))).loss;
    CHECK((loss_one == loss_two) == !counts);
    CHECK(same_bits(weights_in(first), weights_in(second)) == !counts);
  }
}

TEST_CASE("a batch in which nothing counts and a target outside the vocabulary are typed errors") {
  Cpu ctx(1);
  Composed model = make_model();
  Trainer trainer(ctx, model, schedule_of_nine);
  const Matrix<float> before = weights_in(model);
  const Example silent{{1, 2}, {3}, {false}}, outside{{1, 2}, {vocabulary}}, inside{{1, 2}, {3}};
  const PackedBatch nothing(std::span(&silent, 1));
  CHECK_THROWS_AS(trainer.step(nothing), calm::ShapeError);
  CHECK_THROWS_AS(calm::mean_loss(ctx, model, std::span(&nothing, 1)), calm::ConfigError);
  CHECK(contains(message_of<calm::ShapeError>([&] { trainer.step(PackedBatch(std::span(&outside, 1))); }), "17"));
  CHECK(trainer.step_count() == 0);
  CHECK(same_bits(weights_in(model), before));
  // Beside a batch that counts it does no harm.
  const PackedBatch something(std::span(&inside, 1));
  const std::vector<TrainingBatch> both = {{&nothing, nullptr}, {&something, nullptr}};
  CHECK(std::isfinite(trainer.step(std::span(both)).loss));
}

TEST_CASE("options that make no sense are refused by name, and so is a batch that is none") {
  Cpu ctx(1);
  Composed model = make_model();
  const auto refusal = [&](const calm::CosineSchedule& schedule, const calm::AdamWOptions& options) {
    return message_of<calm::ConfigError>([&] { Trainer(ctx, model, schedule, options); });
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(contains(refusal({.peak = nan}, {}), "peak is nan"));
  CHECK(contains(refusal({.steps = -1}, {}), "steps is -1"));
  CHECK(contains(refusal({.warmup = -3}, {}), "warmup is -3"));
  CHECK(contains(refusal({.final_fraction = -0.1}, {}), "final_fraction"));
  CHECK(contains(refusal({}, {.beta2 = 1}), "beta2 is 1"));
  CHECK(contains(refusal({}, {.epsilon = 0}), "epsilon is 0"));
  CHECK(contains(refusal({}, {.weight_decay = nan}), "weight_decay is nan"));
  CHECK(contains(refusal({}, {.clip_norm = -1}), "clip_norm is -1"));
  Trainer trainer(ctx, model, schedule_of_nine);
  const TrainingBatch none;
  CHECK(contains(message_of<calm::ConfigError>([&] { trainer.step(std::span(&none, 1)); }), "TrainingBatch 0"));
}

TEST_CASE("accumulated batches give the step of one batch that holds them all") {
  Cpu ctx(1);
  Composed apart = make_model(), together = make_model();
  Trainer trainer_apart(ctx, apart, schedule_of_nine), trainer_together(ctx, together, schedule_of_nine);
  // One batch has far more scored tokens than the other, so that a mean of means would differ.
  const std::vector<Example> large = random_examples(12, 3), small = {{{1, 2}, {3}}};
  std::vector<Example> all = large;
  all.insert(all.end(), small.begin(), small.end());
  const PackedBatch first(large), second(small), joined(all);
  const std::vector<TrainingBatch> batches = {{&first, nullptr}, {&second, nullptr}};
  const calm::StepResult one = trainer_apart.step(std::span(batches)), other = trainer_together.step(joined);
  CHECK(one.loss == doctest::Approx(other.loss).epsilon(1e-6));
  CHECK(one.gradient_norm == doctest::Approx(other.gradient_norm).epsilon(1e-6));
  CHECK(one.tokens == other.tokens);
  CHECK(relative_difference(gradients_in(trainer_apart), gradients_in(trainer_together)) < 1e-6);
  const double losses =
      calm::mean_loss(ctx, make_model(), std::span(&first, 1)) * static_cast<double>(first.rows().size()) +
      calm::mean_loss(ctx, make_model(), std::span(&second, 1)) * static_cast<double>(second.rows().size());
  CHECK(one.loss == doctest::Approx(losses / static_cast<double>(joined.rows().size())).epsilon(1e-6));
}

namespace {

/// About 2,000 tokens: several pieces.
std::vector<Example> many_examples() { return random_examples(360, 7); }

}  // namespace

TEST_CASE("the pieces of a batch hold its sequences in order, and they are of about the same size") {
  const auto examples = many_examples();
  const PackedBatch batch(examples);
  const auto pieces = batch.pieces();
  REQUIRE(pieces.size() > 4);
  Index tokens = 0, sequences = 0;
  const auto average = batch.tokens().tokens() / static_cast<Index>(pieces.size());
  CHECK(average <= PackedBatch::piece_tokens);
  std::vector<TokenId> ids, targets;
  std::vector<Index> rows;
  for (const PackedBatch& piece : pieces) {
    CHECK(std::abs(piece.tokens().tokens() - average) <= 12);  // a sequence has up to 11
    CHECK(piece.pieces().size() == 1);
    CHECK(piece.pieces().data() == &piece);
    ids.insert(ids.end(), piece.tokens().ids.begin(), piece.tokens().ids.end());
    targets.insert(targets.end(), piece.targets().begin(), piece.targets().end());
    for (const Index row : piece.rows()) rows.push_back(tokens + row);
    for (Index s = 0; s < piece.tokens().sequences(); ++s)
      CHECK(piece.tokens().prompt_length(s) == batch.tokens().prompt_length(sequences + s));
    tokens += piece.tokens().tokens();
    sequences += piece.tokens().sequences();
  }
  CHECK(std::equal(ids.begin(), ids.end(), batch.tokens().ids.begin(), batch.tokens().ids.end()));
  CHECK(std::equal(targets.begin(), targets.end(), batch.targets().begin(), batch.targets().end()));
  CHECK(std::equal(rows.begin(), rows.end(), batch.rows().begin(), batch.rows().end()));

  const Example longest{random_tokens(2, vocabulary, 1), random_tokens(PackedBatch::piece_tokens + 9, vocabulary, 2)};
  PackedBatch around(std::vector<Example>{longest, examples[0], longest});
  REQUIRE(around.pieces().size() == 3);
  around.add(examples[1]);
  CHECK(around.pieces().back().tokens().sequences() == 2);
  CHECK(around.tokens().sequences() == 4);
}

TEST_CASE("a step in shares is the step of the whole batch, and has the same bits for any number of threads") {
  const PackedBatch batch(many_examples());
  const auto step_on = [&](int threads, Index shares, calm::KeptStates<Composed>* kept = nullptr) {
    Cpu ctx(threads);
    Composed model = make_model();
    calm::Trainer trainer(ctx, model, schedule_of_nine, {}, shares);
    const TrainingBatch one{&batch, kept};
    CHECK(trainer.step(std::span(&one, 1)).tokens == batch.tokens().tokens());
    const Matrix<float> gradients = gradients_in(trainer);
    trainer.step(std::span(&one, 1));  // from kept states
    return std::pair(gradients, weights_in(model));
  };
  const auto whole = step_on(1, 1);
  for (const Index shares : {2, 3, 12}) {
    CAPTURE(shares);
    const auto expected = step_on(1, shares);
    CHECK(!same_bits(expected.first, whole.first));  // or nothing was cut
    CHECK(relative_difference(expected.first, whole.first) < 1e-5);
    CHECK(relative_difference(expected.second, whole.second) < 1e-3);  // AdamW magnifies small gradients
    for (const int threads : {2, 3, 4, 7}) {
      CAPTURE(threads);
      calm::KeptStates<Composed> kept;
      const auto found = step_on(threads, shares, threads == 3 ? &kept : nullptr);
      CHECK(same_bits(found.first, expected.first));
      CHECK(same_bits(found.second, expected.second));
    }
  }
  const auto loss_on = [&](int threads) {
    Cpu ctx(threads);
    return calm::mean_loss(ctx, make_model(), std::span(&batch, 1));
  };
  for (const int threads : {2, 3, 4}) CHECK(loss_on(threads) == loss_on(1));
}

TEST_CASE("what goes wrong in a share is thrown by the step, and the next step works") {
  Cpu ctx(3);
  Composed model = make_model();
  Trainer trainer(ctx, model, schedule_of_nine);
  auto examples = many_examples();
  const PackedBatch good(examples);
  examples[200].completion[0] = vocabulary;
  const Matrix<float> before = weights_in(model);
  CHECK_THROWS_AS(trainer.step(PackedBatch(examples)), calm::ShapeError);
  CHECK(same_bits(weights_in(model), before));
  CHECK(std::isfinite(trainer.step(good).loss));
}

TEST_CASE("the norm is reported before clipping, and what the optimizer takes has the norm of the clip") {
  const PackedBatch batch(random_examples(6, 4));
  Matrix<float> unclipped;
  for (const double clip : {0.0, 1e-3, 1e6}) {
    CAPTURE(clip);
    Cpu ctx(1);
    Composed model = make_model();
    Trainer trainer(ctx, model, schedule_of_nine, {.beta1 = 0.75, .clip_norm = clip});
    const double norm = trainer.step(batch).gradient_norm;
    double squares = 0, taken = 0;
    for (const float g : trainer.gradients().values()) squares += static_cast<double>(g) * static_cast<double>(g);
    CHECK(norm == doctest::Approx(std::sqrt(squares)).epsilon(1e-6));
    CHECK(norm > 1e-2);
    for (const float m : trainer.optimizer().first_moment().values())
      taken += static_cast<double>(m) * static_cast<double>(m);
    CHECK(std::sqrt(taken) == doctest::Approx(0.25 * (clip == 1e-3 ? clip : norm)).epsilon(1e-5));
    if (clip == 0) unclipped = weights_in(model);
    if (clip == 1e6) CHECK(same_bits(weights_in(model), unclipped));
  }
}

TEST_CASE("a step is that of AdamW with decoupled decay, which norms and gates do not have") {
  Cpu ctx(1);
  Composed model = make_model({.gate = calm::Gate::tanh});
  const calm::AdamWOptions options{.beta1 = 0.8, .beta2 = 0.9, .epsilon = 1e-6, .weight_decay = 3, .clip_norm = 0.5};
  const calm::CosineSchedule schedule{.peak = 0.05, .warmup = 0, .steps = 5};
  Trainer trainer(ctx, model, schedule, options);
  const auto count = static_cast<std::size_t>(calm::count_parameters(model));
  std::vector<double> m(count, 0), v(count, 0), decays;
  std::set<std::string> exempt;
  calm::for_each_parameter(model, [&](const std::string& name, const auto& parameter) {
    const bool is_exempt = contains(name, "norm") || contains(name, ".gate");
    if (is_exempt) exempt.insert(name);
    decays.insert(decays.end(), static_cast<std::size_t>(parameter.value.size()), is_exempt ? 0 : options.weight_decay);
  });
  CHECK(exempt.size() == 6);
  for (int step = 1; step <= 3; ++step) {
    const Matrix<float> before = weights_in(model);
    const double norm =
        trainer.step(PackedBatch(random_examples(6, 4 + static_cast<std::uint64_t>(step)))).gradient_norm;
    const Matrix<float> after = weights_in(model), gradients = gradients_in(trainer);
    const double scale = std::min(1.0, options.clip_norm / norm), rate = schedule(step);
    double worst = 0, moved_exempt = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const double g = scale * static_cast<double>(gradients.values()[i]);
      m[i] = options.beta1 * m[i] + (1 - options.beta1) * g;
      v[i] = options.beta2 * v[i] + (1 - options.beta2) * g * g;
      const double direction = m[i] / (1 - std::pow(options.beta1, step)) /
                               (std::sqrt(v[i] / (1 - std::pow(options.beta2, step))) + options.epsilon);
      const double x = static_cast<double>(before.values()[i]);
      const double expected = x - rate * decays[i] * x - rate * direction;
      worst = std::max(worst, std::abs(expected - static_cast<double>(after.values()[i])));
      if (decays[i] == 0) moved_exempt = std::max(moved_exempt, std::abs(x - static_cast<double>(after.values()[i])));
    }
    CHECK(worst < 2e-6);
    CHECK(moved_exempt > 1e-3);  // they train all the same
  }
}

TEST_CASE("training leaves every bit of the anchor and the augment") {
  Cpu ctx(1);
  Composed model = make_model();
  const std::string anchor = calm::hash_of_weights(model.anchor()), augment = calm::hash_of_weights(model.augment<0>());
  const Matrix<float> before = weights_in(model);
  Trainer trainer(ctx, model, schedule_of_nine);
  for (std::uint64_t i = 0; i < 4; ++i) trainer.step(PackedBatch(random_examples(6, i)));
  CHECK(calm::hash_of_weights(model.anchor()) == anchor);
  CHECK(calm::hash_of_weights(model.augment<0>()) == augment);
  CHECK(!same_bits(weights_in(model), before));
}

TEST_CASE("states that are kept over epochs give the same bits as states computed anew") {
  const PackedDataset data(random_examples(20, 1), 24, 3);
  REQUIRE(data.size() >= 3);
  REQUIRE(data.size() <= 8);  // 18 batches are visited: every one more than once
  const Ending anew = run(data, {});
  for (const std::size_t keep_bytes : {std::size_t{1}, std::size_t{5000}, std::size_t{1} << 30}) {
    CAPTURE(keep_bytes);
    const Ending kept = run(data, {}, nullptr, -1, keep_bytes);
    CHECK(same_bits(kept.weights, anew.weights));
    CHECK(kept.losses == anew.losses);
  }
}

TEST_CASE("states that were kept for one augment serve another over the same anchor once it has read the batches") {
  const std::vector<Example> examples = random_examples(90, 1);
  for (const Index batch_tokens : {24, 5000}) {  // batches that are their only piece, and one of several
    const PackedDataset data(examples, batch_tokens, 3);
    CHECK((data[0].pieces().size() > 1) == (batch_tokens == 5000));
    Cpu ctx(1);
    calm::DatasetBatches<Composed> batches(data, 1, 1 << 30);
    const auto train = [&](Composed& model, calm::DatasetBatches<Composed>& from) {
      Trainer trainer(ctx, model, schedule_of_nine);
      for (Index step = 0; step < 9; ++step) trainer.step(std::span<const TrainingBatch>(from(step)));
      return weights_in(model);
    };
    Composed first = make_model(), second = make_model({}, 3), anew = make_model({}, 3);
    train(first, batches);
    Index kept = 0;
    batches.for_each_kept([&](const calm::PackedBatch& batch, calm::KeptStates<Composed>& states) {
      CHECK(states.states.lower.view().rows == batch.tokens().tokens());
      ctx.arena.reset();
      second.prepare_augments(ctx, batch.tokens(), states.states);
      ++kept;
    });
    CHECK(kept >= std::min<Index>(9, data.size()));
    calm::DatasetBatches<Composed> none(data, 1, 0);
    CHECK(same_bits(train(second, batches), train(anew, none)));
  }
}

TEST_CASE("a batch that comes several times in a step gives the same bits with kept states on several threads") {
  const PackedDataset data(random_examples(60, 1), 100000, 3);
  REQUIRE(data.size() == 1);
  std::vector<double> losses[2];
  for (const std::size_t keeps : {std::size_t{0}, std::size_t{1}}) {
    Cpu ctx(keeps == 1 ? 4 : 1);
    Composed model = make_model();
    Trainer trainer(ctx, model, schedule_of_nine);
    for (int run = 0; run < 20; ++run) {
      calm::DatasetBatches<Composed> batches(data, 6, keeps << 30);
      for (Index step = 0; step < 2; ++step) {
        const auto six = batches(step);
        losses[keeps].push_back(trainer.step(std::span(six)).loss);
      }
    }
  }
  CHECK(losses[0] == losses[1]);
}

TEST_CASE("batches of which nothing is scored are left out of a dataset, but wrong examples are refused as ever") {
  const std::vector<Example> examples = {{{1}, {2, 3}}, {{1}, {2, 3}, {false, false}}, {{4}, {5}, {true}}};
  const PackedDataset data(examples, 1, 3);
  CHECK(data.size() == 2);
  for (const PackedBatch& batch : data.batches()) CHECK(!batch.empty());
  CHECK(contains(message_of<calm::ConfigError>([&] { PackedDataset(std::span(examples).subspan(1, 1), 1, 3); }),
                 "with a scored token"));
  const std::vector<Example> wrong = {{{1}, {2, 3}, {false}}};
  CHECK(contains(message_of<calm::ShapeError>([&] { PackedDataset(wrong, 1, 3); }), "says of 1 tokens"));
}

TEST_CASE("an update that makes the weights infinite leaves the last good checkpoint") {
  const PackedDataset data(random_examples(20, 1), 24, 3);
  const Folder folder;
  RunOptions options{.folder = folder.path, .checkpoint_every = 1};
  CHECK_THROWS_AS(run(data, options, nullptr, 3), Killed);
  const std::string good = read(folder.path / "last.safetensors");
  Cpu ctx(1);
  Composed model = make_model();
  Trainer trainer(ctx, model, calm::CosineSchedule{.peak = 1e39, .warmup = 0, .steps = 9});
  calm::DatasetBatches<Composed> batches(data, 2, 0);
  options.resume = true;
  CHECK(contains(
      message_of<calm::NumericError>([&] { calm::run_training<Composed, Cpu>(trainer, std::ref(batches), options); }),
      "after training step 4 a weight of "));
  CHECK(read(folder.path / "last.safetensors") == good);
  // Also the last update of a run that keeps nothing is looked at.
  Composed fresh = make_model();
  Trainer only(ctx, fresh, calm::CosineSchedule{.peak = 1e39, .warmup = 0, .steps = 1});
  CHECK(contains(message_of<calm::NumericError>([&] {
                   calm::run_training<Composed, Cpu>(
                       only, [&](Index step) { return batches(step); }, RunOptions{});
                 }),
                 "after training step 1 a weight of "));
}

TEST_CASE("a folder that cannot be made is an IoError that names it") {
  const Folder folder;
  std::ofstream(folder.path / "file") << "x";
  for (const auto& path : {folder.path / "file", folder.path / "file" / "inside"}) {
    Cpu ctx(1);
    Composed model = make_model();
    Trainer trainer(ctx, model, schedule_of_nine);
    const auto run_in = [&] {
      calm::run_training<Composed, Cpu>(
          trainer, [](Index) { return std::vector<TrainingBatch>{}; }, RunOptions{.folder = path});
    };
    CHECK(contains(message_of<calm::IoError>(run_in), path.string()));
    CHECK(contains(message_of<calm::IoError>([&] { calm::save_model(model.anchor(), path); }), path.string()));
  }
}

TEST_CASE("states are kept until they hold the bytes that were allowed, and are the same object again") {
  const PackedDataset data(random_examples(20, 1), 24, 3);
  Cpu ctx(1);
  Composed model = make_model();
  std::size_t all = 0;
  for (const std::size_t keep_bytes : {std::size_t{1} << 30, std::size_t{0}, std::size_t{1}}) {
    CAPTURE(keep_bytes);
    Trainer trainer(ctx, model, schedule_of_nine);
    calm::DatasetBatches<Composed> batches(data, 1, keep_bytes);
    std::set<const void*> kept;
    for (Index step = 0; step < 3 * data.size(); ++step) {
      const auto one = batches(step);
      REQUIRE(one.size() == 1);
      CHECK(one[0].batch == &data[data.at(step)]);
      if (one[0].kept) {
        CHECK(one[0].kept->filled == (kept.count(one[0].kept) > 0));
        kept.insert(one[0].kept);
      }
      trainer.step(std::span(one));
    }
    if (keep_bytes > 1) all = batches.kept_bytes();
    CHECK(kept.size() == std::min(keep_bytes, static_cast<std::size_t>(data.size())));  // one batch goes over one byte
    CHECK((batches.kept_bytes() == 0) == (keep_bytes == 0));
    if (keep_bytes == 1) CHECK(batches.kept_bytes() < all);
  }
}

TEST_CASE("a run that is killed after any step and resumed ends with the same bits") {
  const PackedDataset data(random_examples(20, 1), 24, 3), held_out(random_examples(5, 2), 30, 1);
  for (const bool validated : {false, true}) {
    CAPTURE(validated);
    const PackedDataset* validation = validated ? &held_out : nullptr;
    const Folder whole;
    RunOptions options{.folder = whole.path, .checkpoint_every = 2, .validate_every = 3, .fingerprint = "run"};
    const Ending expected = run(data, options, validation);
    CHECK(expected.validation_losses.size() == (validated ? 3 : 0));
    CHECK(std::filesystem::exists(whole.path / "best.safetensors") == validated);
    CHECK(same_bits(run(data, {.validate_every = 3}, validation).weights, expected.weights));  // files change nothing
    for (Index killed = 1; killed <= 9; ++killed) {
      CAPTURE(killed);
      const Folder folder;
      options.folder = folder.path;
      options.resume = true;
      CHECK_THROWS_AS(run(data, options, validation, killed, killed % 2 == 0 ? 0 : 1 << 20), Killed);
      const Ending resumed = run(data, options, validation);
      CHECK(static_cast<Index>(resumed.losses.size()) == 9 - (killed == 9 ? 9 : killed / 2 * 2));
      CHECK(same_bits(resumed.weights, expected.weights));
      CHECK(read(folder.path / "last.safetensors") == read(whole.path / "last.safetensors"));
      if (validated) CHECK(read(folder.path / "best.safetensors") == read(whole.path / "best.safetensors"));
    }
    // Without `resume` a run starts anew.
    options = {.folder = whole.path, .validate_every = 3, .fingerprint = "run"};
    const Ending again = run(data, options, validation);
    CHECK(again.losses == expected.losses);
  }
}

TEST_CASE("a run ends with the weights of the best validation loss, also over a kill") {
  const PackedDataset data(random_examples(20, 1), 24, 3);
  const std::vector<double> losses = {0, 5, 3, 4, 2, 2, 7, 8, 9, 2.5};  // by step; the first best counts
  for (const Index killed : {Index{0}, Index{3}, Index{4}, Index{6}}) {
    CAPTURE(killed);
    const Folder folder;
    Matrix<float> after_four, ended;
    const auto train = [&](Index killed_after) {
      Cpu ctx(1);
      Composed model = make_model();
      Trainer trainer(ctx, model, schedule_of_nine);
      calm::DatasetBatches<Composed> batches(data, 1, 0);
      calm::run_training<Composed, Cpu>(
          trainer, std::ref(batches),
          {.folder = folder.path, .checkpoint_every = 2, .validate_every = 1, .resume = true},
          [&] { return losses[static_cast<std::size_t>(trainer.step_count())]; },
          [&](const StepReport& report) {
            CHECK(report.validation_loss == losses[static_cast<std::size_t>(report.step)]);
            if (report.step == 4) after_four = weights_in(model);
            if (report.step == killed_after) throw Killed{};
          });
      ended = weights_in(model);
    };
    if (killed > 0) CHECK_THROWS_AS(train(killed), Killed);
    train(0);
    CHECK(same_bits(ended, after_four));
    Composed loaded = make_model();
    calm::load_parameters(loaded, calm::SafetensorsFile(folder.path / "best.safetensors"));
    CHECK(same_bits(weights_in(loaded), after_four));
    calm::load_parameters(loaded, calm::SafetensorsFile(folder.path / "last.safetensors"));
    CHECK(!same_bits(weights_in(loaded), after_four));
  }
}

TEST_CASE("a validation loss that is not finite stops the run, and a best checkpoint of another run is not taken") {
  const PackedDataset data(random_examples(20, 1), 24, 3), held_out(random_examples(5, 2), 30, 1);
  const Folder folder;
  run(data, {.folder = folder.path, .validate_every = 3}, &held_out);
  const std::string best = read(folder.path / "best.safetensors"), last = read(folder.path / "last.safetensors");
  Cpu ctx(1);
  Composed model = make_model();
  Trainer trainer(ctx, model, schedule_of_nine);
  calm::DatasetBatches<Composed> batches(data, 1, 0);
  const auto message = message_of<calm::NumericError>([&] {
    calm::run_training<Composed, Cpu>(trainer, std::ref(batches), {.folder = folder.path, .validate_every = 4},
                                      [] { return std::nan(""); });
  });
  CHECK(contains(message, "validation loss after step 4 is nan"));
  CHECK(trainer.step_count() == 4);
  CHECK(read(folder.path / "best.safetensors") == best);
  CHECK(read(folder.path / "last.safetensors") == last);
}

TEST_CASE("a checkpoint of a run with other options is refused, with both named") {
  const PackedDataset data(random_examples(20, 1), 24, 3);
  const Folder folder;
  run(data, {.folder = folder.path, .fingerprint = "lr 0.1"});
  const std::string error = message_of<calm::FormatError>(
      [&] { run(data, {.folder = folder.path, .resume = true, .fingerprint = "lr 0.2"}); });
  CHECK(contains(error, "last.safetensors"));
  CHECK(contains(error, "lr 0.1"));
  CHECK(contains(error, "lr 0.2"));
}

TEST_CASE("a checkpoint that was cut off or tampered with is a typed error") {
  const PackedDataset data(random_examples(20, 1), 24, 3);
  const Folder folder;
  const RunOptions options{.folder = folder.path, .resume = true};
  run(data, {.folder = folder.path});
  const auto path = folder.path / "last.safetensors";
  const std::string bytes = read(path);
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{7}, std::size_t{100}, bytes.size() / 2, bytes.size() - 1}) {
    CAPTURE(size);
    write(path, bytes.substr(0, size));
    CHECK_THROWS_AS(run(data, options), calm::Error);
  }
  const std::size_t step = bytes.find("\"step\":\"9\"");
  REQUIRE(step != std::string::npos);
  for (const char* other : {"\"step\":\"x\"", "\"step\":\"-\"", "\"step\":\" \"", "\"stop\":\"9\""}) {
    CAPTURE(other);
    write(path, std::string(bytes).replace(step, 10, other));
    CHECK(contains(message_of<calm::FormatError>([&] { run(data, options); }), "last.safetensors"));
  }
  // A plain file of weights is no checkpoint.
  calm::save_parameters(make_model(), path);
  CHECK(contains(message_of<calm::FormatError>([&] { run(data, options); }), "no checkpoint"));
}

TEST_CASE("a checkpoint that was cut off or damaged leaves the trainer as it was") {
  const PackedDataset data(random_examples(20, 1), 24, 3);
  const Folder folder;
  run(data, {.folder = folder.path});
  const auto path = folder.path / "last.safetensors";
  const std::string bytes = read(path);
  Cpu ctx(1);
  Composed model = make_model();
  Trainer trainer(ctx, model, calm::CosineSchedule{.steps = 9});
  const Matrix<float> weights = weights_in(model);
  const auto check_untouched = [&] {
    CHECK_THROWS_AS(calm::load_checkpoint(trainer, path, ""), calm::FormatError);
    CHECK(trainer.step_count() == 0);
    CHECK(same_bits(weights_in(model), weights));
    for (const auto* moment : {&trainer.optimizer().first_moment(), &trainer.optimizer().second_moment()})
      CHECK(std::all_of(moment->values().begin(), moment->values().end(), [](float x) { return x == 0; }));
  };
  // Of every name that is read one after the other, the last as well as the first.
  for (const std::string name : {"links.0.q_proj.weight", "links.1.o_proj.weight", "optimizer.first_moment",
                                 "optimizer.second_moment", "best_validation_loss"}) {
    CAPTURE(name);
    const std::size_t place = bytes.find('"' + name + '"');
    REQUIRE(place != std::string::npos);
    write(path, std::string(bytes).replace(place + 1, 1, "X"));
    check_untouched();
  }
  std::uint64_t header = 0;
  std::memcpy(&header, bytes.data(), sizeof(header));
  for (std::size_t size = 0; size < bytes.size(); size += size < header + 64 ? 1 : 499) {
    CAPTURE(size);
    write(path, bytes.substr(0, size));
    check_untouched();
  }
  write(path, bytes);
  calm::load_checkpoint(trainer, path, "");
  CHECK(trainer.step_count() == 9);
}

TEST_CASE("a loss or gradient that is no number stops the step by name and leaves the weights") {
  const PackedBatch batch(random_examples(6, 4));
  const std::string projection = "links.0.projection.weight";
  for (const bool in_loss : {true, false}) {
    CAPTURE(in_loss);
    Cpu ctx(1);
    Composed model = make_model();
    Trainer trainer(ctx, model, schedule_of_nine);
    trainer.step(batch);
    if (in_loss) {
      set_weight(model, projection, [](float& x) { x = std::numeric_limits<float>::quiet_NaN(); });
    } else {  // a map of 1e-30 before one of 1e30: the loss is as usual, the gradient between them too large
      set_weight(model, projection, [](float& x) { x *= 1e-30F; });
      set_weight(model, "links.0.o_proj.weight", [](float& x) { x *= 1e30F; });
      CHECK(std::isfinite(calm::mean_loss(ctx, model, std::span(&batch, 1))));
    }
    const Matrix<float> before = weights_in(model), moment = trainer.optimizer().second_moment();
    const std::string error = message_of<calm::NumericError>([&] { trainer.step(batch); });
    CHECK(contains(error, "training step 2"));
    CHECK(contains(error, in_loss ? "the loss is" : "gradient"));
    CHECK(same_bits(weights_in(model), before));
    CHECK(same_bits(trainer.optimizer().second_moment(), moment));
    CHECK(trainer.step_count() == 1);
  }
}

TEST_CASE("a run that meets NaN keeps its last good checkpoint") {
  const PackedDataset data(random_examples(20, 1), 24, 3);
  const Folder folder;
  const auto path = folder.path / "last.safetensors";
  std::string at_four;
  Cpu ctx(1);
  Composed model = make_model();
  Trainer trainer(ctx, model, schedule_of_nine);
  calm::DatasetBatches<Composed> batches(data, 2, 0);
  const std::string error = message_of<calm::NumericError>([&] {
    calm::run_training<Composed, Cpu>(
        trainer,
        [&](Index step) {
          if (step == 5) set_weight(model, "links.1.q_proj.weight", [](float& x) { x = not_a_number<float>; });
          return batches(step);
        },
        {.folder = folder.path, .checkpoint_every = 2}, {},
        [&](const StepReport& report) {
          if (report.step == 4) at_four = read(path);
        });
  });
  CHECK(contains(error, "training step 6"));
  CHECK(!at_four.empty());
  CHECK(read(path) == at_four);
  const Ending resumed = run(data, {.folder = folder.path, .resume = true});
  CHECK(resumed.losses.size() == 5);
  CHECK(same_bits(resumed.weights, run(data, {}).weights));
}

}  // namespace train_test
