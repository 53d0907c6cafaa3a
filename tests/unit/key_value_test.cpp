// The key-value example: its expressions, and the split that keeps evaluation apart from every training set.
#include <doctest/doctest.h>
#include "../../examples/key_value_arithmetic/rows.hpp"

#include <calm/io/content_hash.hpp>
#include <calm/train/gradient_check.hpp>
#include <support/models.hpp>

#include <map>
#include <set>

namespace key_value_test {
using calm::Index;
using key_value::Dictionary;
using key_value::EvaluationSets;
using key_value::Expression;
using key_value::Form;
using key_value::Lesson;
using key_value::Task;

namespace {

const Dictionary& dictionary() {
  static const Dictionary result(1000, 1, 1);
  return result;
}

bool is_number(const std::string& text) {
  return !text.empty() && text.find_first_not_of("0123456789", text[0] == '-' ? 1 : 0) == std::string::npos;
}

/// The words and numbers of a text, with the operators as words of their own.
std::vector<std::string> words_of(const std::string& text) {
  std::vector<std::string> words;
  std::string word;
  for (const char c : text + " ") {
    const bool sign_of_number =
        c == '-' && word.empty() && (words.empty() || words.back() == "from" || words.back() == "to");
    if (c == ' ' || ((c == '+' || c == '-') && !sign_of_number)) {
      if (!word.empty()) words.push_back(word);
      word.clear();
      if (c != ' ') words.emplace_back(1, c);
    } else {
      word += c;
    }
  }
  return words;
}

/// Reads an expression in any of its three forms, independently of write().
Expression parse(const std::string& text) {
  const std::map<std::string, char> signs = {{"+", '+'},     {"-", '-'},   {"plus", '+'},
                                             {"minus", '-'}, {"add", '+'}, {"take", '-'}};
  Expression e;
  for (const std::string& word : words_of(text)) {
    if (word == "from" || word == "to" || word == "then") continue;
    if (signs.contains(word)) e.operators += signs.at(word);
    else e.terms.push_back(word);
  }
  REQUIRE(e.terms.size() == e.operators.size() + 1);
  return e;
}

bool is_reworded(const std::string& prompt) { return prompt.find(' ') != std::string::npos; }

/// The signed operands in an order that does not depend on how they were written: 17-45 and -45+17 are the same.
std::string sum_of(const Expression& e) {
  std::multiset<std::string> operands;
  for (std::size_t i = 0; i < e.terms.size(); ++i) {
    bool negative = i > 0 && e.operators[i - 1] == '-';
    std::string term = e.terms[i];
    if (term[0] == '-') {
      negative = !negative;
      term.erase(0, 1);
    }
    operands.insert((negative ? "-" : "+") + term);
  }
  std::string text;
  for (const std::string& operand : operands) text += operand;
  return text;
}

/// The pieces of an example between its = signs: the prompt and every step of its completion.
std::vector<std::string> pieces_of(const calm::Example& example) {
  std::string text = key_value::decode(example.prompt) + key_value::decode(example.completion);
  REQUIRE(text[0] == '^');
  text.erase(0, 1);
  if (text.back() == '$') text.pop_back();
  std::vector<std::string> pieces;
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t end = std::min(text.find('=', begin), text.size());
    pieces.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return pieces;
}

/// Every task that the example trains anything on.
std::vector<std::pair<std::string, Task>> all_tasks() {
  const Dictionary& d = dictionary();
  return {{"substitution", key_value::substitution(d, d.keys(), {0.05, 0.25, 0.35, 0.35})},
          {"two numbers", key_value::arithmetic(d, {.operands = {0, 1}, .half_solved = 0, .largest = d.size()})},
          {"arithmetic", key_value::arithmetic(d, {{0.02, 0.33, 0.38, 0.27}, 0.25, 0.25, 0.3, 0.4, d.size()})},
          {"chain", key_value::bridge_task(d, Lesson::chain)},
          {"substitution of seen keys", key_value::bridge_task(d, Lesson::substitution)},
          {"direct", key_value::bridge_task(d, Lesson::direct)}};
}

std::set<std::string> sums_of_evaluation() {
  std::set<std::string> sums;
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    const EvaluationSets sets(dictionary(), seed, 1000);
    for (std::size_t c = 0; c < key_value::columns; ++c) {
      for (const key_value::Item& item : sets[c]) {
        sums.insert(sum_of(parse(item.prompt.substr(0, item.prompt.size() - 1))));
        sums.insert(sum_of(parse(item.values.substr(0, item.values.size() - 1))));
      }
    }
  }
  return sums;
}

const std::set<std::string>& evaluated_sums() {
  static const std::set<std::string> result = sums_of_evaluation();
  return result;
}

/// "" and the pieces of many examples of a task that belong to the evaluation; `negative_first`: of those that begin
/// with a negative number, else of the others.
std::vector<std::string> leaks_of(const Task& task, bool negative_first) {
  calm::Random random(12, 4);
  std::vector<std::string> leaks = {""};
  for (int i = 0; i < calm_test::rounds(8000); ++i) {
    for (const std::string& piece : pieces_of(task(random))) {
      const Expression e = parse(piece);
      if (e.operators.empty() || (e.terms[0][0] == '-') != negative_first) continue;
      const bool known = std::all_of(e.terms.begin(), e.terms.end(),
                                     [](const std::string& t) { return is_number(t) || dictionary().contains(t); });
      if (evaluated_sums().contains(sum_of(e)) || (known && key_value::kept_for_evaluation(e))) leaks.push_back(piece);
    }
  }
  return leaks;
}

}  // namespace

