// Byte pair encoding (Sennrich et al., 2016): of all adjacent pairs that have a merge, the one of the lowest rank is
// joined, the leftmost first, until none is left.
//
// SentencePiece's BPE is the same with the tokens' scores as ranks. A heap of candidates over a linked list of symbols:
// O(n log n) for a piece of n bytes, whatever the merges are.
#pragma once

#include <calm/io/tokenizer/utf8.hpp>
#include <calm/io/tokenizer/vocabulary.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

/// left, right -> result. The lower rank goes first.
struct Merge {
  TokenId left = 0, right = 0;
  std::uint32_t rank = 0;
  TokenId result = 0;
};

/// The merges, found by their pair. Of two with the same pair the later one counts.
class MergeTable {
 public:
  void build(std::vector<Merge> merges, Index vocabulary) {
    merges_ = std::move(merges);
    const auto key = [](const Merge& merge) { return std::pair(merge.left, merge.right); };
    std::stable_sort(merges_.begin(), merges_.end(), [&](const Merge& a, const Merge& b) { return key(a) < key(b); });
    std::size_t kept = 0;
    for (const Merge& merge : merges_) {
      if (kept > 0 && key(merges_[kept - 1]) == key(merge)) --kept;
      merges_[kept++] = merge;
    }
    merges_.resize(kept);
    begins_.assign(static_cast<std::size_t>(vocabulary) + 1, 0);
    for (const Merge& merge : merges_) ++begins_[static_cast<std::size_t>(merge.left) + 1];
    for (std::size_t i = 1; i < begins_.size(); ++i) begins_[i] += begins_[i - 1];
  }

  /// Null where the pair has no merge. `left` is an id of the vocabulary.
  const Merge* find(TokenId left, TokenId right) const {
    const Merge* begin = merges_.data() + begins_[static_cast<std::size_t>(left)];
    const Merge* end = merges_.data() + begins_[static_cast<std::size_t>(left) + 1];
    const Merge* found = std::lower_bound(begin, end, right, [](const Merge& a, TokenId b) { return a.right < b; });
    return found != end && found->right == right ? found : nullptr;
  }

  const std::vector<Merge>& all() const { return merges_; }

 private:
  std::vector<Merge> merges_;          // sorted by (left, right)
  std::vector<std::uint32_t> begins_;  // of the merges of a left id
};

struct BpeOptions {
  bool byte_level = false;                 // symbols are bytes, not characters
  bool ignore_merges = false;              // a piece that is a token is that token
  bool fuse_unknown = false;               // adjacent unknown characters of a piece are one token
  TokenId unknown = Vocabulary::none;      // none: unknown characters are dropped
  std::array<TokenId, 256> byte_tokens{};  // for the bytes of unknown characters, where uses_byte_tokens
  bool uses_byte_tokens = false;
};

class Bpe {
 public:
  /// A token of a piece and its bytes there.
  struct Token {
    TokenId id;
    std::uint32_t begin, end;
  };

  /// Working space, and the pieces seen before; of one thread and one model.
  class Scratch {
    friend class Bpe;
    struct Symbol {
      TokenId id;
      std::uint32_t begin, end;
      std::uint32_t previous, next;
    };
    struct Candidate {
      const Merge* merge;
      std::uint32_t symbol;                           // the left one
      bool operator<(const Candidate& other) const {  // std::push_heap keeps the largest in front
        return merge->rank != other.merge->rank ? merge->rank > other.merge->rank : symbol > other.symbol;
      }
    };
    struct Hash {
      using is_transparent = void;
      std::size_t operator()(std::string_view text) const { return XXH3_64bits(text.data(), text.size()); }
    };
    std::vector<Symbol> symbols_;
    std::vector<Candidate> heap_;
    std::unordered_map<std::string, std::pair<std::uint32_t, std::uint32_t>, Hash, std::equal_to<>> seen_;
    std::vector<Token> seen_tokens_;
  };

