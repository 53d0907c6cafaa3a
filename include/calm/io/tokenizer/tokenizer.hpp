// Tokenizer: text to token ids with their byte ranges, and back.
//
// text -> added tokens are found -> Normalizer -> PreTokenizer -> Bpe -> ids; decode runs TokenDecoder. An object is
// immutable; what a thread needs to work fast lies in a Tokenizer::Scratch. Read by tokenizer_json.hpp and
// gguf_vocabulary.hpp. Bytes that are not UTF-8 become byte tokens one run at a time, and so come back from decode
// unchanged.
#pragma once

#include <calm/io/tokenizer/added_tokens.hpp>
#include <calm/io/tokenizer/bpe.hpp>
#include <calm/io/tokenizer/normalizer.hpp>
#include <calm/io/tokenizer/pre_tokenizer.hpp>
#include <calm/io/tokenizer/token_decoder.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

/// A token, and the bytes [begin, end) of the raw text that it stands for. Tokens that encode adds have empty ranges;
/// tokens of one character that normalisation changed share its range. Where an added token takes the white space after
/// it (rstrip), tokens of that white space may follow.
struct EncodedToken {
  TokenId id = 0;
  Index begin = 0, end = 0;
  friend bool operator==(const EncodedToken&, const EncodedToken&) = default;
};

struct EncodeOptions {
  bool add_special = true;    // add BOS and EOS as the tokenizer's file says
  bool parse_special = true;  // special tokens that are written out in the text are found; if not, they are plain text
  bool dummy_prefix = true;   // put a space before the text where the tokenizer's file says so
};

/// What a tokenizer is made of; filled by the readers.
struct TokenizerParts {
  Vocabulary vocabulary;
  std::vector<Merge> merges;
  BpeOptions bpe;
  std::vector<AddedToken> added;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  TokenDecoder decoder;
  std::vector<TokenId> prefix, suffix;  // added by add_special
  std::optional<TokenId> bos, unknown, pad;
  std::vector<TokenId> ends;  // any of them ends a text; the first is the one to write after it
  std::string chat_template;  // as the file has it; empty: none
  std::string chat_source;    // the file that has it; the model, where none has
};

class Tokenizer {
 public:
  /// Of one thread and one tokenizer; keeps what was encoded before, for speed alone.
  struct Scratch {
    Regex::Scratch regex;
    Bpe::Scratch bpe;
    std::vector<Bpe::Token> tokens;
  };

  explicit Tokenizer(TokenizerParts parts) : parts_(std::move(parts)) {
    bpe_ = Bpe(std::move(parts_.merges), parts_.bpe, parts_.vocabulary);
    std::vector<AddedToken> raw, normalized;
    Regex::Scratch scratch;
    // What becomes of all of them together is limited as if they were 32 kB at most: 2 MB. Few are normalised at all.
    std::size_t normalized_bytes = 0;
    for (const AddedToken& token : parts_.added) normalized_bytes += token.normalized ? token.content.size() : 0;
    TextGrowth growth(std::min(normalized_bytes, std::size_t{32} << 10));
    special_.assign(static_cast<std::size_t>(parts_.vocabulary.size()), false);
    for (const AddedToken& token : parts_.added) {
      special_[static_cast<std::size_t>(token.id)] = token.special;
      if (!token.normalized) {
        raw.push_back(token);
        continue;
      }
      normalized.push_back(token);
      normalized.back().content = parts_.normalizer(AlignedText(token.content, 0), true, growth, scratch).text();
      growth.end_part();
    }
    raw_matcher_ = AddedTokenMatcher(std::move(raw));
    normalized_matcher_ = AddedTokenMatcher(std::move(normalized));
    identity_ = make_identity();
  }

  /// The tokens of a text, which may hold any bytes. Throws ConfigError for 2^31 bytes and more, FormatError where a
  /// pattern of the tokenizer's file gives up, or its steps make too much of the text (TextGrowth).
  std::vector<EncodedToken> encode(std::string_view text, const EncodeOptions& options, Scratch& scratch) const {
    require<ConfigError>(text.size() < (std::size_t{1} << 31), "a text of ", text.size(),
                         " bytes; a tokenizer takes less than 2^31 at a time");
    std::vector<EncodedToken> result;
    TextGrowth growth(text.size());
    if (options.add_special)
      for (const TokenId id : parts_.prefix) result.push_back({id, 0, 0});
    for (std::size_t place = 0; place < text.size();) {
      const std::size_t valid = valid_utf8_prefix(text.substr(place));
      EncodeOptions here = options;
      here.dummy_prefix = options.dummy_prefix && place == 0;  // not after bytes that are no text
      encode_valid(text.substr(place, valid), place, here, growth, scratch, result);
      place += valid;
      const std::size_t begin = place;
      while (place < text.size() && code_point_at(text.substr(place, 4)).bytes == 0) ++place;
      encode_piece_of(AlignedText(text.substr(begin, place - begin), begin), {0, place - begin}, scratch, result);
    }
    if (options.add_special)
      for (const TokenId id : parts_.suffix)
        result.push_back({id, static_cast<Index>(text.size()), static_cast<Index>(text.size())});
    return result;
  }
  std::vector<EncodedToken> encode(std::string_view text, const EncodeOptions& options = {}) const {
    Scratch scratch;
    return encode(text, options, scratch);
  }

