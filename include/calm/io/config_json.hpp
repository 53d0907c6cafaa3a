// config.json of a Llama-style Hugging Face folder, as transformers 4 and 5 write and read it.
#pragma once

#include <calm/io/json.hpp>
#include <calm/model/spec.hpp>

namespace calm::inline CALM_ABI {

/// The text of config.json for a model of the given type ("llama") and class ("LlamaForCausalLM").
inline std::string config_json(const ModelSpec& spec, std::string_view model_type, std::string_view hugging_face_class,
                               DType dtype) {
  const std::string_view dtype_name = dtype == DType::bf16  ? "bfloat16"
                                      : dtype == DType::f16 ? "float16"
                                      : dtype == DType::f64 ? "float64"
                                                            : "float32";
  const nlohmann::ordered_json config = {
      {"architectures", {hugging_face_class}},
      {"model_type", model_type},
      {"vocab_size", spec.vocabulary},
      {"hidden_size", spec.width},
      {"intermediate_size", spec.hidden},
      {"num_hidden_layers", spec.blocks},
      {"num_attention_heads", spec.heads.query_heads},
      {"num_key_value_heads", spec.heads.kv_heads},
      {"head_dim", spec.heads.width},
      {"max_position_embeddings", spec.context},
      {"rms_norm_eps", spec.norm_epsilon},
      {"rope_theta", spec.rotary_base},
      {"hidden_act", "silu"},
      {"attention_bias", false},
      {"mlp_bias", false},
      {"tie_word_embeddings", spec.tied_embeddings},
      {"torch_dtype", dtype_name},
  };
  return config.dump(2) + "\n";
}

/// Reads the sizes of a model of type `model_type`. Throws FormatError for another type, or for a feature that the
/// architecture here does not have (biases, another activation, scaled rotary positions).
inline ModelSpec read_config_json(const std::filesystem::path& path, std::string_view model_type) {
  const Json config = read_json(path);
  const std::string where = path.string();
  const std::string type = get_string(config, "model_type", where);
  require<FormatError>(type == model_type, where, ": the model is of type ", in_quotes(type), ", expected \"",
                       model_type, "\"");
  const auto refuse = [&](const char* key) {
    require<FormatError>(!get_boolean_or(config, key, false, where), where, ": \"", key,
                         "\" is true; biases are not known here");
  };
  refuse("attention_bias");
  refuse("mlp_bias");
  const std::string activation = get_string_or(config, "hidden_act", "silu", where);
  require<FormatError>(activation == "silu", where, ": the activation is ", in_quotes(activation),
                       ", expected \"silu\"");

  constexpr Index most = Index{1} << 31;
  ModelSpec spec;
  spec.vocabulary = get_integer(config, "vocab_size", where, 1, most);
  spec.width = get_integer(config, "hidden_size", where, 1, most);
  spec.hidden = get_integer(config, "intermediate_size", where, 1, most);
  spec.blocks = get_integer(config, "num_hidden_layers", where, 1, 100000);
  spec.heads.query_heads = get_integer(config, "num_attention_heads", where, 1, most);
  spec.heads.kv_heads = get_integer_or(config, "num_key_value_heads", spec.heads.query_heads, where, 1, most);
  // No weight shows it before tables of this size are made.
  spec.heads.width = get_integer_or(config, "head_dim", spec.width / spec.heads.query_heads, where, 1, 1 << 16);
  require<FormatError>(spec.heads.width <= 1 << 16, where, ": a head of ", spec.heads.width, " values is too wide");
  spec.norm_epsilon = get_number_or(config, "rms_norm_eps", 1e-6, where);
  spec.context = get_integer_or(config, "max_position_embeddings", 2048, where, 1, most);
  spec.tied_embeddings = get_boolean_or(config, "tie_word_embeddings", false, where);
  spec.rotary_base = get_number_or(config, "rope_theta", 10000, where);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!find_value(config, key, where)) continue;
    const Json* rope = &get_object(config, key, where);
    const std::string kind = get_string_or(*rope, "rope_type", get_string_or(*rope, "type", "default", where), where);
    require<FormatError>(kind == "default", where, ": rotary positions of type ", in_quotes(kind),
                         " are not known here");
    spec.rotary_base = get_number_or(*rope, "rope_theta", spec.rotary_base, where);
  }
  spec.check(where);
  return spec;
}

}  // namespace calm::inline CALM_ABI
