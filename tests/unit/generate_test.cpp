// The sampler, stop strings, and generation against forward passes without caches.
#include <doctest/doctest.h>
#include <calm/compose/any_augment.hpp>
#include <calm/generate/generate.hpp>
#include <support/models.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace generate_test {
using namespace calm_test;
using calm::AtContextLimit;
using calm::FinishReason;
using calm::GenerateOptions;
using calm::Generation;
using calm::Sampler;
using calm::SamplerOptions;
using calm::StreamedToken;

namespace {

using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, float>;
using Composed = calm::ComposedModel<Llama, Llama>;
using Prompts = std::vector<std::vector<TokenId>>;

constexpr Index vocabulary = 19;

std::shared_ptr<const Llama> make_anchor(Index context = 64) {
  const calm::ModelSpec spec{
      .vocabulary = vocabulary, .width = 16, .hidden = 24, .blocks = 2, .heads = {2, 1, 8}, .context = context};
  return std::make_shared<const Llama>(spec, TestWeights{1, calm::DType::f32});
}
std::shared_ptr<const Llama> make_augment(Index context = 64) {
  const calm::ModelSpec spec{
      .vocabulary = vocabulary, .width = 12, .hidden = 16, .blocks = 2, .heads = {2, 2, 6}, .context = context};
  return std::make_shared<const Llama>(spec, TestWeights{2, calm::DType::f32});
}
Composed make_composed(Index augment_context = 64, std::vector<std::shared_ptr<const calm::Aligner>> aligners = {}) {
  Composed model(make_anchor(), {make_augment(augment_context)}, {{0, 0, 0}, {0, 1, 1}}, {}, std::move(aligners));
  randomise(model, 9);
  return model;
}

/// Gives the stream of all tokens, whatever is asked for.
struct ModelOfAllRows : Composed {
  explicit ModelOfAllRows(Composed model) : Composed(std::move(model)) {}
  MatrixView<float> advance(auto& ctx, Session& session, calm::TokenBatch batch, auto&& observer) const {
    batch.rows = {};
    return Composed::advance(ctx, session, batch, observer);
  }
};

Prompts make_prompts() {
  Prompts prompts;
  std::uint64_t seed = 1;
  for (const Index length : {7, 1, 12, 3}) prompts.push_back(random_tokens(length, vocabulary, seed++));
  return prompts;
}

template <class Model>
std::vector<Generation> run(const Model& model, const Prompts& prompts, const GenerateOptions& options,
                            const std::function<void(const StreamedToken&)>& stream = {}) {
  Cpu ctx(1);
  return calm::generate(ctx, model, std::span<const std::vector<TokenId>>(prompts), options, stream);
}

/// Logits of the last position of prompt and continuation, by a pass without caches.
template <class Model>
Matrix<float> last_logits(const Model& model, const std::vector<TokenId>& prompt, std::vector<TokenId> continuation) {
  Cpu ctx(1);
  continuation.insert(continuation.begin(), prompt.begin(), prompt.end());
  Batch batch;
  batch.add(continuation, static_cast<Index>(prompt.size()));
  const Matrix<float> logits = forward_logits(model, ctx, batch);
  return copy_of(constant(logits).middle_rows(logits.rows() - 1, 1));
}

double log_softmax(const Matrix<float>& logits, TokenId id) {
  double total = 0;
  for (const float x : logits.values()) total += std::exp(static_cast<double>(x));
  return static_cast<double>(logits(0, id)) - std::log(total);
}

/// Greedy continuations and log-probabilities of every prompt against the definition.
template <class Model>
void check_greedy(const Model& model) {
  const Prompts prompts = make_prompts();
  const auto results = run(model, prompts, {.max_new_tokens = 12});
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    CAPTURE(p);
    REQUIRE(results[p].ids.size() == 12);
    REQUIRE(results[p].log_probabilities.size() == 12);
    CHECK(results[p].reason == FinishReason::length);
    std::vector<TokenId> so_far;
    for (std::size_t i = 0; i < 12; ++i) {
      const Matrix<float> logits = last_logits(model, prompts[p], so_far);
      const auto values = logits.values();
      CHECK(results[p].ids[i] == std::max_element(values.begin(), values.end()) - values.begin());
      CHECK(results[p].log_probabilities[i] == doctest::Approx(log_softmax(logits, results[p].ids[i])).epsilon(1e-4));
      so_far.push_back(results[p].ids[i]);
    }
  }
}

