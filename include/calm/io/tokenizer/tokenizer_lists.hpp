// TokenizerLists: the vocabulary and the merges of a tokenizer.json, taken out of the JSON as it is read. They are
// nearly all of the file, and as parsed JSON would take eight times its size.
#pragma once

#include <calm/io/json.hpp>
#include <calm/io/tokenizer/text_list.hpp>
#include <calm/io/tokenizer/vocabulary.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace calm::inline CALM_ABI {

class TokenizerLists {
 public:
  /// Together with Vocabulary::most_ids this bounds the memory. Gemma 3, the largest, has 514,906.
  static constexpr std::size_t most_merges = std::size_t{1} << 20;

  /// What takes the lists out of a JSON of so many bytes; this object must stay where it is until it is read.
  std::array<JsonStream, 2> streams(const std::string& where, std::size_t bytes) {
    texts_.reserve(0, bytes);
    return {JsonStream{"model", "vocab", true,
                       [this, here = where + ": model: vocab"](const std::string& token, std::size_t, const Json& id) {
                         add_token(token, id, here);
                       }},
            JsonStream{"model", "merges", false,
                       [this, here = where + ": model: merges"](const std::string&, std::size_t i, const Json& merge) {
                         add_merge(merge, i, here);
                       }}};
  }

  /// Sorts the tokens by their text. Throws FormatError where one occurs twice.
  void sort_tokens(const std::string& where) {
    texts_.shrink();
    order_.resize(ids_.size());
    for (std::size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<std::uint32_t>(i);
    std::sort(order_.begin(), order_.end(), [&](auto a, auto b) { return text(a) < text(b); });
    const auto twice =
        std::adjacent_find(order_.begin(), order_.end(), [&](auto a, auto b) { return text(a) == text(b); });
    if (twice != order_.end()) fail<FormatError>({where, ": the key ", in_quotes(text(*twice)), " occurs twice"});
  }

  std::size_t tokens() const { return order_.size(); }
  /// The i-th token in the order of their texts, as it is written.
  std::string_view token(std::size_t i) const { return text(order_[i]); }
  TokenId id(std::size_t i) const { return ids_[order_[i]]; }
  std::optional<TokenId> find(std::string_view token) const {
    const auto found =
        std::lower_bound(order_.begin(), order_.end(), token, [&](auto i, std::string_view t) { return text(i) < t; });
    return found != order_.end() && text(*found) == token ? std::optional(ids_[*found]) : std::nullopt;
  }
  void forget_tokens() {  // assigning {} would keep the memory
    order_ = std::vector<std::uint32_t>();
    ids_ = std::vector<TokenId>();
  }

  std::size_t merges() const { return merges_; }
  std::string_view left(std::size_t merge) const { return texts_[first_merge_ + 2 * merge]; }
  std::string_view right(std::size_t merge) const { return texts_[first_merge_ + 2 * merge + 1]; }

 private:
  // Both lists lie in texts_, one behind the other: neither can stand inside the other.
  std::string_view text(std::size_t token) const { return texts_[first_token_ + token]; }

  void add_token(const std::string& token, const Json& id, const std::string& where) {
    if (ids_.empty()) first_token_ = texts_.size();
    require<FormatError>(static_cast<Index>(ids_.size()) < Vocabulary::most_ids, where, ": more than ",
                         Vocabulary::most_ids, " tokens");
    ids_.push_back(static_cast<TokenId>(to_integer(id, where + ": " + in_quotes(token), 0, Vocabulary::most_ids - 1)));
    texts_.push_back(token);
  }

  void add_merge(const Json& merge, std::size_t i, const std::string& where) {
    if (i == 0) first_merge_ = texts_.size();
    require<FormatError>(i < most_merges, where, ": more than ", most_merges, " merges");
    if (merge.is_string()) {
      const std::string_view text = merge.get_ref<const std::string&>();
      const std::size_t space = text.find(' ');
      if (space == text.npos || text.find(' ', space + 1) != text.npos)
        fail<FormatError>({where, '/', i, ": expected two tokens and a space between them, found ", in_quotes(text)});
      texts_.push_back(text.substr(0, space));
      texts_.push_back(text.substr(space + 1));
    } else {
      const bool is_pair = merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string();
      require<FormatError>(is_pair, where, '/', i, ": expected \"a b\" or [\"a\", \"b\"], found ", kind_of(merge));
      texts_.push_back(merge[0].get_ref<const std::string&>());
      texts_.push_back(merge[1].get_ref<const std::string&>());
    }
    merges_ = i + 1;
  }

  TextList texts_;
  std::vector<TokenId> ids_;
  std::vector<std::uint32_t> order_;
  std::size_t first_token_ = 0, first_merge_ = 0, merges_ = 0;
};

}  // namespace calm::inline CALM_ABI
