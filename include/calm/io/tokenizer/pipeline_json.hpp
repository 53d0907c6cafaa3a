// The parts of a tokenizer.json that are lists of steps: normalizer, pre_tokenizer, decoder, post_processor.
//
// A type that is not listed here is refused by name and place: a tokenizer that leaves out a step is another tokenizer.
// What the steps make of a text is limited (text_growth.hpp). trim_offsets is not applied: ranges are those of all
// bytes of a token.
#pragma once

#include <calm/io/json.hpp>
#include <calm/io/tokenizer/tokenizer.hpp>

#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

/// Calls visit(step, where) for the value of a key: nothing for null, the steps in order for a "Sequence", else once.
/// `list` is the key of a Sequence's array.
inline void for_each_step(const Json& parent, const std::string& key, const std::string& list, const std::string& where,
                          const std::function<void(const Json&, const std::string& where)>& visit) {
  const Json* value = find_value(parent, key, where);
  if (value == nullptr) return;
  std::size_t count = 0;
  const std::function<void(const Json&, const std::string&)> walk = [&](const Json& step, const std::string& here) {
    if (get_string(step, "type", here) == "Sequence") {
      const Json& steps = get_array(step, list, here);
      for (std::size_t i = 0; i < steps.size(); ++i) walk(steps[i], message(here, '/', i));
      return;
    }
    require<FormatError>(++count <= TextGrowth::most_steps, here, ": more than ", TextGrowth::most_steps, " steps");
    visit(step, here);
  };
  walk(*value, where + ": " + key);
}

[[noreturn]] inline void refuse_type(const Json& step, const std::string& where) {
  throw FormatError(message(where, ": the type ", in_quotes(get_string(step, "type", where)), " is not supported"));
}

/// {"String": "..."} or {"Regex": "..."}. An empty string matches nothing.
inline Regex read_pattern(const Json& step, const std::string& where) {
  const Json& pattern = get_value(step, "pattern", where);
  if (pattern.is_string()) return Regex::literal(pattern.get_ref<const std::string&>(), where);
  if (find_value(pattern, "Regex", where + ": pattern") != nullptr)
    return {get_string(pattern, "Regex", where + ": pattern"), where};
  const std::string& text = get_string(pattern, "String", where + ": pattern");
  return text.empty() ? Regex("(?!)", where) : Regex::literal(text, where);
}

inline void read_normalizer(const Json& file, const std::string& file_name, Normalizer& normalizer) {
  for_each_step(file, "normalizer", "normalizers", file_name, [&](const Json& step, const std::string& where) {
    const std::string& type = get_string(step, "type", where);
    if (type == "NFC") normalizer.add(UnicodeForm{true, false}, where);
    else if (type == "NFD") normalizer.add(UnicodeForm{false, false}, where);
    else if (type == "NFKC") normalizer.add(UnicodeForm{true, true}, where);
    else if (type == "NFKD") normalizer.add(UnicodeForm{false, true}, where);
    else if (type == "Lowercase") normalizer.add(Lowercase{}, where);
    else if (type == "Prepend") normalizer.add(PrependContent{get_string(step, "prepend", where)}, where);
    else if (type == "Replace")
      normalizer.add(ReplaceMatches{read_pattern(step, where), get_string(step, "content", where)}, where);
    else if (type == "Strip")
      normalizer.add(
          StripEnds{get_boolean_or(step, "strip_left", true, where), get_boolean_or(step, "strip_right", true, where)},
          where);
    else refuse_type(step, where);
  });
}

inline SplitBehavior read_behavior(const Json& step, const std::string& where) {
  const std::string name = get_string_or(step, "behavior", "Isolated", where);
  if (name == "Removed") return SplitBehavior::removed;
  if (name == "Isolated") return SplitBehavior::isolated;
  if (name == "MergedWithPrevious") return SplitBehavior::merged_with_previous;
  if (name == "MergedWithNext") return SplitBehavior::merged_with_next;
  if (name == "Contiguous") return SplitBehavior::contiguous;
  throw FormatError(message(where, ": the behavior ", in_quotes(name), " is not known"));
}