/// How often each of the logits' tokens is drawn.
std::vector<double> frequencies(const std::vector<float>& logits, const SamplerOptions& options, int draws = 20000) {
  Sampler sampler(options);
  calm::Random random(7, 1);
  std::vector<double> counts(logits.size(), 0);
  for (int i = 0; i < draws; ++i)
    counts[static_cast<std::size_t>(sampler(std::span(logits), random).id)] += 1.0 / draws;
  return counts;
}

void check_frequencies(const std::vector<double>& found, const std::vector<double>& expected) {
  REQUIRE(found.size() == expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    CAPTURE(i);
    CHECK(std::abs(found[i] - expected[i]) < 0.015);  // four standard deviations of 20,000 draws
    if (expected[i] == 0) CHECK(found[i] == 0);
  }
}

/// The token that is drawn where all that may be are put in order, the most likely first, or stay in that of their ids
/// where nothing is cut off.
std::size_t drawn_in_order(const std::vector<float>& logits, const SamplerOptions& options, calm::Random& random) {
  std::vector<std::size_t> order(logits.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (options.top_k > 0 || options.top_p < 1)
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
  if (options.top_k > 0) order.resize(std::min(order.size(), static_cast<std::size_t>(options.top_k)));
  const float largest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> up_to;  // the weights of the first tokens
  double total = 0;
  for (const std::size_t id : order)
    up_to.push_back(total += std::exp(static_cast<double>(logits[id] - largest) / options.temperature));
  const auto last = std::lower_bound(up_to.begin(), up_to.end(), options.top_p * total);
  const double point = (random.uniform() + 0x1p-25) * *last;
  return order[static_cast<std::size_t>(std::upper_bound(up_to.begin(), last, point) - up_to.begin())];
}

/// Tokens as text: one, two or three letters, so that stop strings begin and end inside of tokens.
std::string text_of(TokenId id) {
  const auto letter = [](TokenId i) { return static_cast<char>('a' + i % 5); };
  std::string text(1, letter(id));
  if (id % 2 == 1) text += letter(id / 2);
  if (id % 3 == 1) text += letter(id / 3);
  return text;
}

/// Where the first of the stop strings begins.
std::size_t first_of(const std::string& text, const std::vector<std::string>& stops) {
  std::size_t found = std::string::npos;
  for (const std::string& stop : stops) found = std::min(found, text.find(stop));
  return found;
}

}  // namespace

TEST_CASE("greedy decoding takes the most likely token of a pass without caches, and its log-probability") {
  SUBCASE("of a Transformer") { check_greedy(*make_anchor()); }
  SUBCASE("of a composed model") { check_greedy(make_composed()); }
}

TEST_CASE("the logits of what comes next are those of each sequence's last position") {
  const Composed model = make_composed();
  Cpu ctx(2);
  auto session = model.make_session(ctx, 3, 20);
  const Batch batch = random_batch({{7, 4}, {1, 1}, {12, 9}}, vocabulary, 4);
  const Matrix<float> all = forward_logits(model, ctx, batch);
  ctx.arena.reset();
  const Matrix<float> next = copy_of(calm::next_logits(ctx, model, session, batch.cached()));
  REQUIRE(next.rows() == 3);
  for (Index s = 0; s < 3; ++s)
    for (Index j = 0; j < vocabulary; ++j)
      CHECK(next(s, j) == doctest::Approx(all(batch.offsets[static_cast<std::size_t>(s) + 1] - 1, j)).epsilon(1e-4));
  CHECK(session.length(2) == 12);
  const Batch with_empty = random_batch({{2, 0}, {0, 0}}, vocabulary, 4);
  CHECK(contains(message_of<calm::ShapeError>([&] { calm::next_logits(ctx, model, session, with_empty.cached()); }),
                 "sequence 1 has no token"));
  CHECK(session.length(0) == 7);

  Batch one_each;
  for (const TokenId id : {5, 2, 7}) one_each.add({id});
  const std::vector<Index> second{1};
  calm::TokenBatch tokens = one_each.cached();
  tokens.rows = second;  // of no effect
  ctx.arena.reset();
  CHECK(calm::next_logits(ctx, model, session, tokens).rows == 3);
  const ModelOfAllRows stubborn{model};
  auto other = model.make_session(ctx, 3, 20);
  CHECK(contains(message_of<calm::ShapeError>([&] { calm::next_logits(ctx, stubborn, other, batch.cached()); }),
                 "gave 20 rows where the batch asks for 3"));
}

