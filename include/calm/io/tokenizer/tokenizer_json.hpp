// tokenizer.json of Hugging Face tokenizers (https://huggingface.co/docs/tokenizers), and beside it the special tokens
// of tokenizer_config.json, the chat template there or in chat_template.jinja, and the end tokens of
// generation_config.json or config.json.
//
// Read: the model BPE. Refused by name: other models, dropout, prefixes and suffixes of subwords, and steps that make a
// text longer than 64 times its bytes and 4 kB (text_growth.hpp). Padding and truncation are no part of a tokenizer
// here. The lists of tokens and merges are never held as parsed JSON, which would take eight times the file.
#pragma once

#include <calm/io/folder.hpp>
#include <calm/io/json.hpp>
#include <calm/io/tokenizer/pipeline_json.hpp>
#include <calm/io/tokenizer/tokenizer.hpp>
#include <calm/io/tokenizer/tokenizer_lists.hpp>

#include <algorithm>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

class TokenizerJsonReader {
 public:
  /// `file` without what `lists` has taken out of it.
  TokenizerJsonReader(const Json& file, TokenizerLists lists, const std::string& where)
      : file_(file), lists_(std::move(lists)), where_(where) {}

  TokenizerParts read() {
    read_normalizer(file_, where_, parts_.normalizer);
    parts_.bpe.byte_level = read_pre_tokenizer(file_, where_, parts_.pre_tokenizer);
    const bool decodes_bytes = read_decoder(file_, where_, parts_.decoder);
    require<FormatError>(decodes_bytes == parts_.bpe.byte_level, where_,
                         ": a ByteLevel pre_tokenizer and a ByteLevel decoder are supported only together");
    const std::string where = where_ + ": model";
    const Json& model = get_object(file_, "model", where_);
    check_model(model, where);
    get_object(model, "vocab", where);
    get_array(model, "merges", where);
    lists_.sort_tokens(where + ": vocab");
    read_vocabulary(where + ": vocab");
    read_added_tokens();
    lists_.forget_tokens();
    parts_.vocabulary.build_index(where + ": vocab");
    read_options(model, where);
    read_merges(where + ": merges");
    lists_ = {};
    read_post_processor(file_, where_, parts_);
    if (!parts_.prefix.empty()) parts_.bos = parts_.prefix.front();
    return std::move(parts_);
  }

 private:
  static void check_model(const Json& model, const std::string& where) {
    // Files of 2019 name no type; a BPE is what has merges.
    const std::string type = get_string_or(model, "type", model.contains("merges") ? "BPE" : "unknown", where);
    require<FormatError>(type == "BPE", where, ": the type ", in_quotes(type), " is not supported; BPE is");
    for (const std::string key : {"continuing_subword_prefix", "end_of_word_suffix"})
      require<FormatError>(get_string_or(model, key, "", where).empty(), where, ": ", in_quotes(key),
                           " is not supported");
    require<FormatError>(get_number_or(model, "dropout", 0, where) == 0, where, ": \"dropout\" is not supported");
  }

  void read_vocabulary(const std::string& where) {
    std::size_t size = 0;
    for (std::size_t i = 0; i < lists_.tokens(); ++i) size += lists_.token(i).size();
    parts_.vocabulary.reserve(lists_.tokens(), size);
    std::string bytes;
    for (std::size_t i = 0; i < lists_.tokens(); ++i) {
      const std::string_view token = lists_.token(i);
      const bool in_alphabet = parts_.bpe.byte_level && alphabet_.decode(token, bytes);
      parts_.vocabulary.set(lists_.id(i), in_alphabet ? bytes : token, in_alphabet || !parts_.bpe.byte_level, where);
    }
  }