TEST_CASE("expressions are written in three forms and solved in steps") {
  const Expression e{{"17", "203", "45"}, "+-"}, less{{"17", "45"}, "-"}, one{{"17"}, ""};
  CHECK(key_value::write(e) == "17+203-45");
  CHECK(key_value::write(e, Form::infix) == "17 plus 203 minus 45");
  CHECK(key_value::write(e, Form::own_order) == "to 17 add 203 then take 45");
  CHECK(key_value::write(less, Form::own_order) == "from 17 take 45");
  CHECK(key_value::write({{"17", "45", "3"}, "-+"}, Form::own_order) == "from 17 take 45 then add 3");
  CHECK(key_value::write(one) == "17");
  CHECK(key_value::solve(e) == "220-45=175");
  CHECK(key_value::solve(less) == "-28");
  CHECK(key_value::solve({{"17", "45", "3"}, "-+"}) == "-28+3=-25");
  CHECK(key_value::solve(one) == "17");
  CHECK(key_value::write(key_value::step(e)) == "220-45");
}

TEST_CASE("keys are substituted by their values and nothing else changes") {
  const Dictionary& d = dictionary();
  const Expression e{{d.keys()[0], d.keys()[7], d.keys()[0]}, "-+"}, values = key_value::substitute(e, d);
  CHECK(values.operators == "-+");
  CHECK(values.terms[0] == std::to_string(d.value(d.keys()[0])));
  CHECK(values.terms[1] == std::to_string(d.value(d.keys()[7])));
  CHECK(values.terms[2] == values.terms[0]);
}

TEST_CASE("the dictionary is a permutation over distinct keys, none of them a word of the forms") {
  const Dictionary& d = dictionary();
  CHECK(d.size() == 1000);
  std::set<std::string> keys;
  std::set<Index> values;
  for (const std::string& key : d.keys()) {
    CHECK(key.size() >= 2);
    CHECK(key.size() <= 6);
    CHECK(key.find_first_not_of("abcdefghijklmnopqrstuvwxyz") == std::string::npos);
    CHECK(!key_value::reserved_words.contains(key));
    CHECK(d.contains(key));
    keys.insert(key);
    values.insert(d.value(key));
  }
  CHECK(keys.size() == 1000);
  CHECK(values.size() == 1000);
  CHECK(*values.begin() == 1);
  CHECK(*values.rbegin() == 1000);
  CHECK(d.seen().size() == 200);
  CHECK(d.unseen().size() == 800);
  for (const std::string& key : d.seen()) CHECK(std::count(d.unseen().begin(), d.unseen().end(), key) == 0);
  const Dictionary other(1000, 1, 2), again(1000, 1, 1), third(1000, 2, 1);
  CHECK(other.keys() == d.keys());
  CHECK(third.keys() != d.keys());
  int same = 0;
  for (const std::string& key : d.keys()) {
    CHECK(again.value(key) == d.value(key));
    same += other.value(key) == d.value(key) ? 1 : 0;
  }
  CHECK(same < 10);
}