TEST_CASE("prompts of different lengths side by side get what each gets alone") {
  const Composed model = make_composed();
  const Prompts prompts = make_prompts();
  const GenerateOptions options{.max_new_tokens = 12};
  const auto together = run(model, prompts, options);
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    CAPTURE(p);
    const auto alone = run(model, {prompts[p]}, options);
    CHECK(together[p].ids == alone[0].ids);
    for (std::size_t i = 0; i < 12; ++i)
      CHECK(together[p].log_probabilities[i] == doctest::Approx(alone[0].log_probabilities[i]).epsilon(1e-4));
  }
}

TEST_CASE("a seed gives the same draws again, whatever else is in the batch") {
  const Composed model = make_composed();
  Prompts prompts = make_prompts();
  GenerateOptions options{.max_new_tokens = 12, .sampler = {.temperature = 1.5, .seed = 4}};
  const auto first = run(model, prompts, options);
  CHECK(run(model, prompts, options)[2].ids == first[2].ids);
  for (const Index batch : {1, 2, 3}) {
    CAPTURE(batch);
    options.batch = batch;
    const auto again = run(model, prompts, options);
    for (std::size_t p = 0; p < prompts.size(); ++p) CHECK(again[p].ids == first[p].ids);
  }
  options.batch = 256;
  Prompts others = prompts;
  others[0] = random_tokens(20, vocabulary, 77);
  others.pop_back();
  CHECK(run(model, others, options)[2].ids == first[2].ids);
  options.sampler.seed = 5;
  CHECK(run(model, prompts, options)[2].ids != first[2].ids);
  // Two prompts that are the same draw from streams of their own.
  CHECK(run(model, {prompts[0], prompts[0]}, options)[0].ids != run(model, {prompts[0], prompts[0]}, options)[1].ids);
}

TEST_CASE("log-probabilities are the model's own, before temperature and cuts") {
  const Composed model = make_composed();
  const Prompts prompts = {make_prompts()[0]};
  const auto result =
      run(model, prompts, {.max_new_tokens = 8, .sampler = {.temperature = 2, .top_k = 5, .seed = 1}})[0];
  std::vector<TokenId> so_far;
  for (std::size_t i = 0; i < result.ids.size(); ++i) {
    CHECK(result.log_probabilities[i] ==
          doctest::Approx(log_softmax(last_logits(model, prompts[0], so_far), result.ids[i])).epsilon(1e-4));
    so_far.push_back(result.ids[i]);
  }
}

TEST_CASE("temperature, top-k and top-p draw as often as they say") {
  const std::vector<double> p = {0.15, 0.5, 0.05, 0.3};
  std::vector<float> logits;
  for (const double x : p) logits.push_back(static_cast<float>(std::log(x) + 3));
  check_frequencies(frequencies(logits, {.temperature = 1}), p);
  double total = 0;
  std::vector<double> flat;
  for (const double x : p) total += std::sqrt(x);
  for (const double x : p) flat.push_back(std::sqrt(x) / total);
  check_frequencies(frequencies(logits, {.temperature = 2}), flat);
  check_frequencies(frequencies(logits, {.temperature = 1, .top_k = 2}), {0, 0.625, 0, 0.375});
  check_frequencies(frequencies(logits, {.temperature = 1, .top_k = 100}), p);
  check_frequencies(frequencies(logits, {.temperature = 1, .top_p = 0.7}), {0, 0.625, 0, 0.375});
  check_frequencies(frequencies(logits, {.temperature = 1, .top_p = 0.9}), {0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95});
  check_frequencies(frequencies(logits, {.temperature = 1, .top_k = 3, .top_p = 0.82}), {0, 0.625, 0, 0.375});
  for (const SamplerOptions& greedy :
       {SamplerOptions{}, SamplerOptions{.temperature = 1, .top_k = 1}, SamplerOptions{.temperature = 1, .top_p = 1e-9},
        SamplerOptions{.temperature = 1e-9}})
    check_frequencies(frequencies(logits, greedy, 100), {0, 1, 0, 0});
}

