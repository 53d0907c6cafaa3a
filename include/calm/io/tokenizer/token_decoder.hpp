// TokenDecoder: from tokens back to text (Hugging Face tokenizers, "decoders"): a rule for every token alone, and what
// is taken off the beginning of the text. Bytes come out, which need not be valid UTF-8 where a model writes none.
#pragma once

#include <calm/io/tokenizer/regex.hpp>
#include <calm/io/tokenizer/text_growth.hpp>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace calm::inline CALM_ABI {

/// Every match in a token becomes `content`.
struct ReplaceInToken {
  Regex pattern;
  std::string content;
};

/// Takes up to `left` times `character` off the beginning of a token, and up to `right` times off its end.
struct StripToken {
  std::string character;
  Index left = 0, right = 0;
};

/// `replacement` becomes a space; in the first token of a text it becomes nothing where `drops_first`.
struct MetaspaceToken {
  std::string replacement;
  bool drops_first = false;
};

using TokenDecoderStep = std::variant<ReplaceInToken, StripToken, MetaspaceToken>;

/// "<0x0A>" -> 10; nothing for any other text.
inline std::optional<unsigned char> byte_of_token(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return {};
  unsigned value = 0;
  for (const char c : token.substr(3, 2)) {
    const std::size_t digit =
        std::string_view("0123456789abcdef").find(c >= 'A' && c <= 'F' ? static_cast<char>(c + 32) : c);
    if (digit == std::string_view::npos) return {};
    value = 16 * value + static_cast<unsigned>(digit);
  }
  return static_cast<unsigned char>(value);
}

struct TokenDecoder {
  std::vector<TokenDecoderStep> steps;
  bool byte_tokens = false;     // "<0x0A>" is the byte 10
  std::string separator;        // between two tokens
  std::string strip_character;  // taken off the beginning of the text, up to strip_left times
  Index strip_left = 0;

  /// The bytes that a token stands for; `is_first`: at the beginning of a text. Throws FormatError (Regex, TextGrowth).
  std::string bytes_of(std::string_view token, bool is_first, Regex::Scratch& scratch) const {
    std::string text(token);
    TextGrowth growth(token.size());
    for (const TokenDecoderStep& step : steps) {
      if (const auto* replace = std::get_if<ReplaceInToken>(&step)) {
        if (valid_utf8_prefix(text) < text.size()) continue;
        std::string result;
        std::size_t done = 0;
        replace->pattern.for_each_match(text, scratch, [&](ByteRange match) {
          growth.check(result.size() + (match.begin - done) + replace->content.size(), replace->pattern.where());
          result.append(text, done, match.begin - done).append(replace->content);
          done = match.end;
        });
        growth.check(result.size() + (text.size() - done), replace->pattern.where());
        text = result.append(text, done, std::string::npos);
      } else if (const auto* strip = std::get_if<StripToken>(&step)) {
        const std::size_t size = strip->character.size();
        std::string_view rest = text;
        for (Index i = 0; i < strip->left && rest.starts_with(strip->character); ++i) rest.remove_prefix(size);
        for (Index i = 0; i < strip->right && rest.ends_with(strip->character); ++i) rest.remove_suffix(size);
        text = std::string(rest);
      } else {
        const auto& metaspace = std::get<MetaspaceToken>(step);
        const std::string_view space = is_first && metaspace.drops_first ? "" : " ";
        std::string result;
        std::size_t done = 0;
        for (std::size_t at = 0; (at = text.find(metaspace.replacement, done)) != std::string::npos;) {
          result.append(text, done, at - done).append(space);
          done = at + metaspace.replacement.size();
        }
        text = result.append(text, done, std::string::npos);
      }
    }
    if (byte_tokens)
      if (const auto byte = byte_of_token(text)) return std::string(1, static_cast<char>(*byte));
    return text;
  }
};

}  // namespace calm::inline CALM_ABI
