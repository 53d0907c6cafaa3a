// config.json of a Hugging Face folder, as transformers 4 and 5 write it: the architecture by its model_type, the sizes
// as a ModelSpec; keys that are left out have the values of config_defaults.hpp. Writing: of Llama-style models.
#pragma once

#include <calm/io/config_defaults.hpp>
#include <calm/io/json.hpp>
#include <calm/model/spec.hpp>

#include <span>

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

/// A model as its config.json describes it.
struct ModelConfig {
  std::string model_type;  // as transformers calls it: "llama", "gemma3_text"
  ModelSpec spec;
};

namespace config {

/// The object that describes the text model, and where it stands for messages.
struct Reader {
  const Json& json;
  std::string where;

  static constexpr Index most = Index{1} << 31;

  bool has(const char* key) const { return find_value(json, key, where) != nullptr; }
  bool is_null(const char* key) const { return json.contains(key) && !has(key); }
  Index size(const char* key) const { return get_integer(json, key, where, 1, most); }
  Index size_or(const char* key, Index fallback) const { return get_integer_or(json, key, fallback, where, 1, most); }
  /// With a default, where it is not 0.
  Index size(const char* key, Index fallback) const { return fallback > 0 ? size_or(key, fallback) : size(key); }
  double number_or(const char* key, double fallback) const { return get_number_or(json, key, fallback, where); }
  bool flag(const char* key, bool fallback = false) const { return get_boolean_or(json, key, fallback, where); }
  std::string text_or(const char* key, const char* fallback) const { return get_string_or(json, key, fallback, where); }

  /// Throws where the model has what its architecture here does not have.
  void refuse(bool found, const char* key, const char* what) const {
    require<FormatError>(!found, where, ": \"", key, "\": ", what, " are not known here");
  }
  void refuse_flag(const char* key, const char* what) const { refuse(flag(key), key, what); }
  void expect_text(const char* key, const char* fallback, std::span<const std::string_view> known) const {
    const std::string found = text_or(key, fallback);
    require<FormatError>(std::find(known.begin(), known.end(), found) != known.end(), where, ": \"", key, "\" is ",
                         in_quotes(found), ", expected \"", known.front(), "\"");
  }
};

inline constexpr std::string_view silu[] = {"silu", "swish"};
inline constexpr std::string_view gelu_tanh[] = {"gelu_pytorch_tanh", "gelu_new", "gelu_fast"};
inline constexpr std::string_view gelu[] = {"gelu"};

/// One description of rotary positions: rope_type, factor, and what Llama 3 adds. Gives the base too, where it is
/// there.
inline void read_rope(const Json& rope, const std::string& where, double& base, RotaryScaling& scaling) {
  const Reader in{rope, where};
  const std::string kind = get_string_or(rope, "rope_type", get_string_or(rope, "type", "default", where), where);
  base = in.number_or("rope_theta", base);
  if (kind == "default") return;
  require<FormatError>(kind == "linear" || kind == "llama3", where, ": rotary positions of type ", in_quotes(kind),
                       " are not known here; \"default\", \"linear\" and \"llama3\" are");
  scaling.kind = kind == "linear" ? RotaryScaling::Kind::linear : RotaryScaling::Kind::llama3;
  scaling.factor = get_number(rope, "factor", where);
  require<FormatError>(scaling.factor >= 1, where, ": \"factor\": expected at least 1, found ", scaling.factor);
  if (kind == "linear") return;
  scaling.low_frequency_factor = get_number(rope, "low_freq_factor", where);
  scaling.high_frequency_factor = get_number(rope, "high_freq_factor", where);
  scaling.original_context = get_number(rope, "original_max_position_embeddings", where);
  require<FormatError>(scaling.high_frequency_factor > scaling.low_frequency_factor && scaling.original_context > 0,
                       where, ": \"high_freq_factor\" must be above \"low_freq_factor\"");
}

/// The part of each head that turns.
inline Index rotary_width(const Reader& in, const ModelSpec& spec, double part) {
  require<FormatError>(part > 0 && part <= 1, in.where, ": ", part, " of each head cannot turn; a part of 1 can");
  const auto width = static_cast<Index>(static_cast<double>(spec.heads.width) * part);
  require<FormatError>(width > 0 && width % 2 == 0, in.where, ": ", width, " values of each head cannot turn in pairs");
  return width == spec.heads.width ? 0 : width;
}

/// rope_theta and rope_scaling (transformers 4), or rope_parameters (5), for all blocks alike.
inline void read_rotary(const Reader& in, ModelSpec& spec, const char* base_key = "rope_theta",
                        const char* part_key = "partial_rotary_factor", double part = 1) {
  spec.rotary_base = in.number_or(base_key, 10000);
  part = in.number_or(part_key, part);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!in.has(key)) continue;
    const Json& rope = get_object(in.json, key, in.where);
    read_rope(rope, message(in.where, ": \"", key, "\""), spec.rotary_base, spec.rotary_scaling);
    part = get_number_or(rope, "partial_rotary_factor", part, in.where);
  }
  spec.rotary_width = rotary_width(in, spec, part);
}