TEST_CASE("of many tokens that is drawn which the sum of all weights up to it gives") {
  calm::Random values(3);
  std::vector<float> logits(5000);
  for (float& x : logits) x = static_cast<float>(std::round(80 * values.normal()) / 20);  // many are equal
  for (std::size_t i = 0; i < logits.size(); i += 7) logits[i] = -std::numeric_limits<float>::infinity();
  for (const double temperature : {0.3, 1.0, 3.0, 100.0})
    for (const Index top_k : {0, 1, 63, 64, 65, 2000})
      for (const double top_p : {1.0, 0.95, 0.2}) {
        CAPTURE(temperature);
        CAPTURE(top_k);
        CAPTURE(top_p);
        const SamplerOptions options{.temperature = temperature, .top_k = top_k, .top_p = top_p};
        Sampler sampler(options);
        calm::Random random(11), same(11);
        for (int draw = 0; draw < 20; ++draw)
          CHECK(static_cast<std::size_t>(sampler(std::span<const float>(logits), random).id) ==
                drawn_in_order(logits, options, same));
      }
}

TEST_CASE("of equal logits the lowest id wins, and a token that cannot be is never drawn") {
  const float never = -std::numeric_limits<float>::infinity();
  check_frequencies(frequencies({1, 2, 2, 2}, {}, 10), {0, 1, 0, 0});
  check_frequencies(frequencies({1, 2, 2, 2}, {.temperature = 1, .top_k = 1}, 10), {0, 1, 0, 0});
  check_frequencies(frequencies({1, never, 1, never}, {.temperature = 1}), {0.5, 0, 0.5, 0});
  calm::Random random(1);
  const std::vector<float> logits = {1, never, 1, never};
  CHECK(Sampler({})(std::span(logits), random).log_probability == doctest::Approx(-std::log(2.0)));
  for (const float mask : {never, -1e9F, -1e4F, -100.0F}) {
    calm::Random zero(12121362);  // its first number is 0
    CHECK(calm::Random(zero).uniform() == 0);
    for (const std::size_t count : {3U, 16U, 300U}) {
      std::vector<float> masked(count, 1);
      masked[0] = mask;
      calm::Random same = zero;
      CHECK(Sampler({.temperature = 1})(std::span<const float>(masked), same).id == 1);
    }
  }
}

TEST_CASE("logits that are no numbers are a typed error") {
  calm::Random random(1);
  const float infinite = std::numeric_limits<float>::infinity();
  for (const std::vector<float>& logits : std::vector<std::vector<float>>{
           {1, not_a_number<float>, 2}, {not_a_number<float>, 1}, {-infinite, -infinite}, {1, infinite}})
    for (const double temperature : {0.0, 1.0})
      CHECK_THROWS_AS(Sampler({.temperature = temperature})(std::span(logits), random), calm::NumericError);
  for (const std::size_t count : {0U, 1U, 40U, 255U, 256U, 257U})
    for (std::size_t i = 0; i < std::max<std::size_t>(count, 1); ++i) {
      std::vector<double> logits(count, 1);
      if (count > 0) logits[i] = not_a_number<double>;
      CHECK_THROWS_AS(Sampler({})(std::span<const double>(logits), random), calm::NumericError);
    }
}

TEST_CASE("what a stop string may still become is held back, and the rest is released at once") {
  const std::vector<std::string> stops = {"END", "\n\n"};
  calm::generation::StopMatcher matcher(stops);
  CHECK(!matcher.add("one E"));
  CHECK(matcher.release() == "one ");
  CHECK(!matcher.add("N"));
  CHECK(matcher.release().empty());
  CHECK(!matcher.add("E"));  // ENE is no END, but its last letter may begin one
  CHECK(matcher.release() == "EN");
  CHECK(!matcher.add("\n"));
  CHECK(matcher.release() == "E");
  CHECK(matcher.add(" END, and more"));
  CHECK(matcher.release() == "\n ");
  CHECK(matcher.text() == "one ENE\n ");
}

