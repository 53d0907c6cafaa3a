// The tokenizer that the metadata of a GGUF file describes ("tokenizer.ggml.*"), with the meaning of llama.cpp
// (src/llama-vocab.cpp): "gpt2" is byte-level BPE with a pre-tokenizer by name, "llama" is SentencePiece's BPE.
//
// Not here: the other models (bert, t5, rwkv), and pre-tokenizers that are not listed in gguf_patterns: they are
// refused by name, since a wrong one gives ids that look right and are not.
#pragma once

#include <calm/io/tokenizer/text_list.hpp>
#include <calm/io/tokenizer/tokenizer.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

/// The keys under "tokenizer.ggml." by their names; `scores` and `token_types` may be empty.
struct GgufVocabulary {
  std::string model;  // "gpt2" or "llama"
  std::string pre;    // "smollm", "gpt-2", "qwen2", "llama-bpe", "default"
  TextList tokens;
  std::vector<float> scores;
  std::vector<std::int32_t> token_types;  // 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte
  TextList merges;                        // "a b"
  std::optional<TokenId> bos, eos, unknown, pad;
  // Absent: as llama.cpp has it. BOS is added for llama and for the pre-tokenizers of Llama 3, EOS never, and a space
  // is put before the text for llama; gpt2 never has the last.
  std::optional<bool> add_bos, add_eos, add_space_prefix;
  std::string chat_template;

  // Together with Vocabulary::most_ids these bound the memory. Gemma 3, the largest, has 515,000 and 6,400.
  static constexpr Index most_merges = Index{1} << 21, most_added_tokens = Index{1} << 16;
};

/// The names of Llama 3's pre-tokenizer; llama.cpp takes whole tokens first with it, and adds BOS.
inline bool is_llama3(std::string_view pre) { return pre == "llama-bpe" || pre == "llama3" || pre == "llama-v3"; }

/// The patterns at which llama.cpp cuts a text, one after the other. Throws FormatError for a name that is not known.
inline std::vector<std::string_view> gguf_patterns(std::string_view pre, const std::string& where) {
  constexpr std::string_view digits_1 =
      R"((?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  constexpr std::string_view digits_3 =
      R"((?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  if (pre == "gpt-2") return {gpt2_pattern};
  if (pre == "smollm" || pre == "starcoder" || pre == "command-r") return {R"(\p{N})", gpt2_pattern};
  if (pre == "qwen2") return {digits_1};
  if (is_llama3(pre)) return {digits_3};
  if (pre == "default") return {R"([\p{P}\$\+<=>\^~\|]+)", gpt2_pattern, R"(\p{N}+)", "[0-9][0-9][0-9]"};
  throw FormatError(
      message(where, ": the pre-tokenizer ", in_quotes(pre),
              " is not supported; gpt-2, smollm, starcoder, command-r, qwen2, llama-bpe and default are"));
}

class GgufVocabularyReader {
 public:
  GgufVocabularyReader(const GgufVocabulary& file, const std::string& where) : file_(file), where_(where) {}

  TokenizerParts read() {
    require<FormatError>(file_.model == "gpt2" || file_.model == "llama", where_, ": the tokenizer model ",
                         in_quotes(file_.model), " is not supported; gpt2 and llama are");
    const std::size_t count = file_.tokens.size();
    require<FormatError>(count > 0 && static_cast<Index>(count) <= Vocabulary::most_ids, where_, ": ", count,
                         " tokens");
    require<FormatError>(file_.token_types.empty() || file_.token_types.size() == count, where_, ": ", count,
                         " tokens and ", file_.token_types.size(), " token types");
    const bool byte_level = file_.model == "gpt2";
    parts_.bpe.byte_level = byte_level;
    parts_.bpe.byte_tokens.fill(Vocabulary::none);
    parts_.vocabulary.reserve(count, file_.tokens.bytes());
    for (std::size_t i = 0; i < count; ++i) read_token(static_cast<TokenId>(i));
    parts_.vocabulary.build_index(where_);
    if (byte_level) read_gpt2();
    else read_llama();
    read_special();
    return std::move(parts_);
  }

 private:
  static constexpr auto most_merges = static_cast<std::size_t>(GgufVocabulary::most_merges);

  enum Type : std::int32_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