  void read_added_tokens() {
    const Json* list = find_value(file_, "added_tokens", where_);
    if (list == nullptr) return;
    require<FormatError>(list->is_array(), where_, ": \"added_tokens\": expected an array, found ", kind_of(*list));
    std::map<std::string, TokenId> seen;
    std::string bytes;
    for (std::size_t i = 0; i < list->size(); ++i) {
      const Json& entry = (*list)[i];
      const std::string where = message(where_, ": added_tokens/", i);
      AddedToken token;
      token.content = get_string(entry, "content", where);
      token.id = static_cast<TokenId>(get_integer(entry, "id", where, 0, Vocabulary::most_ids - 1));
      token.special = get_boolean_or(entry, "special", false, where);
      token.normalized = get_boolean_or(entry, "normalized", !token.special, where);
      token.single_word = get_boolean_or(entry, "single_word", false, where);
      token.lstrip = get_boolean_or(entry, "lstrip", false, where);
      token.rstrip = get_boolean_or(entry, "rstrip", false, where);
      require<FormatError>(token.content.size() <= 4096, where, ": a content of more than 4096 bytes");
      require<FormatError>(seen.emplace(token.content, token.id).second, where, ": the content ",
                           in_quotes(token.content), " occurs twice");
      const auto known = lists_.find(token.content);
      if (!known) {
        const bool in_alphabet = parts_.bpe.byte_level && alphabet_.decode(token.content, bytes);
        parts_.vocabulary.set(token.id, in_alphabet ? bytes : token.content, false, where);
      } else {
        require<FormatError>(*known == token.id, where, ": the content ", in_quotes(token.content), " has the id ",
                             token.id, " here and ", *known, " in the vocabulary");
      }
      parts_.added.push_back(std::move(token));
    }
  }

  void read_options(const Json& model, const std::string& where) {
    BpeOptions& options = parts_.bpe;
    options.ignore_merges = get_boolean_or(model, "ignore_merges", false, where);
    options.fuse_unknown = get_boolean_or(model, "fuse_unk", false, where);
    options.uses_byte_tokens = get_boolean_or(model, "byte_fallback", false, where);
    if (const std::string unknown = get_string_or(model, "unk_token", "", where); !unknown.empty()) {
      options.unknown = find_token(unknown);
      require<FormatError>(options.unknown != Vocabulary::none, where, ": the unk_token ", in_quotes(unknown),
                           " is not in the vocabulary");
      parts_.unknown = options.unknown;
    }
    for (int byte = 0; byte < 256; ++byte) {
      const char digits[] = {"0123456789ABCDEF"[byte >> 4], "0123456789ABCDEF"[byte & 15], '\0'};
      options.byte_tokens[static_cast<std::size_t>(byte)] =
          options.uses_byte_tokens ? find_token(message("<0x", digits, ">")) : Vocabulary::none;
    }
  }

  void read_merges(const std::string& where) {
    parts_.merges.reserve(lists_.merges());
    std::string both;
    for (std::size_t i = 0; i < lists_.merges(); ++i) {
      const auto id_of = [&](std::string_view token) {
        const TokenId id = find_token(token);
        if (id == Vocabulary::none)
          throw FormatError(message(where, '/', i, ": ", in_quotes(token), " is not in the vocabulary"));
        return id;
      };
      const std::string_view left = lists_.left(i), right = lists_.right(i);
      both.assign(left).append(right);
      parts_.merges.push_back({id_of(left), id_of(right), static_cast<std::uint32_t>(i), id_of(both)});
    }
  }

  /// The id of a token as the file writes it.
  TokenId find_token(std::string_view token) const {
    std::string bytes;
    if (!parts_.bpe.byte_level) return parts_.vocabulary.find(token);
    return alphabet_.decode(token, bytes) ? parts_.vocabulary.find(bytes) : Vocabulary::none;
  }

  const Json& file_;
  TokenizerLists lists_;
  const std::string& where_;
  const ByteAlphabet alphabet_;
  TokenizerParts parts_;
};

/// Reads the text of a tokenizer.json. Throws FormatError: where, the place, the reason.
inline TokenizerParts parse_tokenizer_json(std::string_view text, const std::string& where) {
  TokenizerLists lists;
  const auto streams = lists.streams(where, text.size());
  JsonLimits limits;
  limits.memory_bytes = static_cast<Index>(text.size()) / 2 + (Index{32} << 20);  // the rest is for the lists
  const Json file = parse_json(text, where, limits, streams);
  return TokenizerJsonReader(file, std::move(lists), where).read();
}