TEST_CASE("stop strings cut any text at the first of them, however it comes in pieces") {
  calm::Random random(3);
  const auto word = [&](Index longest) {
    std::string text;
    for (Index i = 1 + random.below(longest); i > 0; --i) text += random.below(2) == 0 ? 'a' : 'b';
    return text;
  };
  int stopped_runs = 0;
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::string> stops;
    for (Index i = random.below(4); i > 0; --i) stops.push_back(word(6));
    calm::generation::StopMatcher matcher(stops);
    std::string given, released;
    bool stopped = false;
    for (int piece = 0; piece < 12 && !stopped; ++piece) {
      const std::string more = word(3);
      given += more;
      stopped = matcher.add(more);
      released += matcher.release();
      const std::size_t found = first_of(given, stops);
      REQUIRE(stopped == (found != std::string::npos));
      REQUIRE(given.substr(0, found).starts_with(released));
      if (stopped) REQUIRE(released == given.substr(0, found));
    }
    if (!stopped) released += matcher.release_all();
    REQUIRE(released == given.substr(0, first_of(given, stops)));
    REQUIRE(matcher.text() == released);
    stopped_runs += stopped ? 1 : 0;
  }
  CHECK(stopped_runs > 500);
  CHECK(stopped_runs < 1900);
}

TEST_CASE("generation ends before a stop string that spans tokens, and streams the same text") {
  const Composed model = make_composed();
  const Prompts prompts = make_prompts();
  const SamplerOptions varied{.temperature = 3, .seed = 2};
  const auto whole = run(model, prompts, {.max_new_tokens = 20, .sampler = varied, .text_of = text_of});
  int stopped = 0, ended = 0;
  for (const std::vector<std::string>& stops : std::vector<std::vector<std::string>>{{whole[0].text.substr(5, 4)},
                                                                                     {whole[2].text.substr(9, 5), "zz"},
                                                                                     {"ab", "cd"},
                                                                                     {whole[1].text.substr(0, 2)},
                                                                                     {"zz"}}) {
    std::vector<std::string> streamed(prompts.size());
    const auto results =
        run(model, prompts, {.max_new_tokens = 20, .sampler = varied, .stop = stops, .text_of = text_of},
            [&](const StreamedToken& token) {
              streamed[token.prompt] += token.text;
              CHECK(first_of(streamed[token.prompt], stops) == std::string::npos);
            });
    for (std::size_t p = 0; p < prompts.size(); ++p) {
      CAPTURE(p);
      const std::size_t cut = first_of(whole[p].text, stops);
      CHECK(results[p].text == whole[p].text.substr(0, cut));
      CHECK(streamed[p] == results[p].text);
      CHECK(results[p].reason == (cut == std::string::npos ? FinishReason::length : FinishReason::stop_string));
      CHECK(std::equal(results[p].ids.begin(), results[p].ids.end(), whole[p].ids.begin()));
      ++(cut == std::string::npos ? ended : stopped);
    }
  }
  CHECK(stopped >= 4);
  CHECK(ended >= 4);
}

TEST_CASE("generation ends with any end token, which is streamed and not kept") {
  const Composed model = make_composed();
  const Prompts prompts = make_prompts();
  const SamplerOptions varied{.temperature = 3, .seed = 2};
  const auto whole = run(model, prompts, {.max_new_tokens = 20, .sampler = varied, .text_of = text_of});
  const std::vector<TokenId> ends{whole[1].ids[5], whole[0].ids[3]};
  std::vector<TokenId> last_streamed(prompts.size(), -1);
  std::vector<std::string> streamed(prompts.size());
  // A stop string that never completes holds text back until the end.
  const auto results = run(model, prompts,
                           {.max_new_tokens = 20,
                            .end_tokens = ends,
                            .sampler = varied,
                            .stop = {"aaaaaaaa", "bbbbbbbb"},
                            .text_of = text_of},
                           [&](const StreamedToken& token) {
                             last_streamed[token.prompt] = token.token.id;
                             streamed[token.prompt] += token.text;
                           });
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    CAPTURE(p);
    const auto found = std::find_first_of(whole[p].ids.begin(), whole[p].ids.end(), ends.begin(), ends.end());
    CHECK(results[p].ids == std::vector<TokenId>(whole[p].ids.begin(), found));
    CHECK(results[p].log_probabilities.size() == results[p].ids.size());
    CHECK(results[p].reason == (found == whole[p].ids.end() ? FinishReason::length : FinishReason::end_token));
    if (found != whole[p].ids.end()) CHECK(last_streamed[p] == *found);
    std::string text;
    for (const TokenId id : results[p].ids) text += text_of(id);
    CHECK(results[p].text == text);
    CHECK(streamed[p] == text);
  }
  CHECK(results[0].reason == FinishReason::end_token);
  CHECK(results[1].reason == FinishReason::end_token);
}

