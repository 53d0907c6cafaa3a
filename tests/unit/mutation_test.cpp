// What people hand to the readers that build on safetensors and JSON, cut off and mutated: config.json, folders of
// several shards, adapters, JSON lines and checkpoints give a value or a typed error that names the file.
#include <doctest/doctest.h>
#include <calm/io/adapter.hpp>
#include <calm/io/checkpoint.hpp>
#include <calm/io/config_json.hpp>
#include <calm/io/text_data.hpp>
#include <calm/train/checkpoint.hpp>
#include <fuzz/adapter.hpp>
#include <fuzz/fuzz.hpp>
#include <support/models.hpp>
#include <support/mutation.hpp>

#include <fstream>

namespace mutation_test {
using namespace calm_test;

namespace {

constexpr int mutations = 10000;

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file.good());
  return {std::istreambuf_iterator<char>(file), {}};
}

enum class Outcome { value, error };

/// Calls open(), which may give a value, or a typed error that names `file` (a ConfigError names what it belongs to);
/// anything else fails.
template <class Open>
Outcome outcome_of(const std::string& file, Open&& open) {
  try {
    open();
    return Outcome::value;
  } catch (const calm::FormatError& error) {
    CHECK_MESSAGE(std::string_view(error.what()).find(file) != std::string_view::npos, error.what());
  } catch (const calm::IoError& error) {  // a shard that is not there
    CHECK_MESSAGE(std::string_view(error.what()).find(file) != std::string_view::npos, error.what());
  } catch (const calm::ConfigError&) {  // sizes, links and options that cannot work together
  }
  return Outcome::error;
}

/// Every prefix of `bytes`, and then mutations of them, through write(bytes) and open(). Prefixes shorter than
/// `least` must be refused.
template <class Write, class Open>
void cut_and_mutate(const std::string& file, const std::string& bytes, std::size_t least, int rounds, Write&& write,
                    Open&& open) {
  write(bytes);
  REQUIRE(outcome_of(file, open) == Outcome::value);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    CAPTURE(size);
    write(bytes.substr(0, size));
    const Outcome outcome = outcome_of(file, open);
    if (size < least) CHECK(outcome == Outcome::error);
  }
  calm::Random random(11);
  int values = 0;
  for (int round = 0; round < rounds; ++round) {
    CAPTURE(round);
    write(mutated(bytes, random));
    values += outcome_of(file, open) == Outcome::value ? 1 : 0;
  }
  CAPTURE(values);
  CHECK(values > 0);       // some changes touch nothing that matters
  CHECK(values < rounds);  // and some are seen
}

/// Without the white space that a JSON document may end with.
std::size_t document_size(const std::string& json) { return json.find_last_not_of(" \n") + 1; }

}  // namespace

TEST_CASE("config.json of each architecture, cut off anywhere and mutated 10,000 times") {
  const fuzz::Folder folder;
  const std::vector<std::string> models = {"llama",      "zoo_llama3", "zoo_mistral",  "zoo_qwen2", "zoo_qwen3",
                                           "zoo_gemma3", "zoo_gpt2",   "zoo_gpt_neox", "zoo_phi3",  "zoo_olmo2"};
  for (const std::string& model : models) {
    CAPTURE(model);
    const std::string good = read(std::filesystem::path(CALM_TEST_DATA) / model / "config.json");
    cut_and_mutate(
        "config.json", good, document_size(good), mutations / static_cast<int>(models.size()),
        [&](const std::string& bytes) { folder.write("config.json", bytes); },
        [&] {
          const calm::ModelConfig config = calm::read_config_json(folder.path() / "config.json");
          fuzz::use(static_cast<double>(config.spec.width));
        });
  }
}

TEST_CASE("the index of a sharded checkpoint, cut off anywhere and mutated 10,000 times") {
  const fuzz::Folder folder;
  for (const std::string number : {"1", "2"}) {
    calm::SafetensorsWriter writer;
    Matrix<float> values(2, 3);
    writer.add("tensor." + number, values);
    writer.write(folder.path() / ("model-0000" + number + "-of-00002.safetensors"));
  }
  const std::string good =
      R"({"metadata": {"total_size": 48}, "weight_map": {"tensor.1": "model-00001-of-00002.safetensors", )"
      R"("tensor.2": "model-00002-of-00002.safetensors"}})";
  cut_and_mutate(
      folder.path().string(), good, good.size(), mutations,
      [&](const std::string& bytes) { folder.write("model.safetensors.index.json", bytes); },
      [&] {
        const calm::Checkpoint checkpoint(folder.path());
        checkpoint.for_each_name([&](const std::string& name) {
          const auto values = checkpoint.matrix(name).dense<float>();
          fuzz::use(static_cast<double>(values(0, 0)));
        });
      });
}

TEST_CASE("both files of an adapter, mutated 10,000 times") {
  const fuzz::Folder folder;
  const auto anchor = fuzz::anchor(), augment = fuzz::augment();
  using Composed = calm::ComposedModel<fuzz::Llama, fuzz::Llama>;
  calm::save_adapter(Composed(anchor, {augment}, {{0, 0, 1}}), folder.path());
  const auto open = [&] {
    const auto model = calm::load_adapter(folder.path(), anchor, augment);
    calm::for_each_parameter(model, [](const std::string&, const auto& parameter) {
      for (const float x : parameter.value.values()) fuzz::use(static_cast<double>(x));
    });
  };
  for (const std::string name : {"adapter_config.json", "adapter_model.safetensors"}) {
    CAPTURE(name);
    const std::string good = read(folder.path() / name);
    cut_and_mutate(
        "adapter_", good, name == "adapter_config.json" ? document_size(good) : good.size(), mutations / 2,
        [&](const std::string& bytes) { folder.write(name, bytes); }, open);
    folder.write(name, good);
  }
}

TEST_CASE("JSON lines, cut off anywhere and mutated 10,000 times") {
  const fuzz::Folder folder;
  const std::string first = "{\"prompt\": \"a b\", \"completion\": \" \\u00e4\"}";
  cut_and_mutate(
      "lines.jsonl", first + "\n\n{\"completion\": \"1\", \"prompt\": \"\", \"note\": 3}\n", first.size(), mutations,
      [&](const std::string& bytes) { folder.write("lines.jsonl", bytes); },
      [&] {
        for (const calm::TextExample& example : calm::read_text_examples(folder.path() / "lines.jsonl"))
          fuzz::use(static_cast<double>(example.prompt.size() + example.completion.size()));
      });
}

TEST_CASE("a checkpoint of a run, mutated 10,000 times, is refused or gives numbers") {
  const fuzz::Folder folder;
  using Composed = calm::ComposedModel<fuzz::Llama, fuzz::Llama>;
  Cpu ctx(1);
  Composed model(fuzz::anchor(), {fuzz::augment()}, {{0, 0, 1}});
  calm::Trainer<Composed, Cpu> trainer(ctx, model, calm::CosineSchedule{.steps = 9});
  const auto path = folder.path() / "last.safetensors";
  calm::save_checkpoint(trainer, path, 2.5, "this run");
  const std::string good = read(path);
  cut_and_mutate(
      "last.safetensors", good, good.size(), mutations,
      [&](const std::string& bytes) { folder.write("last.safetensors", bytes); },
      [&] {
        fuzz::use(calm::load_checkpoint(trainer, path, "this run"));
        REQUIRE(trainer.step_count() >= 0);
      });
}

}  // namespace mutation_test