/// Takes over what a tokenizer_config.json says: bos_token, eos_token, unk_token, pad_token and chat_template, of
/// a list of templates the one named "default".
inline void apply_tokenizer_config(const Json& config, const std::string& where, TokenizerParts& parts) {
  const auto take = [&](const std::string& key, std::optional<TokenId>& id) {
    const Json* value = find_value(config, key, where);
    if (value == nullptr) return;
    const std::string& content =
        value->is_object() ? get_string(*value, "content", where + ": " + key) : get_string(config, key, where);
    for (const AddedToken& token : parts.added)
      if (token.content == content) id = token.id;
  };
  take("bos_token", parts.bos);
  std::optional<TokenId> eos;
  take("eos_token", eos);
  if (eos) parts.ends = {*eos};
  take("unk_token", parts.unknown);
  take("pad_token", parts.pad);
  const Json* chat = find_value(config, "chat_template", where);
  if (chat == nullptr) return;
  const auto set = [&](const std::string& text) {
    parts.chat_template = text;
    parts.chat_source = where;
  };
  if (chat->is_string()) set(chat->get_ref<const std::string&>());
  if (!chat->is_array()) return;
  for (std::size_t i = 0; i < chat->size(); ++i) {
    const std::string here = message(where, ": chat_template/", i);
    if (get_string((*chat)[i], "name", here) == "default") set(get_string((*chat)[i], "template", here));
  }
}

/// The "eos_token_id" of a generation_config.json or config.json, a number or a list of them; empty where it has none.
/// Throws FormatError for anything else.
inline std::vector<TokenId> read_end_tokens(const Json& config, const std::string& where) {
  std::vector<TokenId> ends;
  const std::string what = where + ": \"eos_token_id\"";
  if (const Json* value = find_value(config, "eos_token_id", where)) {
    require<FormatError>(value->is_array() || value->is_number_integer(), what,
                         ": expected an integer or an array of integers, found ", kind_of(*value));
    const auto add = [&](const Json& id) {
      ends.push_back(static_cast<TokenId>(to_integer(id, what, 0, Vocabulary::most_ids - 1)));
    };
    if (value->is_array()) std::for_each(value->begin(), value->end(), add);
    else add(*value);
  }
  if (ends.empty() && find_value(config, "text_config", where) != nullptr)
    return read_end_tokens(get_object(config, "text_config", where), where + ": \"text_config\"");
  return ends;
}

/// Reads tokenizer.json at `path`, or in the folder `path` with the tokenizer_config.json and chat_template.jinja
/// there, where there are any; as in transformers, the template of the latter counts. The end token of the former comes
/// first, behind it those at which the model's own files say that it stops. Throws IoError or FormatError.
inline Tokenizer load_tokenizer(const std::filesystem::path& path) {
  const std::filesystem::path folder = is_folder(path) ? path : std::filesystem::path();
  const auto file = FileMap::open(folder.empty() ? path : folder / "tokenizer.json");
  TokenizerParts parts = parse_tokenizer_json(file->text(), file->path());
  parts.chat_source = path.string();
  if (!folder.empty() && is_there(folder / "tokenizer_config.json")) {
    const std::filesystem::path name = folder / "tokenizer_config.json";
    apply_tokenizer_config(read_json(name), name.string(), parts);
  }
  if (!folder.empty() && is_there(folder / "chat_template.jinja")) {
    const auto chat = FileMap::open(folder / "chat_template.jinja");
    require<FormatError>(chat->size() <= JsonLimits().token_bytes, chat->path(), ": ", chat->size(),
                         " bytes; a chat template of more than ", JsonLimits().token_bytes, " is not read");
    parts.chat_template = chat->text();
    parts.chat_source = chat->path();
  }
  std::vector<TokenId> ends;
  for (const char* name : {"generation_config.json", "config.json"})
    if (!folder.empty() && ends.empty() && is_there(folder / name))
      ends = read_end_tokens(read_json(folder / name), (folder / name).string());
  for (const TokenId end : ends)
    if (std::find(parts.ends.begin(), parts.ends.end(), end) == parts.ends.end()) parts.ends.push_back(end);
  return Tokenizer(std::move(parts));
}

}  // namespace calm::inline CALM_ABI