/// "layer_types": which blocks see a window.
inline std::vector<bool> read_layer_types(const Reader& in, Index blocks) {
  std::vector<bool> windowed;
  for (const Json& type : get_array(in.json, "layer_types", in.where)) {
    const std::string text = type.is_string() ? type.get<std::string>() : std::string();
    require<FormatError>(text == "sliding_attention" || text == "full_attention", in.where,
                         ": \"layer_types\": ", in_quotes(type.is_string() ? text : type.dump()),
                         " is not known here; \"sliding_attention\" and \"full_attention\" are");
    windowed.push_back(text == "sliding_attention");
  }
  require<FormatError>(static_cast<Index>(windowed.size()) == blocks, in.where, ": \"layer_types\" names ",
                       windowed.size(), " blocks, \"num_hidden_layers\" is ", blocks);
  return windowed;
}

/// The sizes that most families name alike.
inline ModelSpec read_common(const Reader& in, const ConfigDefaults& defaults, const char* epsilon_key) {
  ModelSpec spec;
  spec.vocabulary = in.size("vocab_size", defaults.vocabulary);
  spec.width = in.size("hidden_size", defaults.width);
  spec.hidden = in.size("intermediate_size", defaults.hidden);
  if (in.has("num_hidden_layers") || defaults.blocks == 0)
    spec.blocks = get_integer(in.json, "num_hidden_layers", in.where, 1, 10000);
  else spec.blocks = defaults.blocks;
  const Index heads = in.size("num_attention_heads", defaults.heads);
  const bool as_many = defaults.kv_heads == 0 || in.is_null("num_key_value_heads");
  const bool divided = defaults.head_width == 0 || in.is_null("head_dim");
  constexpr Index widest = 1 << 16;  // no weight shows it before tables of this size are made
  spec.heads.query_heads = heads;
  spec.heads.kv_heads = in.size_or("num_key_value_heads", as_many ? heads : defaults.kv_heads);
  spec.heads.width =
      get_integer_or(in.json, "head_dim", divided ? spec.width / heads : defaults.head_width, in.where, 1, widest);
  require<FormatError>(spec.heads.width <= widest, in.where, ": a head of ", spec.heads.width, " values is too wide");
  spec.norm_epsilon = in.number_or(epsilon_key, defaults.norm_epsilon);
  spec.context = in.size("max_position_embeddings", defaults.context);
  spec.tied_embeddings = in.flag("tie_word_embeddings", defaults.tied_embeddings);
  return spec;
}

/// How many keys a token of a windowed block sees; 0: all.
inline Index read_window(const Reader& in, const ConfigDefaults& defaults) {
  return in.is_null("sliding_window") ? 0 : in.size_or("sliding_window", defaults.window);
}

inline ModelSpec read_llama_like(const Reader& in, const ConfigDefaults& defaults) {
  const std::string_view type = defaults.model_type;
  in.refuse_flag("mlp_bias", "biases");
  if (type != "qwen2") in.refuse_flag("attention_bias", "biases");
  in.expect_text("hidden_act", "silu", silu);
  ModelSpec spec = read_common(in, defaults, "rms_norm_eps");
  read_rotary(in, spec);
  // transformers lets a part of a head turn for this type alone among these.
  in.refuse(spec.rotary_width != 0 && defaults.model_type != "phi3", "partial_rotary_factor",
            "heads that turn in part");
  const bool qwen = type == "qwen2" || type == "qwen3";
  if (type == "mistral" || type == "phi3" || (qwen && in.flag("use_sliding_window")))
    spec.window = read_window(in, defaults);
  if (spec.window == 0) return spec;
  if (in.has("layer_types")) {
    spec.windowed = read_layer_types(in, spec.blocks);
  } else if (qwen) {  // the first blocks see all
    const Index full = get_integer_or(in.json, "max_window_layers", 28, in.where, 0, 10000);
    for (Index i = 0; i < spec.blocks; ++i) spec.windowed.push_back(i >= full);
  }
  return spec;
}