TEST_CASE("the canonical form is the same for every order of the signed operands, and for no other expression") {
  const std::vector<Expression> same = {
      {{"17", "203", "45"}, "+-"}, {{"203", "17", "45"}, "+-"}, {{"17", "45", "203"}, "-+"}};
  for (const Expression& e : same) CHECK(key_value::canonical(e) == key_value::canonical(same[0]));
  for (const Expression& e : std::vector<Expression>{
           {{"17", "203", "45"}, "++"}, {{"45", "203", "17"}, "+-"}, {{"17", "203"}, "+"}, {{"172", "3", "45"}, "+-"}})
    CHECK(key_value::canonical(e) != key_value::canonical(same[0]));
}

TEST_CASE("one expression in sixteen is kept for evaluation, and none of one operand") {
  calm::Random random(5);
  int kept = 0;
  for (int i = 0; i < 16000; ++i) {
    const Expression e = key_value::random_numbers(random, 2 + random.below(2), 1000);
    Expression reordered = e;
    if (e.operators.back() == '+') {
      std::swap(reordered.terms.front(), reordered.terms.back());
      CHECK(key_value::kept_for_evaluation(reordered) == key_value::kept_for_evaluation(e));
    }
    kept += key_value::kept_for_evaluation(e) ? 1 : 0;
  }
  CHECK(kept > 850);
  CHECK(kept < 1150);
  for (int i = 1; i <= 1000; ++i) CHECK(!key_value::kept_for_evaluation({{std::to_string(i)}, ""}));
}

TEST_CASE("every training example is what its task says: right steps after a right prompt") {
  for (const auto& one : all_tasks()) {
    const auto& [name, task] = one;
    CAPTURE(one.first);
    calm::Random random(11, 3);
    for (int i = 0; i < 1000; ++i) {
      const auto pieces = pieces_of(task(random));
      CAPTURE(pieces.front());
      REQUIRE(pieces.size() >= 1);
      // Of neighbours on numbers, one is the other in plain form, its next step, or (direct) its result.
      for (std::size_t p = 0; p + 1 < pieces.size(); ++p) {
        const Expression from = parse(pieces[p]), to = parse(pieces[p + 1]);
        if (!std::all_of(from.terms.begin(), from.terms.end(), is_number)) {
          for (const std::string& term : from.terms) {
            if (!dictionary().contains(term)) continue;
            if (name == "direct") continue;
            REQUIRE(to.terms == key_value::substitute(from, dictionary()).terms);
          }
          if (name != "direct") REQUIRE(to.operators == from.operators);
        } else if (to.terms.size() == from.terms.size()) {
          REQUIRE(to.terms == from.terms);
          REQUIRE(to.operators == from.operators);
        } else {
          REQUIRE(pieces[p + 1] == key_value::write(key_value::step(from)));
        }
      }
    }
  }
}

TEST_CASE("no training example holds an evaluation expression or a reordering of it, as prompt or as step") {
  CHECK(evaluated_sums().size() > 20000);
  for (const auto& one : all_tasks()) {
    const auto& [name, task] = one;
    CAPTURE(one.first);
    const auto leaks = leaks_of(task, false);
    CAPTURE(leaks.front());
    CHECK(leaks.size() == 1);
  }
}

TEST_CASE("nor a reordering that begins with a negative number") {
  for (const auto& one : all_tasks()) {
    const auto& [name, task] = one;
    CAPTURE(one.first);
    const auto leaks = leaks_of(task, true);
    CAPTURE(leaks.back());
    CHECK(leaks.size() == 1);
  }
}

TEST_CASE("no unseen key occurs in the training of the bridges, and every seen one does") {
  const std::set<std::string> seen(dictionary().seen().begin(), dictionary().seen().end());
  for (const Lesson lesson : {Lesson::chain, Lesson::substitution, Lesson::direct}) {
    const Task task = key_value::bridge_task(dictionary(), lesson);
    calm::Random random(13, 5);
    std::set<std::string> found;
    for (int i = 0; i < 4000; ++i) {
      for (const std::string& piece : pieces_of(task(random))) {
        for (const std::string& word : words_of(piece)) {
          if (dictionary().contains(word)) found.insert(word);  // the others are m_B's unknown words
        }
      }
    }
    CHECK(found == seen);
  }
}

