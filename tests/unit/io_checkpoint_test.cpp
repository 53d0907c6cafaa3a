#include <doctest/doctest.h>
#include <calm/io/hugging_face.hpp>
#include <calm/model/zoo/llama.hpp>

#include <support/temporary_folder.hpp>

#include <fstream>
#include <string>
#include <vector>

namespace io_checkpoint_test {

namespace {

void write_shard(const std::filesystem::path& path, const std::vector<std::string>& tensors) {
  calm::SafetensorsWriter writer;
  const calm::Matrix<float> values(1, 4);
  for (const std::string& name : tensors) writer.add(name, values);
  writer.write(path);
}

void write_index(const std::filesystem::path& folder, const std::string& weight_map) {
  std::ofstream(folder / "model.safetensors.index.json") << R"({"weight_map": {)" << weight_map << "}}";
}

std::string error_of(const std::filesystem::path& folder) {
  try {
    calm::Checkpoint{folder};
  } catch (const calm::Error& error) {
    return error.what();
  }
  return "no error";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("a tensor of a shard that the index leaves out is refused by name, as one of a single file is") {
  const calm_test::TemporaryFolder sharded, single;
  write_shard(sharded.path / "a.safetensors", {"model.norm.weight"});
  write_shard(sharded.path / "b.safetensors", {"lm_head.weight", "model.extra.weight"});
  write_index(sharded.path, R"("model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors")");
  write_shard(single.path / "model.safetensors", {"model.norm.weight", "lm_head.weight", "model.extra.weight"});
  for (const auto& folder : {sharded.path, single.path}) {
    const calm::Checkpoint files(folder);
    CHECK(files.size() == 3);
    const calm::ModelSpec spec;
    calm::HuggingFaceWeights<calm::zoo::Llama> weights(files, spec);
    for (const std::string name : {"model.norm.weight", "lm_head.weight"}) CHECK(weights(name, 1, 4).cols() == 4);
    CHECK_THROWS_WITH_AS(
        weights.check_all_used(),
        (folder.string() + ": tensor \"model.extra.weight\" belongs to no weight of a model of type llama").c_str(),
        calm::FormatError);
  }
  write_shard(sharded.path / "b.safetensors", {"lm_head.weight", "model.norm.weight"});
  CHECK(has(error_of(sharded.path), "b.safetensors: holds the tensor \"model.norm.weight\", as does "));
}

TEST_CASE("a shard whose name would reach the terminal as an order, or end in the middle, is refused") {
  const calm_test::TemporaryFolder folder;
  write_shard(folder.path / "a.safetensors", {"w"});
  const auto with_name = [&](const std::string& name) {
    write_index(folder.path, R"("w": ")" + name + '"');
    return error_of(folder.path);
  };
  CHECK(with_name("a.safetensors") == "no error");
  const std::string refused = "is no name of a file in this folder";
  CHECK(has(with_name(R"(\u001b[31mred.safetensors)"), R"("?[31mred.safetensors" )" + refused));
  CHECK(has(with_name(R"(a.safetensors\u0000.txt)"), R"("a.safetensors?.txt" )" + refused));
  CHECK(has(with_name(R"(\u009b31m)"), R"("?31m" )" + refused));
  for (const std::string name : {"../a.safetensors", "", "..", R"(a\nb)", R"(\u007f)"})
    CHECK(has(with_name(name), refused));
  CHECK(has(with_name("\u00e9.safetensors"), "\u00e9.safetensors"));
  CHECK_FALSE(has(with_name("\u00e9.safetensors"), refused));
}

TEST_CASE("a folder without safetensors is refused with what was expected") {
  const calm_test::TemporaryFolder folder;
  try {
    const calm::Checkpoint checkpoint(folder.path);
    FAIL("no error");
  } catch (const calm::IoError& error) {
    const std::string text = error.what();
    CHECK(text.find(folder.path.string() + ": holds neither model.safetensors nor") != std::string::npos);
    CHECK(text.find("a .gguf file") != std::string::npos);
  }
}

}  // namespace io_checkpoint_test