inline ModelSpec read_gemma3(const Reader& in, const ConfigDefaults& defaults) {
  in.refuse_flag("attention_bias", "biases");
  in.refuse_flag("use_bidirectional_attention", "attention to later tokens");
  for (const char* key : {"attn_logit_softcapping", "final_logit_softcapping"})
    in.refuse(in.has(key), key, "capped logits");
  in.expect_text("hidden_activation", "gelu_pytorch_tanh", gelu_tanh);
  ModelSpec spec = read_common(in, defaults, "rms_norm_eps");
  const double scalar = in.number_or("query_pre_attn_scalar", 256);
  require<FormatError>(scalar > 0, in.where, ": \"query_pre_attn_scalar\" must be positive, found ", scalar);
  spec.query_scale = std::sqrt(static_cast<double>(spec.heads.width) / scalar);
  spec.window = read_window(in, defaults);
  if (in.has("layer_types")) {
    spec.windowed = read_layer_types(in, spec.blocks);
  } else {
    const Index pattern = in.size_or("sliding_window_pattern", 6);
    for (Index i = 0; i < spec.blocks; ++i) spec.windowed.push_back((i + 1) % pattern != 0);
  }
  spec.rotary_width = rotary_width(in, spec, 1);
  spec.rotary_base = in.number_or("rope_theta", 1e6);
  spec.window_rotary_base = in.number_or("rope_local_base_freq", 1e4);
  const std::string where = in.where + ": \"rope_parameters\"";
  if (in.has("rope_scaling"))
    read_rope(get_object(in.json, "rope_scaling", in.where), in.where, spec.rotary_base, spec.rotary_scaling);
  if (in.has("rope_parameters")) {
    const Json& rope = get_object(in.json, "rope_parameters", in.where);
    RotaryScaling unscaled;
    read_rope(get_object(rope, "full_attention", where), where, spec.rotary_base, spec.rotary_scaling);
    read_rope(get_object(rope, "sliding_attention", where), where, spec.window_rotary_base, unscaled);
    in.refuse(unscaled.kind != RotaryScaling::Kind::none, "sliding_attention", "scaled positions of windowed blocks");
  }
  return spec;
}

inline ModelSpec read_gpt2(const Reader& in, const ConfigDefaults& defaults) {
  for (const char* key : {"scale_attn_by_inverse_layer_idx", "add_cross_attention"})
    in.refuse_flag(key, "models with this");
  in.refuse(!in.flag("scale_attn_weights", true), "scale_attn_weights", "scores without 1/sqrt(width)");
  in.expect_text("activation_function", "gelu_new", gelu_tanh);
  ModelSpec spec;
  spec.vocabulary = in.size("vocab_size");
  spec.width = in.size("n_embd");
  spec.hidden = in.size_or("n_inner", 4 * spec.width);
  spec.blocks = get_integer(in.json, "n_layer", in.where, 1, 10000);
  const Index heads = in.size("n_head");
  require<FormatError>(spec.width % heads == 0, in.where, ": ", heads, " heads do not divide the width ", spec.width);
  spec.heads = {heads, heads, spec.width / heads};
  spec.norm_epsilon = in.number_or("layer_norm_epsilon", defaults.norm_epsilon);
  spec.context = in.size("n_positions");
  spec.tied_embeddings = in.flag("tie_word_embeddings", defaults.tied_embeddings);
  return spec;
}

inline ModelSpec read_gpt_neox(const Reader& in, const ConfigDefaults& defaults) {
  in.refuse(!in.flag("use_parallel_residual", true), "use_parallel_residual", "blocks one part after the other");
  in.refuse(!in.flag("attention_bias", true), "attention_bias", "models without these biases");
  in.expect_text("hidden_act", "gelu", gelu);
  ModelSpec spec = read_common(in, defaults, "layer_norm_eps");
  read_rotary(in, spec, "rotary_emb_base", "rotary_pct", 0.25);
  return spec;
}

inline ModelSpec read_spec(const Reader& in, const ConfigDefaults& defaults) {
  const std::string_view type = defaults.model_type;
  ModelSpec spec = type == "gemma3_text" ? read_gemma3(in, defaults)
                   : type == "gpt2"      ? read_gpt2(in, defaults)
                   : type == "gpt_neox"  ? read_gpt_neox(in, defaults)
                                         : read_llama_like(in, defaults);
  spec.check(in.where);
  return spec;
}

}  // namespace config

/// Reads which architecture a folder holds, and its sizes. Throws FormatError for another type, naming those that are
/// known, and for a feature that the architecture here does not have.
inline ModelConfig read_config_json(const std::filesystem::path& path) {
  const Json json = read_json(path);
  const std::string where = path.string();
  const std::string type = get_string(json, "model_type", where);
  const bool nested = type == "gemma3";
  const ConfigDefaults* defaults = find_config_defaults(nested ? "gemma3_text" : type);
  if (defaults == nullptr) {
    std::string known;
    for (const ConfigDefaults& one : config_defaults) known += message(known.empty() ? "" : ", ", one.model_type);
    throw FormatError(message(where, ": models of type ", in_quotes(type), " are not known here; these are: ", known,
                              " (and gemma3, of which the text model is read)"));
  }
  const Json& text = nested ? get_object(json, "text_config", where) : json;
  const config::Reader in{text, nested ? where + ": \"text_config\"" : where};
  return {std::string(defaults->model_type), config::read_spec(in, *defaults)};
}

/// The same for a model whose type the program names.
inline ModelSpec read_config_json(const std::filesystem::path& path, std::string_view model_type) {
  const ModelConfig config = read_config_json(path);
  require<FormatError>(config.model_type == model_type, path.string(), ": the model is of type ",
                       in_quotes(config.model_type), ", expected \"", model_type, "\"");
  return config.spec;
}

}  // namespace calm::inline CALM_ABI
