// The tokenizer of a model as people have it: tokenizer.json in a folder, or the vocabulary in a .gguf file.
#pragma once

#include <calm/io/folder.hpp>
#include <calm/io/gguf.hpp>
#include <calm/io/tokenizer/gguf_vocabulary.hpp>
#include <calm/io/tokenizer/tokenizer_json.hpp>

namespace calm::inline CALM_ABI {

/// Throws FormatError where a value is missing, or of another kind.
inline GgufVocabulary read_gguf_vocabulary(const GgufFile& file) {
  const GgufMetadata& meta = file.metadata();
  const auto key = [](const char* name) { return std::string("tokenizer.ggml.") + name; };
  GgufVocabulary result;
  result.model = meta.get_string(key("model"));
  result.pre = meta.get_string_or(key("pre"), "default");
  const auto texts = [&](const char* name, Index most) {
    std::size_t count = 0, bytes = 0;
    meta.for_each_string(key(name), [&](std::string_view text) {
      ++count;
      bytes += text.size();
    });
    require<FormatError>(static_cast<Index>(count) <= most, file.path(), ": key \"", key(name), "\": ", count,
                         " elements; at most ", most, " are read");
    TextList list;
    list.reserve(count, bytes);
    meta.for_each_string(key(name), [&](std::string_view text) { list.push_back(text); });
    return list;
  };
  result.tokens = texts("tokens", Vocabulary::most_ids);
  if (meta.contains(key("scores"))) result.scores = meta.get_numbers<float>(key("scores"));
  if (meta.contains(key("token_type"))) result.token_types = meta.get_integers<std::int32_t>(key("token_type"), 0, 100);
  if (meta.contains(key("merges"))) result.merges = texts("merges", GgufVocabulary::most_merges);
  const auto id = [&](const char* name, std::optional<TokenId>& target) {
    const Index last = static_cast<Index>(result.tokens.size()) - 1;
    if (meta.contains(key(name))) target = static_cast<TokenId>(meta.get_integer(key(name), 0, last));
  };
  id("bos_token_id", result.bos);
  id("eos_token_id", result.eos);
  id("unknown_token_id", result.unknown);
  id("padding_token_id", result.pad);
  const auto flag = [&](const char* name, std::optional<bool>& target) {
    if (meta.contains(key(name))) target = meta.get_boolean(key(name));
  };
  flag("add_bos_token", result.add_bos);
  flag("add_eos_token", result.add_eos);
  flag("add_space_prefix", result.add_space_prefix);
  result.chat_template = meta.get_string_or("tokenizer.chat_template", "");
  return result;
}

/// The tokenizer of a folder or of a .gguf file. Throws IoError or FormatError.
inline Tokenizer open_tokenizer(const std::filesystem::path& path) {
  if (is_folder(path)) return load_tokenizer(path);
  const GgufFile file(path);
  return make_tokenizer(read_gguf_vocabulary(file), file.path());
}

/// The same, or nothing where the folder or file has no tokenizer.
inline std::optional<Tokenizer> find_tokenizer(const std::filesystem::path& path) {
  if (is_folder(path)) {
    if (!is_there(path / "tokenizer.json")) return std::nullopt;
    return load_tokenizer(path);
  }
  const GgufFile file(path);
  if (!file.metadata().contains("tokenizer.ggml.model")) return std::nullopt;
  return make_tokenizer(read_gguf_vocabulary(file), file.path());
}

}  // namespace calm::inline CALM_ABI
