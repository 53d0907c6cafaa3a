#include <doctest/doctest.h>
#include <calm/io/config_json.hpp>
#include <support/temporary_folder.hpp>

#include <fstream>
#include <string>

namespace io_config_json_test {

namespace {

calm::ModelConfig config_of(const std::string& text) {
  const calm_test::TemporaryFolder folder;
  std::ofstream(folder.path / "config.json") << text;
  return calm::read_config_json(folder.path / "config.json");
}

/// A config.json with the sizes of a small model and what `rest` adds.
calm::ModelSpec spec_of(const std::string& type, const std::string& rest = "") {
  return config_of(R"({"model_type": ")" + type + R"(", "vocab_size": 61, "hidden_size": 256, "intermediate_size": 48,
                       "num_hidden_layers": 30, "num_attention_heads": 32)" +
                   rest + "}")
      .spec;
}

std::string error_of(const std::string& text) {
  try {
    config_of(text);
  } catch (const calm::FormatError& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("Gemma 3 4B is read from its own config.json, which leaves out what its class defaults") {
  const calm::ModelConfig config = config_of(R"({"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {
      "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}})");
  const calm::ModelSpec& spec = config.spec;
  CHECK(config.model_type == "gemma3_text");
  CHECK(spec.vocabulary == 262208);
  CHECK(spec.width == 2560);
  CHECK(spec.hidden == 10240);
  CHECK(spec.blocks == 34);
  CHECK(spec.heads.query_heads == 8);
  CHECK(spec.heads.kv_heads == 4);
  CHECK(spec.heads.width == 256);
  CHECK(spec.norm_epsilon == 1e-6);
  CHECK(spec.context == 131072);
  CHECK(spec.tied_embeddings);
  CHECK(spec.query_scale == 1);
  CHECK(spec.window == 1024);
  for (calm::Index i = 0; i < 34; ++i) CHECK(spec.is_windowed(i) == (i % 6 != 5));
  CHECK(spec.rotary_base == 1e6);
  CHECK(spec.window_rotary_base == 1e4);
  CHECK(spec.rotary_scaling.kind == calm::RotaryScaling::Kind::linear);
  CHECK(spec.rotary_scaling.factor == 8);
}

TEST_CASE("a key that is left out has the default of its architecture, and null says that there is none") {
  CHECK(spec_of("qwen3").heads.width == 128);
  CHECK(spec_of("qwen3", R"(, "head_dim": null)").heads.width == 8);
  CHECK(spec_of("llama").heads.width == 8);
  CHECK(spec_of("mistral").heads.kv_heads == 8);
  CHECK(spec_of("mistral", R"(, "num_key_value_heads": null)").heads.kv_heads == 32);
  CHECK(spec_of("llama").heads.kv_heads == 32);
  CHECK(spec_of("mistral").window == 4096);
  CHECK(spec_of("mistral", R"(, "sliding_window": null)").window == 0);
  CHECK(spec_of("phi3").window == 0);
  CHECK(spec_of("phi3").norm_epsilon == 1e-5);
  CHECK(spec_of("olmo2").norm_epsilon == 1e-5);
  CHECK(spec_of("qwen2").norm_epsilon == 1e-6);
  CHECK(spec_of("qwen2").window == 0);
  const calm::ModelSpec windowed = spec_of("qwen2", R"(, "use_sliding_window": true)");
  CHECK(windowed.window == 4096);
  for (calm::Index i = 0; i < 30; ++i) CHECK(windowed.is_windowed(i) == (i >= 28));
  const std::string all = R"(, "use_sliding_window": true, "max_window_layers": 0)";
  CHECK(spec_of("qwen2", all).is_windowed(0));
  CHECK(spec_of("gpt_neox", R"(, "rope_parameters": {"rope_type": "default"})").rotary_width == 2);
}

TEST_CASE("the sizes of a model other than Gemma 3 must be there") {
  for (const std::string key :
       {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}) {
    calm::Json json = calm::parse_json(R"({"model_type": "llama", "vocab_size": 61, "hidden_size": 64,
        "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4})",
                                       "x");
    CHECK(error_of(json.dump()) == "no error");
    json.erase(key);
    CHECK(error_of(json.dump()).find("the key \"" + key + "\" is missing") != std::string::npos);
  }
  CHECK(error_of(R"({"model_type": "gemma3"})").find("the key \"text_config\" is missing") != std::string::npos);
}

TEST_CASE("a head of which the parts that turn are no pairs is an error that names the file") {
  for (const std::string type : {"llama", "gemma3_text"}) {
    const std::string error = error_of(R"({"vocab_size": 61, "hidden_size": 64, "intermediate_size": 48, "head_dim": 15,
        "num_hidden_layers": 3, "num_attention_heads": 4, "model_type": ")" +
                                       type + "\"}");
    CHECK(error.find("config.json: 15 values of each head cannot turn in pairs") != std::string::npos);
  }
}

TEST_CASE("heads that turn in part are refused where transformers does not read that") {
  const auto with = [](const std::string& type, const std::string& part) {
    return error_of(R"({"vocab_size": 61, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "pad_token_id": 0, "model_type": ")" +
                    type + R"(", "partial_rotary_factor": )" + part + "}");
  };
  CHECK(with("llama", "0.5").find("partial_rotary_factor") != std::string::npos);
  CHECK(with("llama", "1.0") == "no error");
  CHECK(with("phi3", "0.5") == "no error");
}

TEST_CASE("a type that is not known is an error that names those that are") {
  CHECK(error_of(R"({"model_type": "mamba"})")
            .find("\"mamba\" are not known here; these are: llama, mistral, qwen2, "
                  "qwen3, phi3, gemma3_text, olmo2, gpt_neox, gpt2") != std::string::npos);
}

}  // namespace io_config_json_test