  /// Bytes alone, as the byte alignment needs them: nothing is added, no dummy prefix, special tokens are plain text.
  std::vector<EncodedToken> encode_piece(std::string_view bytes, Scratch& scratch) const {
    return encode(bytes, {.add_special = false, .parse_special = false, .dummy_prefix = false}, scratch);
  }
  std::vector<EncodedToken> encode_piece(std::string_view bytes) const {
    Scratch scratch;
    return encode_piece(bytes, scratch);
  }

  /// The text of tokens, bytes as the model wrote them. Throws ConfigError for an id outside the vocabulary.
  std::string decode(std::span<const TokenId> ids, bool skip_special = true) const;

  /// The bytes that a token stands for in the middle of a text. Empty for an id that no token has.
  std::string token_bytes(TokenId id) const {
    Regex::Scratch scratch;
    return token_bytes(id, false, scratch);
  }

  /// One more than the highest id.
  Index vocabulary_size() const { return parts_.vocabulary.size(); }
  bool is_special(TokenId id) const {
    return id >= 0 && id < vocabulary_size() && special_[static_cast<std::size_t>(id)];
  }
  /// The id of an added token by its content ("<|im_end|>"), or of a token by its bytes.
  std::optional<TokenId> find(std::string_view content) const {
    for (const AddedToken& token : parts_.added)
      if (token.content == content) return token.id;
    const TokenId id = parts_.vocabulary.find(content);
    return id == Vocabulary::none ? std::nullopt : std::optional(id);
  }

  std::optional<TokenId> bos() const { return parts_.bos; }
  /// The token to write after a text.
  std::optional<TokenId> eos() const { return parts_.ends.empty() ? std::nullopt : std::optional(parts_.ends.front()); }
  /// The tokens any of which ends what a model writes; eos() is the first.
  const std::vector<TokenId>& ends() const { return parts_.ends; }
  std::optional<TokenId> unknown() const { return parts_.unknown; }
  std::optional<TokenId> pad() const { return parts_.pad; }
  const std::string& chat_template() const { return parts_.chat_template; }
  const std::string& chat_source() const { return parts_.chat_source; }

  /// XXH3-128 of everything that decides which ids a text gets; equal for equal tokenizers of one kind of file.
  const std::string& identity() const { return identity_; }

 private:
  friend class TokenStream;

  void encode_valid(std::string_view text, std::size_t base, const EncodeOptions& options, TextGrowth& growth,
                    Scratch& scratch, std::vector<EncodedToken>& result) const {
    const auto put = [&](const AddedToken& token, ByteRange raw) {
      result.push_back({token.id, static_cast<Index>(raw.begin), static_cast<Index>(raw.end)});
    };
    raw_matcher_.for_each_part(text, options.parse_special, [&](ByteRange range, const AddedToken* token) {
      if (token != nullptr) return put(*token, {base + range.begin, base + range.end});
      AlignedText part(text.substr(range.begin, range.end - range.begin), base + range.begin);
      part = parts_.normalizer(std::move(part), options.dummy_prefix, growth, scratch.regex);
      growth.end_part();
      if (normalized_matcher_.empty()) return encode_part(std::move(part), options, growth, scratch, result);
      normalized_matcher_.for_each_part(part.text(), options.parse_special,
                                        [&](ByteRange inner, const AddedToken* normalized) {
                                          if (normalized != nullptr) put(*normalized, part.raw(inner));
                                          else encode_part(part.slice(inner), options, growth, scratch, result);
                                        });
    });
  }

  void encode_part(AlignedText part, const EncodeOptions& options, TextGrowth& growth, Scratch& scratch,
                   std::vector<EncodedToken>& result) const {
    const CutText cut = parts_.pre_tokenizer(std::move(part), options.dummy_prefix, growth, scratch.regex);
    growth.end_part();
    for (const ByteRange piece : cut.pieces) encode_piece_of(cut.text, piece, scratch, result);
  }

  void encode_piece_of(const AlignedText& text, ByteRange piece, Scratch& scratch,
                       std::vector<EncodedToken>& result) const {
    if (piece.begin == piece.end) return;
    scratch.tokens.clear();
    bpe_.encode(text.text(piece), parts_.vocabulary, scratch.bpe, scratch.tokens);
    for (const Bpe::Token& token : scratch.tokens) {
      const ByteRange raw = text.raw({piece.begin + token.begin, piece.begin + token.end});
      result.push_back({token.id, static_cast<Index>(raw.begin), static_cast<Index>(raw.end)});
    }
  }

