// Where the files of Hugging Face's model classes keep each weight, and a source of weights made of it.
#pragma once

#include <calm/io/checkpoint.hpp>
#include <calm/io/tensor_place.hpp>
#include <calm/model/zoo/gpt2.hpp>
#include <calm/model/zoo/gpt_neox.hpp>
#include <calm/model/zoo/phi3.hpp>

#include <set>

namespace calm::inline CALM_ABI {
namespace hugging_face {

/// Most families name their tensors as Llama does.
template <class Architecture>
TensorPlace place_of(Architecture, const std::string& name, const ModelSpec&) {
  return {.name = name};
}

/// qkv_proj and gate_up_proj hold their parts below each other.
inline TensorPlace place_of(zoo::Phi3, const std::string& name, const ModelSpec& spec) {
  const auto at = block_weight(name);
  if (!at) return {.name = name};
  const auto split = split_kind(at->rest);  // clang 14 lets no lambda capture a structured binding
  const std::string &module = split.first, &kind = split.second;
  const std::string block = message("model.layers.", at->block, ".");
  const Index q = spec.heads.query_heads * spec.heads.width, kv = spec.heads.kv_heads * spec.heads.width;
  const auto attention = [&](Index first) {
    return TensorPlace{.name = block + "self_attn.qkv_proj" + kind, .first = first, .all = q + 2 * kv};
  };
  if (module == "self_attn.q_proj") return attention(0);
  if (module == "self_attn.k_proj") return attention(q);
  if (module == "self_attn.v_proj") return attention(q + kv);
  const auto mlp = [&](Index first) {
    return TensorPlace{.name = block + "mlp.gate_up_proj" + kind, .first = first, .all = 2 * spec.hidden};
  };
  if (module == "mlp.gate_proj") return mlp(0);
  if (module == "mlp.up_proj") return mlp(spec.hidden);
  return {.name = name};
}

/// Names of GPT-2's own; its maps are stored as [in, out], those of attention beside each other.
inline TensorPlace place_of(zoo::Gpt2, const std::string& name, const ModelSpec& spec) {
  const auto at = block_weight(name);
  if (!at) {
    if (name == "model.embed_tokens.weight") return {.name = "transformer.wte.weight"};
    if (name == "model.embed_positions.weight") return {.name = "transformer.wpe.weight"};
    if (name.starts_with("model.norm")) return {.name = "transformer.ln_f" + split_kind(name).second};
    return {.name = name};
  }
  const auto split = split_kind(at->rest);  // clang 14 lets no lambda capture a structured binding
  const std::string &module = split.first, &kind = split.second;
  const std::string block = message("transformer.h.", at->block, ".");
  const bool matrix = kind == ".weight";
  const auto attention = [&](Index part) {
    return TensorPlace{
        .name = block + "attn.c_attn" + kind, .transposed = matrix, .first = part * spec.width, .all = 3 * spec.width};
  };
  if (module == "self_attn.q_proj") return attention(0);
  if (module == "self_attn.k_proj") return attention(1);
  if (module == "self_attn.v_proj") return attention(2);
  if (module == "self_attn.o_proj") return {.name = block + "attn.c_proj" + kind, .transposed = matrix};
  if (module == "mlp.up_proj") return {.name = block + "mlp.c_fc" + kind, .transposed = matrix};
  if (module == "mlp.down_proj") return {.name = block + "mlp.c_proj" + kind, .transposed = matrix};
  return {.name = block + (module == "input_layernorm" ? "ln_1" : "ln_2") + kind};
}

/// query_key_value holds queries, keys and values of the first head, then those of the next.
inline TensorPlace place_of(zoo::GptNeoX, const std::string& name, const ModelSpec&) {
  const auto at = block_weight(name);
  if (!at) {
    if (name == "model.embed_tokens.weight") return {.name = "gpt_neox.embed_in.weight"};
    if (name == "lm_head.weight") return {.name = "embed_out.weight"};
    return {.name = "gpt_neox.final_layer_norm" + split_kind(name).second};
  }
  const auto split = split_kind(at->rest);  // clang 14 lets no lambda capture a structured binding
  const std::string &module = split.first, &kind = split.second;
  const std::string block = message("gpt_neox.layers.", at->block, ".");
  const auto attention = [&](Index part) {
    return TensorPlace{.name = block + "attention.query_key_value" + kind, .part = part};
  };
  if (module == "self_attn.q_proj") return attention(0);
  if (module == "self_attn.k_proj") return attention(1);
  if (module == "self_attn.v_proj") return attention(2);
  if (module == "self_attn.o_proj") return {.name = block + "attention.dense" + kind};
  if (module == "mlp.up_proj") return {.name = block + "mlp.dense_h_to_4h" + kind};
  if (module == "mlp.down_proj") return {.name = block + "mlp.dense_4h_to_h" + kind};
  return {.name = block + module + kind};
}

/// Tensors that hold no weight: masks and tables that older versions stored, and a head beside the table it is tied to.
inline bool is_no_weight(std::string_view name, const ModelSpec& spec) {
  for (const std::string_view end : {".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
                                     ".rotary_emb.inv_freq", ".attention.rotary_emb.inv_freq"})
    if (name.ends_with(end)) return true;
  return spec.tied_embeddings && (name.ends_with("lm_head.weight") || name.ends_with("embed_out.weight"));
}

}  // namespace hugging_face

/// The weights of a folder, by the names that models ask for.
template <class Architecture>
class HuggingFaceWeights {
 public:
  HuggingFaceWeights(const Checkpoint& files, const ModelSpec& spec) : files_(files), spec_(spec) {
    // Files of a base class leave its prefix out, those of models for several kinds of input put one before.
    for (const std::string& prefix : {std::string("transformer."), std::string("gpt_neox."), std::string("model.")}) {
      const std::string table = hugging_face::place_of(Architecture{}, "model.embed_tokens.weight", spec).name;
      if (files.contains(table)) break;
      if (table.starts_with(prefix) && files.contains(table.substr(prefix.size()))) without_ = prefix;
    }
    for (const char* before : {"language_model.", "model.language_model."})
      if (files.contains(before + std::string("model.embed_tokens.weight"))) before_ = before;
    if (files.contains("model.language_model.embed_tokens.weight")) {
      without_ = "model.";
      before_ = "model.language_model.";
    }
  }

  StoredMatrix operator()(const std::string& name, Index rows, Index cols) {
    TensorPlace place = hugging_face::place_of(Architecture{}, name, spec_);
    if (!without_.empty() && place.name.starts_with(without_)) place.name = place.name.substr(without_.size());
    place.name = before_ + place.name;
    used_.insert(place.name);
    return fetch(files_, place, spec_.heads, rows, cols);
  }

  /// Throws where the folder holds a tensor that no weight came from.
  void check_all_used() const {
    files_.for_each_name([&](const std::string& name) {
      const bool other_part = !before_.empty() && !name.starts_with(before_);
      require<FormatError>(used_.contains(name) || other_part || hugging_face::is_no_weight(name, spec_), files_.path(),
                           ": tensor ", in_quotes(name), " belongs to no weight of a model of type ",
                           Architecture::model_type);
    });
  }

 private:
  const Checkpoint& files_;
  const ModelSpec& spec_;
  std::string without_, before_;
  std::set<std::string> used_;
};

}  // namespace calm::inline CALM_ABI