/// Whether Metaspace puts its replacement before the text: to all pieces, the first, or none.
inline std::string read_prepend_scheme(const Json& step, const std::string& where) {
  const std::string former = get_boolean_or(step, "add_prefix_space", true, where) ? "always" : "never";
  const std::string scheme = get_string_or(step, "prepend_scheme", former, where);
  require<FormatError>(scheme == "always" || scheme == "never" || scheme == "first", where, ": the prepend_scheme ",
                       in_quotes(scheme), " is not known");
  return scheme;
}

inline void read_metaspace(const Json& step, const std::string& where, PreTokenizer& pre_tokenizer) {
  const std::string& replacement = get_string(step, "replacement", where);
  require<FormatError>(!replacement.empty(), where, ": an empty replacement");
  const std::string scheme = read_prepend_scheme(step, where);
  pre_tokenizer.add(ReplaceInPieces{Regex::literal(" ", where), replacement});
  if (scheme != "never") pre_tokenizer.add(PrefixPieces{replacement, scheme == "first", where});
  if (get_boolean_or(step, "split", true, where))
    pre_tokenizer.add(SplitAtMatches{Regex::literal(replacement, where), SplitBehavior::merged_with_next, false});
}

/// Returns whether the pieces are bytes (ByteLevel), which must then be the last step.
inline bool read_pre_tokenizer(const Json& file, const std::string& file_name, PreTokenizer& pre_tokenizer) {
  bool byte_level = false;
  for_each_step(file, "pre_tokenizer", "pretokenizers", file_name, [&](const Json& step, const std::string& where) {
    const std::string& type = get_string(step, "type", where);
    require<FormatError>(!byte_level, where, ": the type ", in_quotes(type), " after ByteLevel is not supported");
    const auto split = [&](std::string_view pattern, SplitBehavior behavior, bool invert = false) {
      pre_tokenizer.add(SplitAtMatches{Regex(pattern, where), behavior, invert});
    };
    if (type == "ByteLevel") {
      byte_level = true;
      if (get_boolean_or(step, "add_prefix_space", true, where)) pre_tokenizer.add(PrefixPieces{" ", false, where});
      if (get_boolean_or(step, "use_regex", true, where)) split(gpt2_pattern, SplitBehavior::isolated);
    } else if (type == "Split") {
      pre_tokenizer.add(SplitAtMatches{read_pattern(step, where), read_behavior(step, where),
                                       get_boolean_or(step, "invert", false, where)});
    } else if (type == "Digits") {
      split(R"(\p{N})", get_boolean_or(step, "individual_digits", false, where) ? SplitBehavior::isolated
                                                                                : SplitBehavior::contiguous);
    } else if (type == "Metaspace") {
      read_metaspace(step, where, pre_tokenizer);
    } else if (type == "WhitespaceSplit") {
      split(R"(\s)", SplitBehavior::removed);
    } else if (type == "Whitespace") {
      // Here the word characters are those of Rust: no superscript digits, but joiners and circled letters.
      constexpr std::string_view word =
          R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\u200C\u200D\u24B6-\u24E9\x{1F130}-\x{1F149}\x{1F150}-\x{1F169}\x{1F170}-\x{1F189})";
      split(message("[", word, "]+|[^", word, "\\s]+"), SplitBehavior::removed, true);
    } else if (type == "Punctuation") {
      split(R"([\p{P}$+<=>^`|~])", read_behavior(step, where));
    } else {
      refuse_type(step, where);
    }
  });
  return byte_level;
}