  std::string token_bytes(TokenId id, bool is_first, Regex::Scratch& scratch) const {
    const std::string_view bytes = parts_.vocabulary.bytes(id);
    if (parts_.bpe.byte_level) return std::string(bytes);
    return parts_.decoder.bytes_of(bytes, is_first, scratch);
  }

  std::string make_identity() const {
    const BpeOptions& bpe = parts_.bpe;
    std::string parts = parts_.vocabulary.identity();
    parts += content_hash(std::as_bytes(std::span(bpe_.merges().all())));
    parts += message(bpe.byte_level, bpe.ignore_merges, bpe.fuse_unknown, bpe.uses_byte_tokens, ' ', bpe.unknown, '\n');
    if (bpe.uses_byte_tokens)
      for (const TokenId id : bpe.byte_tokens) parts += message(id, ' ');
    const auto text = [&](std::string_view value) { parts += message(value.size(), ':', value, ' '); };
    for (const AddedToken& token : parts_.added) {
      text(token.content);
      parts += message(token.id, token.special ? 's' : '-', token.normalized ? 'n' : '-', token.single_word ? 'w' : '-',
                       token.lstrip ? 'l' : '-', token.rstrip ? 'r' : '-', '\n');
    }
    for (const auto& [step, where] : parts_.normalizer.steps()) {
      parts += message("normalizer ", step.index(), ' ');
      if (const auto* form = std::get_if<UnicodeForm>(&step)) parts += message(form->compose, form->compatible);
      if (const auto* replace = std::get_if<ReplaceMatches>(&step))
        text(replace->pattern.pattern()), text(replace->content);
      if (const auto* prepend = std::get_if<PrependContent>(&step)) text(prepend->content);
      if (const auto* strip = std::get_if<StripEnds>(&step)) parts += message(strip->left, strip->right);
    }
    for (const PreTokenizerStep& step : parts_.pre_tokenizer.steps()) {
      parts += message("pre_tokenizer ", step.index(), ' ');
      if (const auto* split = std::get_if<SplitAtMatches>(&step)) {
        text(split->pattern.pattern());
        parts += message(static_cast<int>(split->behavior), split->invert);
      }
      if (const auto* prefix = std::get_if<PrefixPieces>(&step))
        text(prefix->prefix), parts += message(prefix->first_only);
      if (const auto* replace = std::get_if<ReplaceInPieces>(&step))
        text(replace->pattern.pattern()), text(replace->content);
    }
    for (const TokenId id : parts_.prefix) parts += message("prefix ", id, ' ');
    for (const TokenId id : parts_.suffix) parts += message("suffix ", id, ' ');
    return content_hash(parts);
  }

  TokenizerParts parts_;
  Bpe bpe_;
  AddedTokenMatcher raw_matcher_, normalized_matcher_;
  std::vector<bool> special_;
  std::string identity_;
};

/// Decodes token by token and holds back a character of which not all bytes are there yet.
class TokenStream {
 public:
  /// The tokenizer must outlive the stream.
  explicit TokenStream(const Tokenizer& tokenizer, bool skip_special = true)
      : tokenizer_(&tokenizer), skip_special_(skip_special), strip_left_(tokenizer.parts_.decoder.strip_left) {}

  /// The text that this token completes. Throws ConfigError for an id outside the vocabulary.
  std::string push(TokenId id) {
    append(id);
    std::string text = std::move(held_);
    const std::size_t held = incomplete_utf8_suffix(text);
    held_ = text.substr(text.size() - held);
    text.resize(text.size() - held);
    return text;
  }

  /// What is held back and will never be whole.
  std::string finish() { return std::exchange(held_, {}); }

 private:
  friend class Tokenizer;

  void append(TokenId id) {
    require<ConfigError>(id >= 0 && id < tokenizer_->vocabulary_size(), "the token ", id,
                         " is outside of the vocabulary of ", tokenizer_->vocabulary_size());
    if (skip_special_ && tokenizer_->is_special(id)) return;
    const TokenDecoder& decoder = tokenizer_->parts_.decoder;
    const std::string bytes = tokenizer_->token_bytes(id, is_first_, scratch_);
    if (!is_first_) held_ += decoder.separator;
    is_first_ = false;
    std::string_view rest = bytes;
    for (; strip_left_ > 0 && !rest.empty(); --strip_left_) {
      if (!rest.starts_with(decoder.strip_character)) {
        strip_left_ = 0;
        break;
      }
      rest.remove_prefix(decoder.strip_character.size());
    }
    held_ += rest;
  }

  const Tokenizer* tokenizer_;
  bool skip_special_, is_first_ = true;
  Index strip_left_;
  Regex::Scratch scratch_;
  std::string held_;
};

inline std::string Tokenizer::decode(std::span<const TokenId> ids, bool skip_special) const {
  TokenStream stream(*this, skip_special);
  for (const TokenId id : ids) stream.append(id);
  return stream.finish();
}

}  // namespace calm::inline CALM_ABI