TEST_CASE("at the context limit generation refuses before it begins, or stops there") {
  const auto model = make_anchor(12);
  const Prompts prompts = {random_tokens(5, vocabulary, 1), random_tokens(12, vocabulary, 2), {3}};
  int streamed = 0;
  const auto count = [&](const StreamedToken&) { ++streamed; };
  const std::string error = message_of<calm::ContextLimitError>([&] {
    run(*model, {prompts[2], prompts[0]}, {.max_new_tokens = 8}, count);
  });
  CHECK(contains(error, "prompt 1 has 5 tokens and 8"));
  CHECK(contains(error, "12"));
  CHECK(streamed == 0);
  CHECK(run(*model, {prompts[0]}, {.max_new_tokens = 7})[0].reason == FinishReason::length);

  for (const Index wanted : {Index{20}, std::numeric_limits<Index>::max()}) {
    CAPTURE(wanted);
    const auto results = run(*model, prompts, {.max_new_tokens = wanted, .at_limit = AtContextLimit::stop});
    for (std::size_t p = 0; p < prompts.size(); ++p) {
      CAPTURE(p);
      CHECK(results[p].reason == FinishReason::context);
      CHECK(results[p].ids.size() == 13 - prompts[p].size());  // the full context still predicts one token
    }
    CHECK(results[0].ids[0] == run(*model, {prompts[0]}, {.max_new_tokens = 1})[0].ids[0]);
  }
  CHECK_THROWS_AS(run(*model, {random_tokens(13, vocabulary, 1)}, {.at_limit = AtContextLimit::stop}),
                  calm::ContextLimitError);
}

/// An augment of 12 tokens limits the model as a context of 12 does.
template <class Model>
void check_short_augment(const Model& model) {
  const Prompts prompts = {random_tokens(5, vocabulary, 1), random_tokens(12, vocabulary, 2), {3}};
  int streamed = 0;
  const std::string error = message_of<calm::ContextLimitError>([&] {
    run(model, {prompts[2], prompts[0]}, {.max_new_tokens = 8}, [&](const StreamedToken&) { ++streamed; });
  });
  CHECK(contains(error, "prompt 1 has 5 tokens and 8 more"));
  CHECK(contains(error, "an augment"));
  CHECK(streamed == 0);
  CHECK(run(model, {prompts[0]}, {.max_new_tokens = 7})[0].reason == FinishReason::length);
  const auto results = run(model, prompts, {.max_new_tokens = 20, .at_limit = AtContextLimit::stop});
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    CAPTURE(p);
    CHECK(results[p].reason == FinishReason::context);
    CHECK(results[p].ids.size() == 13 - prompts[p].size());  // the full context still predicts one token
  }
  const auto whole = run(make_composed(), {prompts[2]}, {.max_new_tokens = 12});
  CHECK(results[2].ids == whole[0].ids);
  for (const AtContextLimit limit : {AtContextLimit::error, AtContextLimit::stop})
    CHECK(contains(message_of<calm::ContextLimitError>([&] {
                     run(model, {{1}, random_tokens(13, vocabulary, 1)}, {.max_new_tokens = 0, .at_limit = limit});
                   }),
                   "prompt 1 has 13 tokens, which the context of an augment"));
}

TEST_CASE("the context of an augment limits generation as the model's own does") {
  SUBCASE("of a known type") {
    check_short_augment(make_composed(12));
    const Prompts long_prompt = {random_tokens(13, vocabulary, 1)};
    CHECK(run(make_composed(12), long_prompt, {.max_new_tokens = 51, .augments = false})[0].reason ==
          FinishReason::length);
  }
  SUBCASE("of any type") {
    using Any = calm::AnyAugments<Cpu>;
    calm::ComposedModel<Llama, Any> model(
        make_anchor(), {std::make_shared<const calm::AnyAugment<Cpu>>(make_augment(12))}, {{0, 0, 0}, {0, 1, 1}});
    randomise(model, 9);
    check_short_augment(model);
  }
  SUBCASE("of a composed anchor") {
    const auto inner = std::make_shared<const Composed>(make_composed(12));
    const auto outer = calm::compose(inner, {{0, 0, 1}}, {}, make_augment());
    check_short_augment(outer);
    const auto message = message_of<calm::ContextLimitError>(
        [&] { run(outer, {random_tokens(13, vocabulary, 1)}, {.max_new_tokens = 1, .augments = false}); });
    CHECK(contains(message, "which the context of an augment does not hold"));
    CHECK(!contains(message, "without augments"));
  }
  SUBCASE("of a composed augment") {
    const auto inner = std::make_shared<const Composed>(make_composed(12));
    calm::ComposedModel<Composed, Composed> model(std::make_shared<const Composed>(make_composed()), {inner},
                                                  {{0, 0, 1}});
    check_short_augment(model);
  }
}