  Bpe() = default;
  Bpe(std::vector<Merge> merges, const BpeOptions& options, const Vocabulary& vocabulary) : options_(options) {
    merges_.build(std::move(merges), vocabulary.size());
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const char text = static_cast<char>(byte);
      one_byte_[byte] = vocabulary.find(std::string_view(&text, 1));
    }
  }

  const BpeOptions& options() const { return options_; }
  const MergeTable& merges() const { return merges_; }

  /// Appends the tokens of a piece, which need not be valid UTF-8.
  void encode(std::string_view piece, const Vocabulary& vocabulary, Scratch& scratch,
              std::vector<Token>& tokens) const {
    constexpr std::size_t longest_kept = 48, most_kept = 1 << 15;
    if (piece.size() > longest_kept) return encode_anew(piece, vocabulary, scratch, tokens);
    if (const auto seen = scratch.seen_.find(piece); seen != scratch.seen_.end()) {
      const auto [first, last] = seen->second;
      tokens.insert(tokens.end(), scratch.seen_tokens_.begin() + first, scratch.seen_tokens_.begin() + last);
      return;
    }
    const std::size_t first = tokens.size();
    encode_anew(piece, vocabulary, scratch, tokens);
    if (scratch.seen_.size() >= most_kept) {
      scratch.seen_.clear();
      scratch.seen_tokens_.clear();
    }
    const auto begin = static_cast<std::uint32_t>(scratch.seen_tokens_.size());
    scratch.seen_tokens_.insert(scratch.seen_tokens_.end(), tokens.begin() + static_cast<std::ptrdiff_t>(first),
                                tokens.end());
    scratch.seen_.emplace(piece, std::pair(begin, static_cast<std::uint32_t>(scratch.seen_tokens_.size())));
  }

 private:
  static constexpr std::uint32_t no_symbol = 0xFFFFFFFF;

  void encode_anew(std::string_view piece, const Vocabulary& vocabulary, Scratch& scratch,
                   std::vector<Token>& tokens) const {
    if (options_.ignore_merges) {
      if (const TokenId id = vocabulary.find(piece); id != Vocabulary::none) {
        tokens.push_back({id, 0, static_cast<std::uint32_t>(piece.size())});
        return;
      }
    }
    make_symbols(piece, vocabulary, scratch.symbols_);
    merge_all(scratch);
    if (scratch.symbols_.empty()) return;
    for (std::uint32_t i = 0; i != no_symbol; i = scratch.symbols_[i].next)
      tokens.push_back({scratch.symbols_[i].id, scratch.symbols_[i].begin, scratch.symbols_[i].end});
  }

  void make_symbols(std::string_view piece, const Vocabulary& vocabulary, std::vector<Scratch::Symbol>& symbols) const {
    symbols.clear();
    bool after_unknown = false;
    const auto put = [&](TokenId id, std::size_t begin, std::size_t end) {
      const auto place = static_cast<std::uint32_t>(symbols.size());
      if (place > 0) symbols.back().next = place;
      symbols.push_back({id, static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(end),
                         place > 0 ? place - 1 : no_symbol, no_symbol});
    };
    for (std::size_t begin = 0; begin < piece.size();) {
      const auto first = static_cast<unsigned char>(piece[begin]);
      std::size_t end = begin + 1;
      if (!options_.byte_level && first >= 0x80)
        end = begin + std::max(code_point_at(piece.substr(begin, 4)).bytes, std::uint32_t{1});
      const TokenId id = end == begin + 1 ? one_byte_[first] : vocabulary.find(piece.substr(begin, end - begin));
      if (id != Vocabulary::none) {
        put(id, begin, end);
      } else if (has_byte_tokens(piece.substr(begin, end - begin))) {
        for (std::size_t i = begin; i < end; ++i)
          put(options_.byte_tokens[static_cast<unsigned char>(piece[i])], i, i + 1);
      } else if (options_.unknown != Vocabulary::none) {
        if (after_unknown && options_.fuse_unknown) symbols.back().end = static_cast<std::uint32_t>(end);
        else put(options_.unknown, begin, end);
        after_unknown = true;
        begin = end;
        continue;
      }
      after_unknown = false;
      begin = end;
    }
  }

  bool has_byte_tokens(std::string_view bytes) const {
    return options_.uses_byte_tokens && std::all_of(bytes.begin(), bytes.end(), [&](char c) {
             return options_.byte_tokens[static_cast<unsigned char>(c)] != Vocabulary::none;
           });
  }

  void merge_all(Scratch& scratch) const {
    auto& symbols = scratch.symbols_;
    auto& heap = scratch.heap_;
    heap.clear();
    const auto candidate = [&](std::uint32_t left) -> std::optional<Scratch::Candidate> {
      if (left == no_symbol || symbols[left].next == no_symbol) return {};
      const Merge* merge = merges_.find(symbols[left].id, symbols[symbols[left].next].id);
      if (merge == nullptr) return {};
      return Scratch::Candidate{merge, left};
    };
    const auto push = [&](std::uint32_t left) {
      if (const auto found = candidate(left)) {
        heap.push_back(*found);
        std::push_heap(heap.begin(), heap.end());
      }
    };
    for (std::uint32_t i = 0; i < symbols.size(); ++i)
      if (const auto found = candidate(i)) heap.push_back(*found);
    std::make_heap(heap.begin(), heap.end());
    while (!heap.empty()) {
      const auto [merge, at] = heap.front();
      std::pop_heap(heap.begin(), heap.end());
      heap.pop_back();
      Scratch::Symbol& left = symbols[at];
      // A symbol that was joined to its left has no id; one that has grown has another.
      if (left.id != merge->left || left.next == no_symbol || symbols[left.next].id != merge->right) continue;
      Scratch::Symbol& right = symbols[left.next];
      left.id = merge->result;
      left.end = right.end;
      right.id = Vocabulary::none;
      left.next = right.next;
      if (left.next != no_symbol) symbols[left.next].previous = at;
      push(left.previous);
      push(at);
    }
  }

  BpeOptions options_;
  MergeTable merges_;
  std::array<TokenId, 256> one_byte_{};
};

}  // namespace calm::inline CALM_ABI