TEST_CASE("unknown words before an expression are no keys, and their numbers do not count") {
  const Task task = key_value::arithmetic(dictionary(), {.operands = {0.2, 0.4, 0.4}, .words = 1, .largest = 1000});
  calm::Random random(14, 6);
  for (int i = 0; i < 500; ++i) {
    const calm::Example e = task(random);
    const auto pieces = pieces_of(e);
    for (const std::string& word : words_of(pieces[0])) CHECK(!dictionary().contains(word));
    REQUIRE(e.scored.size() == e.completion.size());
    const std::string text = key_value::decode(e.completion);
    for (std::size_t c = 0; c < text.size(); ++c) {
      const bool digit = '0' <= text[c] && text[c] <= '9';
      REQUIRE(e.scored[c] == (c > pieces[1].size() || !digit));
    }
  }
}

TEST_CASE("evaluation sets follow from their seed, and each item has its right result") {
  const EvaluationSets sets(dictionary(), 3, 200), again(dictionary(), 3, 200), other(dictionary(), 4, 200);
  const std::set<std::string> seen(dictionary().seen().begin(), dictionary().seen().end());
  const std::set<std::string> unseen(dictionary().unseen().begin(), dictionary().unseen().end());
  for (std::size_t c = 0; c < key_value::columns; ++c) {
    CAPTURE(c);
    REQUIRE(sets[c].size() == 200);
    int same = 0;
    for (std::size_t i = 0; i < 200; ++i) {
      const key_value::Item& item = sets[c][i];
      CHECK(item.prompt == again[c][i].prompt);
      CHECK(item.result == again[c][i].result);
      same += item.prompt == other[c][i].prompt ? 1 : 0;
      const Expression written = parse(item.prompt.substr(0, item.prompt.size() - 1));
      const Expression values = parse(item.values.substr(0, item.values.size() - 1));
      Index result = 0;
      for (std::size_t t = 0; t < values.terms.size(); ++t)
        result += (t > 0 && values.operators[t - 1] == '-' ? -1 : 1) * std::stoll(values.terms[t]);
      CHECK(item.result == std::to_string(result));
      CHECK(written.operators == values.operators);
      for (std::size_t t = 0; t < values.terms.size(); ++t) {
        const std::string& term = written.terms[t];
        CHECK((c == key_value::numeric ? term : std::to_string(dictionary().value(term))) == values.terms[t]);
        if (c == key_value::seen_keys) CHECK(seen.contains(term));
        if (c >= key_value::unseen_keys) CHECK(unseen.contains(term));
      }
      const std::size_t operands = values.terms.size();
      CHECK((c == key_value::reworded_longer ? operands == 4 : operands == 2 || operands == 3));
      CHECK(is_reworded(item.prompt) == (c == key_value::reworded || c == key_value::reworded_longer));
    }
    CHECK(same < 10);
  }
}

TEST_CASE(
    "an answer counts when it ends with the right value, and in the first column when it begins with the values") {
  const key_value::Item item{"abc+de=", "17+203=", "220"};
  CHECK(key_value::is_right(item, key_value::seen_keys, "17+203=220", true));
  CHECK(key_value::is_right(item, key_value::seen_keys, "220", true));
  CHECK(!key_value::is_right(item, key_value::seen_keys, "17+203=220", false));  // it was cut off
  CHECK(!key_value::is_right(item, key_value::seen_keys, "17+203=22", true));
  CHECK(!key_value::is_right(item, key_value::seen_keys, "17+203=1220", true));
  CHECK(!key_value::is_right(item, key_value::seen_keys, "", true));
  CHECK(key_value::is_right(item, key_value::key_value_column, "17+203=", true));
  CHECK(!key_value::is_right(item, key_value::key_value_column, "17+20", true));
  CHECK(!key_value::is_right(item, key_value::key_value_column, "117+203=", true));
}

TEST_CASE("text is tokens and back, and other characters are a typed error") {
  CHECK(key_value::decode(key_value::encode("^abz 09+-=$")) == "^abz 09+-=$");
  CHECK(key_value::encode("^$") == std::vector<calm::TokenId>{key_value::begin_token, key_value::end_token});
  CHECK_THROWS_AS(key_value::encode("A"), calm::ConfigError);
}