TEST_CASE("where nobody can know how much an augment will read, generation ends at its context") {
  const auto aligner = std::make_shared<UnevenAligner>(vocabulary);
  const Composed model = make_composed(12, {aligner}), roomy = make_composed(64, {aligner});
  Prompts prompts = make_prompts();
  prompts.erase(prompts.begin() + 2);  // the third alone would be too long
  for (const AtContextLimit limit : {AtContextLimit::error, AtContextLimit::stop}) {
    const GenerateOptions options{.max_new_tokens = 40, .sampler = {.temperature = 2, .seed = 3}, .at_limit = limit};
    const auto results = run(model, prompts, options), whole = run(roomy, prompts, options);
    for (std::size_t p = 0; p < prompts.size(); ++p) {
      CAPTURE(p);
      CHECK(results[p].reason == FinishReason::context);
      REQUIRE(results[p].ids.size() < whole[p].ids.size());
      CHECK(std::equal(results[p].ids.begin(), results[p].ids.end(), whole[p].ids.begin()));
      Index read = 0;  // by the augment, before the last token
      for (const TokenId id : prompts[p]) read += id % 3;
      for (std::size_t i = 0; i + 1 < results[p].ids.size(); ++i) read += results[p].ids[i] % 3;
      CHECK(read <= 12);
      CHECK(read + results[p].ids.back() % 3 > 12);
    }
  }
}

TEST_CASE("no tokens asked for are none, and what cannot be asked for is a typed error") {
  const auto model = make_anchor();
  CHECK(run(*model, {}, {}).empty());
  const auto none = run(*model, {{1, 2}}, {.max_new_tokens = 0});
  CHECK(none[0].ids.empty());
  CHECK(none[0].reason == FinishReason::length);
  CHECK(contains(message_of<calm::ShapeError>([&] {
                   run(*model, {{1}, {}}, {.max_new_tokens = 2});
                 }),
                 "prompt 1 is empty"));
  CHECK_THROWS_AS(run(*model, {{1, vocabulary}}, {.max_new_tokens = 2}), calm::ShapeError);
  CHECK_THROWS_AS(run(*model, {{1, -1}}, {.max_new_tokens = 2}), calm::ShapeError);
  CHECK_THROWS_AS(run(*model, {{1, 2, 3}}, {.max_new_tokens = -1}), calm::ConfigError);
  CHECK_THROWS_AS(run(*model, {{1}}, {.max_new_tokens = 2, .stop = {"x"}}), calm::ConfigError);
  CHECK_THROWS_AS(run(*model, {{1}}, {.max_new_tokens = 2, .batch = 0}), calm::ConfigError);
  const double nan = not_a_number<double>;
  for (const SamplerOptions& bad :
       {SamplerOptions{.temperature = -1}, SamplerOptions{.temperature = nan}, SamplerOptions{.top_k = -1},
        SamplerOptions{.top_p = 0}, SamplerOptions{.top_p = 1.5}, SamplerOptions{.top_p = nan}}) {
    GenerateOptions options;
    options.max_new_tokens = 2;
    options.sampler = bad;
    CHECK_THROWS_AS(run(*model, {{1}}, options), calm::ConfigError);
  }
}

TEST_CASE("with its augments switched off a composed model generates as its anchor") {
  const Composed model = make_composed();
  const Prompts prompts = make_prompts();
  const auto off = run(model, prompts, {.max_new_tokens = 12, .augments = false}),
             alone = run(*make_anchor(), prompts, {.max_new_tokens = 12}),
             on = run(model, prompts, {.max_new_tokens = 12});
  bool differs = false;
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    CHECK(off[p].ids == alone[p].ids);
    CHECK(off[p].log_probabilities == alone[p].log_probabilities);
    differs = differs || on[p].ids != off[p].ids;
  }
  CHECK(differs);
}

}  // namespace generate_test