  std::int32_t type_of(TokenId id) const {
    return file_.token_types.empty() ? normal : file_.token_types[static_cast<std::size_t>(id)];
  }

  void read_token(TokenId id) {
    const std::string_view token = file_.tokens[static_cast<std::size_t>(id)];
    const std::int32_t type = type_of(id);
    if (type < normal || type > byte)
      fail<FormatError>({where_, ": token ", id, ": the token type ", type, " is not known"});
    std::string bytes;
    if (type == control || type == user_defined) {
      require<FormatError>(token.size() <= 4096, where_, ": token ", id, ": a ",
                           type == control ? "control" : "user defined", " token of more than 4096 bytes");
      AddedToken added;
      added.id = id;
      added.content = token;
      require<FormatError>(static_cast<Index>(parts_.added.size()) < GgufVocabulary::most_added_tokens, where_,
                           ": token ", id, ": more than ", GgufVocabulary::most_added_tokens,
                           " control and user defined tokens");
      added.special = type == control;
      // SentencePiece finds user defined tokens where spaces are marks already; beside a mark that stands in the text,
      // too. A prefix that is put before every text would be put before these tokens as well.
      added.normalized = type == user_defined && !parts_.bpe.byte_level && !file_.add_space_prefix.value_or(true);
      parts_.added.push_back(added);
      // A byte-level merge may lead to a user defined token; to a control token, no merge does.
      const bool in_alphabet = parts_.bpe.byte_level && alphabet_.decode(token, bytes);
      parts_.vocabulary.set(id, in_alphabet ? bytes : token, in_alphabet && type == user_defined, where_);
    } else if (parts_.bpe.byte_level) {
      const bool in_alphabet = alphabet_.decode(token, bytes);
      parts_.vocabulary.set(id, in_alphabet ? bytes : token, in_alphabet, where_);
    } else {
      const auto value = type == byte ? byte_of_token(token) : std::nullopt;
      if (type == byte && !value)
        fail<FormatError>({where_, ": token ", id, ": ", in_quotes(token), " is no byte token; <0x0A> is one"});
      if (value) parts_.bpe.byte_tokens[*value] = id;
      parts_.vocabulary.set(id, token, type == normal || type == unused, where_);
      if (type == unknown) parts_.bpe.unknown = id;
    }
  }

  void read_gpt2() {
    for (const std::string_view pattern : gguf_patterns(file_.pre, where_))
      parts_.pre_tokenizer.add(SplitAtMatches{Regex(pattern, where_), SplitBehavior::isolated, false});
    parts_.bpe.ignore_merges = is_llama3(file_.pre);
    std::string left, right;
    parts_.merges.reserve(file_.merges.size());
    for (std::size_t i = 0; i < file_.merges.size(); ++i) {
      const std::string_view text = file_.merges[i];
      const std::size_t space = text.find(' ', 1);
      const bool is_pair = space != text.npos && alphabet_.decode(text.substr(0, space), left) &&
                           alphabet_.decode(text.substr(space + 1), right);
      if (!is_pair) throw FormatError(message(where_, ": merge ", i, ": ", in_quotes(text), " is not two tokens"));
      const auto id_of = [&](const std::string& bytes) {
        const TokenId id = parts_.vocabulary.find(bytes);
        if (id == Vocabulary::none)
          throw FormatError(message(where_, ": merge ", i, ": ", in_quotes(bytes), " is not in the vocabulary"));
        return id;
      };
      parts_.merges.push_back({id_of(left), id_of(right), static_cast<std::uint32_t>(i), id_of(left + right)});
    }
  }

  void read_llama() {
    const std::string space = "\u2581";
    const bool with_prefix = file_.add_space_prefix.value_or(true);
    parts_.normalizer.add(ReplaceMatches{Regex::literal(" ", where_), space}, where_);
    if (with_prefix) parts_.normalizer.add(PrependContent{space}, where_);
    parts_.bpe.uses_byte_tokens = true;
    parts_.bpe.fuse_unknown = true;
    parts_.decoder.steps.push_back(ReplaceInToken{Regex::literal(space, where_), " "});
    parts_.decoder.byte_tokens = true;
    parts_.decoder.strip_character = " ";
    parts_.decoder.strip_left = with_prefix ? 1 : 0;
    make_merges();
  }