/// Returns whether tokens are written in the byte alphabet (ByteLevel), which must then be the only step.
inline bool read_decoder(const Json& file, const std::string& file_name, TokenDecoder& decoder) {
  bool byte_level = false, fused = false, is_first = true;
  if (find_value(file, "decoder", file_name) == nullptr) decoder.separator = " ";
  for_each_step(file, "decoder", "decoders", file_name, [&](const Json& step, const std::string& where) {
    const std::string& type = get_string(step, "type", where);
    const bool late = byte_level || ((fused || decoder.byte_tokens) && type != "Fuse" && type != "Strip");
    require<FormatError>(!late && (is_first || type != "ByteLevel") && (!fused || type != "Fuse"), where, ": the type ",
                         in_quotes(type), " is not supported after the steps before it");
    if (type == "ByteLevel") {
      byte_level = true;
    } else if (type == "Replace") {
      decoder.steps.push_back(ReplaceInToken{read_pattern(step, where), get_string(step, "content", where)});
    } else if (type == "ByteFallback") {
      decoder.byte_tokens = true;
    } else if (type == "Fuse") {
      fused = true;
    } else if (type == "Metaspace") {
      const std::string& replacement = get_string(step, "replacement", where);
      require<FormatError>(!replacement.empty(), where, ": an empty replacement");
      decoder.steps.push_back(MetaspaceToken{replacement, read_prepend_scheme(step, where) != "never"});
    } else if (type == "Strip") {
      const std::string& character = get_string(step, "content", where);
      const Index left = get_integer(step, "start", where), right = get_integer(step, "stop", where);
      require<FormatError>(!character.empty(), where, ": an empty content");
      if (fused) {
        require<FormatError>(right == 0 && decoder.strip_left == 0, where,
                             ": a Strip of the end of the whole text, or a second one, is not supported");
        decoder.strip_character = character;
        decoder.strip_left = left;
      } else {
        require<FormatError>(!decoder.byte_tokens, where, ": a Strip between ByteFallback and Fuse is not supported");
        decoder.steps.push_back(StripToken{character, left, right});
      }
    } else {
      refuse_type(step, where);
    }
    is_first = false;
  });
  return byte_level;
}

/// The tokens that a template puts before and after a text.
inline void read_template(const Json& step, const std::string& where, TokenizerParts& parts) {
  const Json& tokens = get_object(step, "special_tokens", where);
  const Json& single = get_array(step, "single", where);
  bool after_text = false;
  for (const Json& part : single) {
    if (find_value(part, "Sequence", where + ": single") != nullptr) {
      require<FormatError>(!after_text, where, ": a template with the text twice");
      after_text = true;
      continue;
    }
    const std::string& name =
        get_string(get_object(part, "SpecialToken", where + ": single"), "id", where + ": single");
    const std::string here = where + ": special_tokens: " + in_quotes(name);
    for (const Json& id : get_array(get_object(tokens, name, where + ": special_tokens"), "ids", here)) {
      const auto token = static_cast<TokenId>(to_integer(id, here, 0, Vocabulary::most_ids - 1));
      require<FormatError>(parts.vocabulary.contains(token), here, ": no token has the id ", token);
      auto& list = after_text ? parts.suffix : parts.prefix;
      require<FormatError>(list.size() < 64, where, ": more than 64 special tokens");
      list.push_back(token);
    }
  }
  require<FormatError>(after_text, where, ": a template without the text");
}

inline void read_post_processor(const Json& file, const std::string& file_name, TokenizerParts& parts) {
  bool is_read = false;
  for_each_step(file, "post_processor", "processors", file_name, [&](const Json& step, const std::string& where) {
    const std::string& type = get_string(step, "type", where);
    if (type == "ByteLevel") return;  // moves offsets alone
    if (type != "TemplateProcessing") refuse_type(step, where);
    require<FormatError>(!is_read, where, ": a second TemplateProcessing is not supported");
    is_read = true;
    read_template(step, where, parts);
  });
}

}  // namespace calm::inline CALM_ABI
