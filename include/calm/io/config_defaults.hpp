// What a config.json means where it leaves a key out: the defaults of transformers' config classes, as of transformers
// 5.24. tests/python/test_config_defaults.py holds the two together.
//
// transformers writes the sizes of a model (vocab_size, hidden_size, intermediate_size, num_hidden_layers,
// num_attention_heads, and GPT-2's n_...) into every file but Gemma 3's, whose nested "text_config" holds only what
// differs from its class. So Gemma 3 has all its sizes here, and in the files of the others these keys must be there: a
// file without them is damaged, and the sizes of the largest model of the family would be a wrong guess. So would be
// the defaults of the keys that describe scaled rotary positions.
#pragma once

#include <calm/core/config.hpp>

#include <algorithm>
#include <iterator>
#include <string_view>

namespace calm::inline CALM_ABI {

struct ConfigDefaults {
  std::string_view model_type;
  double norm_epsilon = 1e-6;
  Index context = 0;     // 0: must be there
  Index kv_heads = 0;    // 0: as many as there are heads, also where the file says null
  Index head_width = 0;  // 0: the width divided by the heads, also where the file says null
  Index window = 0;      // 0: none, also where the file says null
  bool tied_embeddings = false;
  // Where the file may leave sizes out; 0: it may not.
  Index vocabulary = 0, width = 0, hidden = 0, blocks = 0, heads = 0;
};

/// One for each model_type that is read.
inline constexpr ConfigDefaults config_defaults[] = {
    {.model_type = "llama", .context = 2048},
    {.model_type = "mistral", .context = 131072, .kv_heads = 8, .window = 4096},
    {.model_type = "qwen2", .context = 32768, .kv_heads = 32, .window = 4096},  // windows only with use_sliding_window
    {.model_type = "qwen3", .context = 32768, .kv_heads = 32, .head_width = 128, .window = 4096},  // the same
    {.model_type = "phi3", .norm_epsilon = 1e-5, .context = 4096},
    {.model_type = "gemma3_text",
     .context = 131072,
     .kv_heads = 4,
     .head_width = 256,
     .window = 4096,
     .tied_embeddings = true,
     .vocabulary = 262208,
     .width = 2304,
     .hidden = 9216,
     .blocks = 26,
     .heads = 8},
    {.model_type = "olmo2", .norm_epsilon = 1e-5, .context = 2048},
    {.model_type = "gpt_neox", .norm_epsilon = 1e-5, .context = 2048},
    {.model_type = "gpt2", .norm_epsilon = 1e-5, .tied_embeddings = true},
};

/// The defaults of a model_type, or nullptr for one that is not read.
inline constexpr const ConfigDefaults* find_config_defaults(std::string_view model_type) {
  const auto* found = std::find_if(std::begin(config_defaults), std::end(config_defaults),
                                   [&](const ConfigDefaults& one) { return one.model_type == model_type; });
  return found == std::end(config_defaults) ? nullptr : found;
}

}  // namespace calm::inline CALM_ABI