TEST_CASE("a batch is a function of seed and step") {
  const Task task = key_value::bridge_task(dictionary(), Lesson::chain);
  const auto ids = [&](std::uint64_t seed, Index step) {
    const calm::PackedBatch batch(key_value::examples_of(task, seed, step, 8));
    return std::vector<calm::TokenId>(batch.tokens().ids.begin(), batch.tokens().ids.end());
  };
  CHECK(ids(1, 5) == ids(1, 5));
  CHECK(ids(1, 5) != ids(1, 6));
  CHECK(ids(1, 5) != ids(2, 5));
}

#if defined(__FMA__) && __GNUC__ == 12
TEST_CASE("a base model in training has the same bits with AVX2 and with AVX-512") {
  // Else `demo.sh --from-scratch` would not give the shipped files again. Another compiler, and another optimisation
  // than that of the tests, rounds some expressions elsewhere; so might another C library.
  const auto hash_after_steps = [](key_value::Course course) {
    course.plan.steps = 3;
    course.plan.warmup = 1;
    calm::Context<calm::CpuBackend> ctx(2);
    key_value::TrainedModel model(course.spec, calm::RandomWeights{course.plan.seed, 0.05});
    key_value::train(ctx, model, course.name, course.plan, course.task);
    calm::ContentHasher hasher;
    calm::for_each_parameter(model, [&](const std::string&, const auto& parameter) {
      const float* values = parameter.value.data();
      hasher.add(
          {reinterpret_cast<const char*>(values), sizeof(float) * static_cast<std::size_t>(parameter.value.size())});
    });
    return hasher.digits();
  };
  CHECK(hash_after_steps(key_value::key_value_course(dictionary(), 1, 1)) == "9f01c14e8863072236828c1618639451");
  CHECK(hash_after_steps(key_value::arithmetic_course(dictionary(), 2, 1)) == "90f58fbccd0af9c53300e4aea719fb3b");
}
#endif

TEST_CASE("the gate's gradients are those of finite differences") {
  using Model = calm::Transformer<calm::zoo::Llama, calm::Frozen, double>;
  const calm::ModelSpec small{.vocabulary = 7, .width = 8, .hidden = 8, .blocks = 1, .heads = {1, 1, 8}, .context = 16};
  const calm::ModelSpec other{.vocabulary = 7, .width = 4, .hidden = 8, .blocks = 1, .heads = {1, 1, 4}, .context = 16};
  key_value::GateModel<Model, Model> gate(std::make_shared<const Model>(small, calm_test::TestWeights{1}),
                                          std::make_shared<const Model>(other, calm_test::TestWeights{2}), 5, 1);
  calm_test::randomise(gate, 3);
  calm_test::Cpu ctx(1);
  const auto batch = calm_test::random_batch({{5, 2}, {3, 0}}, 7, 4);
  calm::Gradients<double> grads(gate);
  calm_test::random_target_loss(gate, ctx, batch, grads);
  const auto result =
      calm::check_parameter_gradients(gate, grads, [&] { return calm_test::random_target_loss(gate, ctx, batch); });
  INFO(calm::to_string(result));
  CHECK(result.checked == calm::count_parameters(gate));
  CHECK(result.worst_error < 1e-6);
  // The trainer asks for the rows that predict alone.
  const calm::PackedBatch packed(
      std::vector<calm::Example>{{{1, 2, 3}, {4, 5}}, {{2}, {6, 0, 1}, {true, false, true}}});
  const double before = calm::mean_loss(ctx, gate, std::span(&packed, 1));
  calm::Trainer trainer(ctx, gate, calm::CosineSchedule{.peak = 1e-2, .steps = 20});
  for (int step = 0; step < 20; ++step) trainer.step(packed);
  CHECK(calm::mean_loss(ctx, gate, std::span(&packed, 1)) < before);
  // So does generation.
  const auto prompts = calm_test::random_batch({{5, 5}, {3, 3}}, 7, 6);
  const auto all = calm_test::forward_logits(gate, ctx, prompts);
  ctx.arena.reset();
  auto session = gate.make_session(ctx, 2, 8);
  const auto next = calm::next_logits(ctx, gate, session, prompts.cached());
  REQUIRE(next.rows == 2);
  for (calm::Index v = 0; v < 7; ++v) {
    CHECK(next(0, v) == doctest::Approx(all(4, v)));
    CHECK(next(1, v) == doctest::Approx(all(7, v)));
  }
}

}  // namespace key_value_test
