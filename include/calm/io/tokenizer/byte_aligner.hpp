// ByteAligner: aligns two tokenizers by the bytes of the text, append only.
//
// The prompt is encoded whole by the augment's tokenizer; a token of it is visible to prompt position t when its last
// byte is not after the last byte of anchor token t, and the last prompt position sees them all. From there on the
// bytes of each new anchor token are encoded alone (no dummy prefix, no BOS; an incomplete character is held back) and
// appended. Nothing is ever encoded again.
#pragma once

#include <calm/compose/alignment.hpp>
#include <calm/io/tokenizer/tokenizer.hpp>

namespace calm::inline CALM_ABI {

class ByteAligner final : public Aligner {
 public:
  /// `augment_context`: the most tokens of a sequence that the augment takes.
  ByteAligner(std::shared_ptr<const Tokenizer> anchor, std::shared_ptr<const Tokenizer> augment, Index augment_context)
      : anchor_(std::move(anchor)), augment_(std::move(augment)), augment_context_(augment_context) {}

  void append(AlignmentState& state, std::span<const TokenId> anchor_ids, bool prompt,
              std::vector<TokenId>& augment_ids, std::vector<Index>& visible) const override {
    if (prompt) append_prompt(state, anchor_ids, augment_ids, visible);
    else append_pieces(state, anchor_ids, augment_ids, visible);
    state.anchor_tokens += static_cast<Index>(anchor_ids.size());
  }

  Index augment_capacity(Index anchor_tokens) const override {
    return std::min(augment_context_, anchor_tokens * longest_token + 1);
  }

 private:
  static constexpr Index longest_token = 512;  // bytes; a byte is at most one token

  void append_prompt(AlignmentState& state, std::span<const TokenId> anchor_ids, std::vector<TokenId>& augment_ids,
                     std::vector<Index>& visible) const {
    require<ShapeError>(state.anchor_tokens == 0 && state.augment_tokens == 0,
                        "a prompt can only begin a sequence, this one has ", state.anchor_tokens, " tokens already");
    std::string text;
    std::vector<Index> ends;  // of each anchor token, in bytes
    TokenStream stream(*anchor_);
    for (const TokenId id : anchor_ids) {
      if (id < anchor_->vocabulary_size()) text += stream.push(id);  // models pad their vocabulary
      ends.push_back(static_cast<Index>(text.size()));
    }
    text += stream.finish();
    Index seen = 0;
    const std::vector<EncodedToken> tokens = augment_->encode(text, {.add_special = true, .parse_special = false});
    const std::size_t counted = visible.size();
    for (std::size_t t = 0; t < anchor_ids.size(); ++t) {
      const auto next = [&] { return static_cast<std::size_t>(seen); };
      while (next() < tokens.size() && tokens[next()].end <= ends[t]) ++seen;
      visible.push_back(seen);
    }
    for (const EncodedToken& token : tokens) augment_ids.push_back(token.id);
    state.augment_tokens = static_cast<Index>(tokens.size());
    if (visible.size() > counted) visible.back() = state.augment_tokens;
  }

  void append_pieces(AlignmentState& state, std::span<const TokenId> anchor_ids, std::vector<TokenId>& augment_ids,
                     std::vector<Index>& visible) const {
    if (state.anchor_tokens == 0 && state.augment_tokens == 0)  // without a prompt: the specials begin the sequence
      for (const EncodedToken& token : augment_->encode("", {})) {
        augment_ids.push_back(token.id);
        ++state.augment_tokens;
      }
    for (const TokenId id : anchor_ids) {
      if (id < anchor_->vocabulary_size() && !anchor_->is_special(id)) state.pending += anchor_->token_bytes(id);
      const std::size_t held = incomplete_utf8_suffix(state.pending);
      const std::string piece = state.pending.substr(0, state.pending.size() - held);
      state.pending.erase(0, piece.size());
      if (!piece.empty())
        for (const EncodedToken& token : augment_->encode_piece(piece)) {
          augment_ids.push_back(token.id);
          ++state.augment_tokens;
        }
      visible.push_back(state.augment_tokens);
    }
  }

  std::shared_ptr<const Tokenizer> anchor_, augment_;
  Index augment_context_;
};

}  // namespace calm::inline CALM_ABI
