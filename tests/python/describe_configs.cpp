// describe_configs FILE...: what calm reads in each config.json, one JSON object a line, for test_config_defaults.py.
#include <calm/io/config_json.hpp>

#include <exception>
#include <iostream>

namespace {

nlohmann::json describe(const std::filesystem::path& path) {
  const calm::ModelConfig config = calm::read_config_json(path);
  const calm::ModelSpec& spec = config.spec;
  auto windowed = nlohmann::json::array();
  for (calm::Index i = 0; i < spec.blocks; ++i) windowed.push_back(spec.is_windowed(i));
  return {{"model_type", config.model_type},
          {"vocabulary", spec.vocabulary},
          {"width", spec.width},
          {"hidden", spec.hidden},
          {"heads", spec.heads.query_heads},
          {"kv_heads", spec.heads.kv_heads},
          {"head_width", spec.heads.width},
          {"norm_epsilon", spec.norm_epsilon},
          {"context", spec.context},
          {"tied_embeddings", spec.tied_embeddings},
          {"rotary_base", spec.rotary_base},
          {"rotary_width", spec.rotary_width == 0 ? spec.heads.width : spec.rotary_width},
          {"query_scale", spec.query_scale},
          {"window", spec.window},
          {"window_rotary_base", spec.window_rotary_base > 0 ? spec.window_rotary_base : spec.rotary_base},
          {"windowed", windowed}};
}

}  // namespace

int main(int argc, char** argv) {
  try {
    for (int i = 1; i < argc; ++i) std::cout << describe(argv[i]) << '\n';
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
