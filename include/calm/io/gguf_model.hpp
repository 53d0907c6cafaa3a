// Models in GGUF files: the architecture and sizes from the metadata, and where each weight lies.
//
// The converter (llama.cpp's convert_hf_to_gguf.py) turns the rows of queries and keys of Llama so that pairs that turn
// together stand side by side, adds one to Gemma's norms, and stores the divisors of scaled rotary frequencies as a
// tensor. All three are undone here.
#pragma once

#include <calm/io/config_json.hpp>
#include <calm/io/gguf.hpp>
#include <calm/io/tensor_place.hpp>
#include <calm/model/zoo/zoo.hpp>

#include <functional>
#include <set>

namespace calm::inline CALM_ABI {
namespace gguf {

/// general.architecture and the model_type that it stands for. Mistral's files say "llama".
inline constexpr std::pair<std::string_view, std::string_view> architectures[] = {
    {"llama", "llama"},        {"qwen2", "qwen2"}, {"qwen3", "qwen3"},      {"phi3", "phi3"},
    {"gemma3", "gemma3_text"}, {"olmo2", "olmo2"}, {"gptneox", "gpt_neox"}, {"gpt2", "gpt2"}};

/// Linear scaling from the metadata, or Llama 3's from the tensor. As in llama.cpp, a file that says no type means
/// "linear", and older files have the factor under another name.
inline RotaryScaling read_scaling(const GgufFile& file, const std::string& prefix) {
  RotaryScaling scaling;
  const GgufMetadata& meta = file.metadata();
  const std::string_view kind = meta.get_string_or(prefix + "rope.scaling.type", "linear");
  require<FormatError>(kind == "none" || kind == "linear", file.path(), ": rotary positions of type ", in_quotes(kind),
                       " are not known here; \"none\" and \"linear\" are");
  const double old_factor = meta.get_number_or(prefix + "rope.scale_linear", 0);
  const double factor = meta.get_number_or(prefix + "rope.scaling.factor", old_factor);
  if (kind == "linear" && factor != 0 && factor != 1) {  // 0: none is said
    scaling.kind = RotaryScaling::Kind::linear;
    scaling.factor = factor;
    require<FormatError>(factor >= 1, file.path(), ": rope.scaling.factor: expected at least 1, found ", factor);
  }
  require<FormatError>(!file.contains("rope_factors_long.weight"), file.path(),
                       ": rotary positions of type \"longrope\" are not known here");
  if (file.contains("rope_freqs.weight")) {
    require<FormatError>(scaling.kind == RotaryScaling::Kind::none, file.path(),
                         ": has both \"rope_freqs.weight\" and a rope.scaling.factor; one was expected");
    scaling.kind = RotaryScaling::Kind::divided;
    const Matrix<double> values = file.matrix("rope_freqs.weight").dense<double>();
    scaling.divisors.assign(values.values().begin(), values.values().end());
    for (const double x : scaling.divisors)
      require<FormatError>(std::isfinite(x) && x > 0, file.path(), ": tensor \"rope_freqs.weight\" holds ", x,
                           "; expected positive numbers");
  }
  return scaling;
}

/// Every sixth block of Gemma 3 sees all, unless the file says otherwise.
inline void read_gemma3(const GgufFile& file, const std::string& prefix, ModelSpec& spec) {
  const GgufMetadata& meta = file.metadata();
  spec.window = meta.get_integer(prefix + "attention.sliding_window", 1, Index{1} << 31);
  spec.window_rotary_base = meta.get_number_or(prefix + "rope.freq_base_swa", 1e4);
  const Index pattern = meta.get_integer_or(prefix + "attention.sliding_window_pattern", 6, 1, Index{1} << 31);
  for (Index i = 0; i < spec.blocks; ++i) spec.windowed.push_back((i + 1) % pattern != 0);
  constexpr Index blocks_of_27b = 62;  // it alone scales by the width of the stream over the number of heads
  if (spec.blocks == blocks_of_27b)
    spec.query_scale =
        std::sqrt(static_cast<double>(spec.heads.width * spec.heads.query_heads) / static_cast<double>(spec.width));
}

}  // namespace gguf

/// Which architecture a file holds, and its sizes. Throws FormatError for another architecture or an unknown feature.
inline ModelConfig read_gguf_config(const GgufFile& file) {
  const GgufMetadata& meta = file.metadata();
  const std::string_view name = meta.get_string("general.architecture");
  std::string known;
  ModelConfig config;
  for (const auto& [in_file, type] : gguf::architectures) {
    known += (known.empty() ? "" : ", ") + std::string(in_file);
    if (in_file == name) config.model_type = type;
  }
  require<FormatError>(!config.model_type.empty(), file.path(), ": models of the architecture ", in_quotes(name),
                       " are not known here; these are: ", known);
  const std::string prefix = std::string(name) + ".";
  constexpr Index most = Index{1} << 31;
  const auto size = [&](const char* key) { return meta.get_integer(prefix + key, 1, most); };
  ModelSpec& spec = config.spec;
  const std::vector<Index> table = file.entry("token_embd.weight").shape();
  require<FormatError>(table.size() == 2 && table[0] > 0, file.path(), ": tensor \"token_embd.weight\" has ",
                       table.size(), " dimensions; expected [vocabulary, width]");
  spec.vocabulary = table[0];
  spec.width = size("embedding_length");
  spec.hidden = size("feed_forward_length");
  spec.blocks = meta.get_integer(prefix + "block_count", 1, 10000);
  spec.context = size("context_length");
  spec.heads.query_heads = size("attention.head_count");
  spec.heads.kv_heads = meta.get_integer_or(prefix + "attention.head_count_kv", spec.heads.query_heads, 1, most);
  constexpr Index widest = 1 << 16;
  spec.heads.width =
      meta.get_integer_or(prefix + "attention.key_length", spec.width / spec.heads.query_heads, 1, widest);
  require<FormatError>(spec.heads.width <= widest, file.path(), ": a head of ", spec.heads.width,
                       " values is too wide");
  const bool layer_norms = name == "gpt2" || name == "gptneox";
  spec.norm_epsilon = meta.get_number_or(
      prefix + (layer_norms ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon"), 1e-5);
  spec.tied_embeddings = !file.contains("output.weight");
  spec.rotary_base = meta.get_number_or(prefix + "rope.freq_base", name == "gemma3" ? 1e6 : 1e4);
  const Index turning = meta.get_integer_or(prefix + "rope.dimension_count", spec.heads.width, 1, most);
  require<FormatError>(turning % 2 == 0 || name == "gpt2", file.path(), ": ", turning,
                       " values of each head cannot turn in pairs");
  spec.rotary_width = turning == spec.heads.width ? 0 : turning;
  spec.rotary_scaling = gguf::read_scaling(file, prefix);
  require<FormatError>(spec.rotary_scaling.kind != RotaryScaling::Kind::divided ||
                           static_cast<Index>(spec.rotary_scaling.divisors.size()) == turning / 2,
                       file.path(), ": tensor \"rope_freqs.weight\" holds ", spec.rotary_scaling.divisors.size(),
                       " values; expected ", turning / 2);
  if (name == "gemma3") gguf::read_gemma3(file, prefix, spec);
  if (name == "phi3") spec.window = meta.get_integer_or(prefix + "attention.sliding_window", 0, 0, most);
  if (name == "gptneox")
    require<FormatError>(meta.get_boolean_or(prefix + "use_parallel_residual", true), file.path(),
                         ": blocks one part after the other are not known for GPT-NeoX");
  spec.check(file.path());
  return config;
}

/// The weights of a file, by the names that models ask for.
template <class Architecture>
class GgufWeights {
 public:
  GgufWeights(const GgufFile& file, const ModelSpec& spec) : file_(file), spec_(spec) {}

  StoredMatrix operator()(const std::string& name, Index rows, Index cols) {
    TensorPlace place = place_of(name);
    used_.insert(place.name);
    if constexpr (std::is_same_v<Architecture, zoo::Gemma3>)
      if (name.find("norm") != std::string::npos) place.plus = -1;
    return fetch(file_, place, spec_.heads, rows, cols);
  }

  /// Throws where the file holds a tensor that no weight came from: a bias that would be left out, for one.
  void check_all_used() const {
    for (const GgufEntry& entry : file_.tensors())
      require<FormatError>(used_.contains(entry.name) || entry.name == "rope_freqs.weight", file_.path(), ": tensor ",
                           in_quotes(entry.name), " belongs to no weight of a model of type ",
                           Architecture::model_type);
  }

 private:
  TensorPlace place_of(const std::string& name) const {
    const auto at = block_weight(name);
    if (!at) {
      const auto [module, kind] = split_kind(name);
      if (module == "model.embed_tokens") return {.name = "token_embd" + kind};
      if (module == "model.embed_positions") return {.name = "position_embd" + kind};
      if (module == "model.norm") return {.name = "output_norm" + kind};
      return {.name = "output" + kind};
    }
    const auto [module, suffix] = split_kind(at->rest);
    const std::string kind(suffix);
    const std::string block = message("blk.", at->block, ".");
    const Index q = spec_.heads.query_heads * spec_.heads.width, kv = spec_.heads.kv_heads * spec_.heads.width;
    if (file_.contains(block + "attn_qkv" + kind)) {
      const auto part = [&](Index first) {
        return TensorPlace{.name = block + "attn_qkv" + kind, .first = first, .all = q + 2 * kv};
      };
      if (module == "self_attn.q_proj") return part(0);
      if (module == "self_attn.k_proj") return part(q);
      if (module == "self_attn.v_proj") return part(q + kv);
    }
    if constexpr (std::is_same_v<Architecture, zoo::Phi3>) {
      const auto half = [&](Index first) {
        return TensorPlace{.name = block + "ffn_up" + kind, .first = first, .all = 2 * spec_.hidden};
      };
      if (module == "mlp.gate_proj") return half(0);
      if (module == "mlp.up_proj") return half(spec_.hidden);
    }
    constexpr bool turned = std::is_same_v<Architecture, zoo::Llama>;
    if (module == "self_attn.q_proj")
      return {.name = block + "attn_q" + kind, .turned_heads = turned ? spec_.heads.query_heads : 0};
    if (module == "self_attn.k_proj")
      return {.name = block + "attn_k" + kind, .turned_heads = turned ? spec_.heads.kv_heads : 0};
    return {.name = block + std::string(simple_name(module)) + kind};
  }

  static std::string_view simple_name(std::string_view module) {
    constexpr BlockNorms norms = Architecture::norms;
    if (module == "self_attn.v_proj") return "attn_v";
    if (module == "self_attn.o_proj") return "attn_output";
    if (module == "self_attn.q_norm") return "attn_q_norm";
    if (module == "self_attn.k_norm") return "attn_k_norm";
    if (module == "mlp.gate_proj") return "ffn_gate";
    if (module == "mlp.up_proj") return "ffn_up";
    if (module == "mlp.down_proj") return "ffn_down";
    if (module == norms.before_attention) return "attn_norm";
    if (module == norms.before_mlp) return "ffn_norm";
    if (module == norms.after_attention) return "post_attention_norm";
    return "post_ffw_norm";
  }

  const GgufFile& file_;
  const ModelSpec& spec_;
  std::set<std::string, std::less<>> used_;
};

}  // namespace calm::inline CALM_ABI
