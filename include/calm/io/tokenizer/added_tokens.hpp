// Added tokens: tokens that are found in the text as they stand, before it is cut (Hugging Face tokenizers,
// "added_tokens"; control and user-defined tokens of GGUF).
#pragma once

#include <calm/io/tokenizer/regex.hpp>

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

struct AddedToken {
  TokenId id = 0;
  std::string content;
  bool special = false;      // left out by decode, and by encode where options say so
  bool normalized = false;   // found in the normalised text
  bool single_word = false;  // not inside a word
  bool lstrip = false;       // takes white space before it
  bool rstrip = false;       // takes white space after it
};

/// Finds added tokens: the leftmost, of these the longest, none overlapping. White space that rstrip takes may still be
/// a token itself, as in tokenizers: "<end>\n\n" is <end> with all of it, and then the token "\n\n".
class AddedTokenMatcher {
 public:
  AddedTokenMatcher() = default;
  /// `tokens` with the contents to look for; empty ones are never found.
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
    std::erase_if(tokens_, [](const AddedToken& token) { return token.content.empty(); });
    std::stable_sort(tokens_.begin(), tokens_.end(),
                     [](const AddedToken& a, const AddedToken& b) { return a.content < b.content; });
    for (const AddedToken& token : tokens_) begins_[static_cast<unsigned char>(token.content[0])] = true;
  }

  bool empty() const { return tokens_.empty(); }

  /// Calls visit(ByteRange, const AddedToken*) for the whole text from left to right; null for what lies between.
  template <class Visit>
  void for_each_part(std::string_view text, bool with_special, const Visit& visit) const {
    std::size_t done = 0, white_end = 0;  // white_end: of the white space that was looked at last
    for (std::size_t place = 0; place < text.size();) {
      const AddedToken* token = longest_at(text, place);
      if (token == nullptr) {
        ++place;
        continue;
      }
      std::size_t begin = place, end = place + token->content.size();
      place = end;
      if (token->special && !with_special) continue;
      if (token->single_word && (ends_in_word(text.substr(0, begin)) || begins_with_word(text.substr(end)))) continue;
      if (token->lstrip) begin = begin > done ? white_space_before(text, begin, done) : done;
      if (token->rstrip) end = white_end = end < white_end ? white_end : white_space_after(text, end);
      if (begin >= end) continue;
      if (done < begin) visit(ByteRange{done, begin}, static_cast<const AddedToken*>(nullptr));
      visit(ByteRange{begin, end}, token);
      done = end;
    }
    if (done < text.size()) visit(ByteRange{done, text.size()}, static_cast<const AddedToken*>(nullptr));
  }

 private:
  /// Narrows the sorted tokens byte by byte to those that the text begins with.
  const AddedToken* longest_at(std::string_view text, std::size_t place) const {
    if (!begins_[static_cast<unsigned char>(text[place])]) return nullptr;
    auto first = tokens_.begin(), last = tokens_.end();
    const AddedToken* longest = nullptr;
    for (std::size_t length = 0; first != last; ++length) {
      if (first->content.size() == length) longest = &*first++;
      while (first != last && first->content.size() == length) ++first;  // the same content again: the first counts
      if (place + length >= text.size()) break;
      const auto byte_at = [&](const AddedToken& token) { return static_cast<unsigned char>(token.content[length]); };
      const auto wanted = static_cast<unsigned char>(text[place + length]);
      first = std::partition_point(first, last, [&](const AddedToken& token) { return byte_at(token) < wanted; });
      last = std::partition_point(first, last, [&](const AddedToken& token) { return byte_at(token) == wanted; });
    }
    return longest;
  }

  static std::size_t last_character(std::string_view text, std::size_t end) {
    std::size_t begin = end - 1;
    while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0U) == 0x80U) --begin;
    return begin;
  }

  static bool is_word(std::uint32_t c) {
    switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
      case UTF8PROC_CATEGORY_LU:
      case UTF8PROC_CATEGORY_LL:
      case UTF8PROC_CATEGORY_LT:
      case UTF8PROC_CATEGORY_LM:
      case UTF8PROC_CATEGORY_LO:
      case UTF8PROC_CATEGORY_MN:
      case UTF8PROC_CATEGORY_MC:
      case UTF8PROC_CATEGORY_ME:
      case UTF8PROC_CATEGORY_ND:
      case UTF8PROC_CATEGORY_NL:
      case UTF8PROC_CATEGORY_PC: return true;
      default: return c == 0x200C || c == 0x200D;
    }
  }
  static bool begins_with_word(std::string_view text) {
    return !text.empty() && is_word(code_point_at(text.substr(0, 4)).value);
  }
  static bool ends_in_word(std::string_view text) {
    return !text.empty() && is_word(code_point_at(text.substr(last_character(text, text.size()))).value);
  }
  /// Looks no further back than `least`.
  static std::size_t white_space_before(std::string_view text, std::size_t end, std::size_t least) {
    while (end > least) {
      const std::size_t begin = last_character(text, end);
      if (!is_white_space(code_point_at(text.substr(begin, 4)).value)) break;
      end = begin;
    }
    return end;
  }
  static std::size_t white_space_after(std::string_view text, std::size_t begin) {
    while (begin < text.size()) {
      const CodePoint c = code_point_at(text.substr(begin, 4));
      if (!is_white_space(c.value)) break;
      begin += c.bytes;
    }
    return begin;
  }

  std::vector<AddedToken> tokens_;  // sorted by content
  std::array<bool, 256> begins_{};  // whether one begins with this byte
};

}  // namespace calm::inline CALM_ABI
