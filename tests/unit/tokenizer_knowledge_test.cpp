// The splits, texts and head of the knowledge example.
#include "../../examples/knowledge/student.hpp"
#include "../../examples/knowledge/texts.hpp"

#include <doctest/doctest.h>
#include <support/temporary_folder.hpp>

#include <set>

namespace tokenizer_knowledge_test {
using namespace knowledge;

namespace {

std::vector<std::string> made_up_names(int count) {
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.push_back("Name" + std::to_string(1000 + i));
  return names;
}

using Folder = calm_test::TemporaryFolder;

}  // namespace

TEST_CASE("a directory is fixed by its seed, and no stranger is in it") {
  const Directory a(made_up_names(300), 100, 7), b(made_up_names(300), 100, 7), c(made_up_names(300), 100, 8);
  std::set<std::string> names;
  int same = 0;
  for (std::size_t i = 0; i < 100; ++i) {
    CHECK(a.entities[i].name == b.entities[i].name);
    CHECK(a.entities[i].number == b.entities[i].number);
    CHECK(a.entities[i].code == b.entities[i].code);
    same += a.entities[i].number == c.entities[i].number ? 1 : 0;
    names.insert(a.entities[i].name);
  }
  CHECK(same < 5);
  CHECK(names.size() == 100);
  for (const std::string& stranger : a.strangers) CHECK_FALSE(names.contains(stranger));
  CHECK(a.training_strangers().size() + a.new_strangers().size() == 200);
  CHECK_THROWS_AS(Directory(made_up_names(150), 100, 1), calm::ConfigError);
}

TEST_CASE("changed facts are those of entities that the bridges never saw") {
  const Directory before(made_up_names(300), 100, 7), after = before.with_changes(10, 7);
  for (std::size_t i = 0; i < 100; ++i) {
    const bool changes = i >= 20 && i < 30;
    CHECK((before.entities[i].number + before.entities[i].code != after.entities[i].number + after.entities[i].code) ==
          changes);
  }
}

TEST_CASE("worked questions stand behind their facts and are about strangers") {
  const Directory directory(made_up_names(300), 100, 7);
  calm::Random random(1);
  const Entity& e = directory.entities[50];
  for (const Skill skill : skills) {
    const auto ask = [&](const Entity& about, Index i) { return derived(about, skill, i % 2 == 0, random); };
    const std::string before = worked(2, directory.new_strangers(), Attribute::code, random, ask);
    const TextExample question = behind(before, ask(e, 0)),
                      looked_up = behind(before, after_fact(e, Attribute::code, ask(e, 0)));
    CHECK(question.prompt.starts_with("The code of "));
    CHECK(question.prompt.find(e.name) != std::string::npos);
    CHECK(question.prompt.find("is " + e.code) == std::string::npos);
    CHECK(looked_up.prompt.find("\n\nThe code of " + e.name + " is " + e.code + ".\nQuestion:") != std::string::npos);
    for (const Entity& known : directory.entities) CHECK(before.find(known.name) == std::string::npos);
  }
}

TEST_CASE("derived answers have the form that is asked for") {
  calm::Random random(1);
  const Entity e{"X", "1234", "k4t"};
  CHECK(derived(e, Skill::capitals, true, random).completion == " K4T");
  CHECK(derived(e, Skill::json, true, random).completion == " {\"code\": \"k4t\"}");
  CHECK(derived(e, Skill::dots, true, random).completion == " k.4.t");
  CHECK(derived(e, Skill::brackets, true, random).completion == " [k4t]");
  CHECK(derived(e, Skill::hyphens, true, random).completion == " k-4-t");
  CHECK(derived(e, Skill::begins, true, random).prompt.find("letter k?") != std::string::npos);
  CHECK(derived(e, Skill::begins, false, random).completion == " No");
  for (const Skill trained : trained_skills) CHECK((trained != Skill::hyphens && trained != Skill::begins));
}

TEST_CASE("strangers of a directory of given entities are none of them") {
  std::vector<Entity> given;
  for (int i = 0; i < 60; ++i) given.push_back({"Name" + std::to_string(1000 + 2 * i), std::to_string(i), "abc"});
  const Directory directory(given, made_up_names(300), 7);
  CHECK(directory.size() == 60);
  CHECK(directory.seen == 12);
  CHECK(directory.strangers.size() == 240);
  std::set<std::string> names;
  for (const Entity& e : directory.entities) names.insert(e.name);
  CHECK(names.size() == 60);
  for (const std::string& stranger : directory.strangers) CHECK_FALSE(names.contains(stranger));
}

TEST_CASE("the tokenizer of bytes has a token for each byte, and the end token beside them") {
  const Folder folder;
  write_byte_tokenizer(folder.path);
  const calm::Tokenizer tokenizer = calm::open_tokenizer(folder.path);
  CHECK(tokenizer.vocabulary_size() == 257);
  REQUIRE(tokenizer.eos().has_value());
  CHECK(*tokenizer.eos() == 256);
  std::string all;
  for (int byte = 0; byte < 256; ++byte) all += static_cast<char>(byte);
  const std::vector<TokenId> ids = encode(tokenizer, all, true);
  REQUIRE(ids.size() == 256);
  CHECK(tokenizer.decode(ids) == all);
  CHECK(tokenizer.token_bytes(ids[0x41]) == "A");
}

TEST_CASE("between the characters of an answer nothing is scored, nor are capitals and the end") {
  const Folder folder;
  write_byte_tokenizer(folder.path);
  const calm::Tokenizer tokenizer = calm::open_tokenizer(folder.path);
  calm::Example example = example_of(tokenizer, {"code of X:", " k-4-T"});
  score_content_alone(tokenizer, example);
  CHECK(example.scored == std::vector<bool>{false, true, false, true, false, false, false});
}

TEST_CASE("one text is read and another said at its places, where both have as many tokens") {
  const calm::Example capitals{{1}, {10, 20}}, small{{1}, {11, 21}}, longer{{1}, {11, 21, 31}};
  CHECK(with_targets(capitals, small).completion == std::vector<TokenId>{10, 20});
  CHECK(with_targets(capitals, small).targets == std::vector<TokenId>{11, 21});
  CHECK(with_targets(capitals, longer).completion == longer.completion);
  CHECK(with_targets(capitals, longer).targets.empty());
}

TEST_CASE("a student's logits are those of its model at the candidates") {
  const calm::ModelSpec spec{.vocabulary = 40,
                             .width = 16,
                             .hidden = 24,
                             .blocks = 2,
                             .heads = {2, 2, 8},
                             .context = 32,
                             .tied_embeddings = true};
  const calm::RandomWeights weights{5, 0.3};
  const Student::Model model(spec, weights);
  const std::vector<TokenId> candidates{3, 17, 39, 4};
  const Student student(Student::Model(spec, weights), candidates);
  CHECK(student.spec().vocabulary == 4);
  calm::Context<calm::CpuBackend> ctx(1);
  calm::Matrix<float> rows(3, 16), full(3, 40), some(3, 4);
  calm::Random random(2);
  for (float& x : rows.values()) x = static_cast<float>(random.normal());
  Student::Model::HeadCache full_cache;
  Student::HeadCache some_cache;
  const calm::MatrixView<const float> input = std::as_const(rows).view();
  model.head(ctx, input, full.view(), full_cache);
  student.head(ctx, input, some.view(), some_cache);
  for (Index t = 0; t < 3; ++t)
    for (Index i = 0; i < 4; ++i) CHECK(some(t, i) == full(t, candidates[static_cast<std::size_t>(i)]));

  const calm::Example example = student.with_candidates({{1, 2}, {17, 5, 4}});
  CHECK(example.targets == std::vector<TokenId>{1, 0, 3});
  CHECK(example.scored == std::vector<bool>{true, false, true});
  const calm::Example other = student.with_candidates({{1, 2}, {5, 5}, {}, {17, 6}});
  CHECK(other.completion == std::vector<TokenId>{5, 5});
  CHECK(other.targets == std::vector<TokenId>{1, 0});
  CHECK(other.scored == std::vector<bool>{true, false});
}

TEST_CASE("a table on its main axes keeps what tells tokens apart, with the deviation that was asked for") {
  calm::Matrix<float> table(200, 6);
  calm::Random random(3);
  for (Index i = 0; i < 200; ++i)
    for (Index j = 0; j < 6; ++j) table(i, j) = static_cast<float>((j < 3 ? 1.0 : 1e-3) * random.normal() + 5);
  const calm::Matrix<float> axes = on_main_axes(calm::StoredMatrix::from(table), 3, 0.5);
  for (Index j = 0; j < 3; ++j) {
    double mean = 0, squares = 0;
    for (Index i = 0; i < 200; ++i) {
      mean += axes(i, j) / 200;
      squares += axes(i, j) * axes(i, j) / 200;
    }
    CHECK(mean == doctest::Approx(0).epsilon(1e-3));
    CHECK(squares == doctest::Approx(0.25).epsilon(1e-3));
  }
}

}  // namespace tokenizer_knowledge_test