  /// Every way to put a token together from two others is a merge, ranked by the token's score.
  void make_merges() {
    const std::size_t count = file_.tokens.size();
    require<FormatError>(file_.scores.size() == count, where_, ": ", count, " tokens and ", file_.scores.size(),
                         " scores");
    for (std::size_t i = 0; i < count; ++i)
      require<FormatError>(std::isfinite(file_.scores[i]), where_, ": token ", i, ": its score is not a finite number");
    const auto score_of = [&](TokenId id) { return file_.scores[static_cast<std::size_t>(id)]; };
    std::vector<TokenId> order(count);
    std::iota(order.begin(), order.end(), TokenId{0});
    std::stable_sort(order.begin(), order.end(), [&](TokenId a, TokenId b) { return score_of(a) > score_of(b); });
    parts_.merges.reserve(std::min(2 * count, most_merges));
    std::uint32_t rank = 0;
    for (std::size_t i = 0; i < count; ++i) {
      if (i > 0 && score_of(order[i]) < score_of(order[i - 1])) ++rank;
      add_merges_of(order[i], rank);
    }
  }

  void add_merges_of(TokenId id, std::uint32_t rank) {
    constexpr std::size_t longest = 512;
    if (type_of(id) != normal && type_of(id) != unused) return;
    const std::string_view token = file_.tokens[static_cast<std::size_t>(id)];
    require<FormatError>(token.size() <= longest, where_, ": token ", id, " has ", token.size(), " bytes; more than ",
                         longest, " are not read");
    for (std::size_t i = 1; i < token.size(); ++i) {
      if ((static_cast<unsigned char>(token[i]) & 0xC0U) == 0x80U) continue;
      const TokenId left = parts_.vocabulary.find(token.substr(0, i));
      const TokenId right = left == Vocabulary::none ? left : parts_.vocabulary.find(token.substr(i));
      if (right == Vocabulary::none) continue;
      const std::size_t made = parts_.merges.size();
      require<FormatError>(made < most_merges, where_, ": its tokens can be put together in more than ", most_merges,
                           " ways");
      if (made == parts_.merges.capacity()) parts_.merges.reserve(made <= most_merges / 4 ? 2 * made : most_merges);
      parts_.merges.push_back({left, right, rank, id});
    }
  }

  void read_special() {
    const auto check = [&](std::optional<TokenId> id, const char* what) {
      require<FormatError>(!id || parts_.vocabulary.contains(*id), where_, ": the ", what, " token ", id.value_or(0),
                           " is not in the vocabulary of ", parts_.vocabulary.size());
      return id;
    };
    parts_.bos = check(file_.bos ? file_.bos : usual(1), "bos");
    if (const auto eos = check(file_.eos ? file_.eos : usual(2), "eos")) parts_.ends = {*eos};
    parts_.pad = check(file_.pad, "pad");
    parts_.unknown = check(file_.unknown, "unknown");
    if (!parts_.bpe.byte_level && parts_.bpe.unknown == Vocabulary::none)
      parts_.bpe.unknown = parts_.unknown.value_or(Vocabulary::none);
    if (file_.add_bos.value_or(!parts_.bpe.byte_level || is_llama3(file_.pre)) && parts_.bos)
      parts_.prefix.push_back(*parts_.bos);
    if (file_.add_eos.value_or(false) && !parts_.ends.empty()) parts_.suffix.push_back(parts_.ends.front());
    parts_.chat_template = file_.chat_template;
    parts_.chat_source = where_;
  }

  /// SentencePiece writes <s> and </s> as its tokens 1 and 2; llama.cpp takes them where the file names no other.
  std::optional<TokenId> usual(TokenId id) const {
    const bool is_there = !parts_.bpe.byte_level && parts_.vocabulary.contains(id) && type_of(id) == control;
    return is_there ? std::optional(id) : std::nullopt;
  }

  const GgufVocabulary& file_;
  const std::string& where_;
  const ByteAlphabet alphabet_;
  TokenizerParts parts_;
};

/// Throws FormatError: where (the name of the file), the place, the reason.
inline Tokenizer make_tokenizer(GgufVocabulary vocabulary, const std::string& where) {
  TokenizerParts parts = GgufVocabularyReader(vocabulary, where).read();
  vocabulary = {};  // the merges need its memory
  return Tokenizer(std::move(parts));
}

}  // namespace calm::inline CALM_ABI
