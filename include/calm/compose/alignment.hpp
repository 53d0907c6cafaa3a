// Alignment: for each anchor position t, how many augment positions it may see, visible[t].
//
// An Aligner turns the anchor's tokens into the augment's, append only: the prompt is given at once, what follows in
// pieces of any size, and nothing is ever taken back. Training, evaluation and generation call the same function, so
// they agree.
#pragma once

#include <calm/core/error.hpp>

#include <memory>
#include <span>
#include <string>
#include <vector>

namespace calm::inline CALM_ABI {

/// What an aligner has to remember of a sequence.
struct AlignmentState {
  Index anchor_tokens = 0;
  Index augment_tokens = 0;
  std::string pending;  // bytes that do not make a token yet

  void clear() {
    anchor_tokens = augment_tokens = 0;
    pending.clear();
  }
};

class Aligner {
 public:
  virtual ~Aligner() = default;

  /// Appends to `augment_ids` the augment's tokens that `anchor_ids` bring, and to `visible` one number for each anchor
  /// token: how many augment tokens of the sequence it may see, never fewer than the token before it. `prompt` says
  /// that these tokens are the whole prompt; at most the first call for a sequence has it.
  virtual void append(AlignmentState& state, std::span<const TokenId> anchor_ids, bool prompt,
                      std::vector<TokenId>& augment_ids, std::vector<Index>& visible) const = 0;

  /// The most augment tokens that `anchor_tokens` may bring, for which a session reserves room.
  virtual Index augment_capacity(Index anchor_tokens) const { return anchor_tokens; }

  /// The fewest that any `anchor_tokens` after the prompt bring: what does not fit is refused before it begins.
  virtual Index augment_minimum(Index) const { return 0; }
};

/// One tokenizer: the augment reads the anchor's tokens, and position t sees t + 1 of them.
class IdentityAligner final : public Aligner {
 public:
  void append(AlignmentState& state, std::span<const TokenId> anchor_ids, bool, std::vector<TokenId>& augment_ids,
              std::vector<Index>& visible) const override {
    for (const TokenId id : anchor_ids) {
      augment_ids.push_back(id);
      ++state.anchor_tokens;
      visible.push_back(++state.augment_tokens);
    }
  }
  Index augment_minimum(Index anchor_tokens) const override { return anchor_tokens; }
};

/// Whether an augment reads the anchor's tokens as they are.
inline bool is_identity(const Aligner& aligner) { return dynamic_cast<const IdentityAligner*>(&aligner) != nullptr; }

/// The aligned tokens of a batch. Vectors keep their memory from one batch to the next.
struct AlignedBatch {
  std::vector<TokenId> ids;
  std::vector<Index> offsets;         // [sequences + 1], of the augment's tokens
  std::vector<Index> visible;         // [anchor tokens]
  std::vector<Index> key_positions;   // [augment tokens] the first anchor position that sees each
  std::vector<Index> prompt_lengths;  // [sequences] augment tokens that the prompt brought

  void clear() {
    ids.clear();
    offsets.assign(1, 0);
    visible.clear();
    key_positions.clear();
    prompt_lengths.clear();
  }

  /// Appends the next tokens of one sequence, the first `prompt_length` of which are its prompt.
  [[gnu::cold]] void append(const Aligner& aligner, AlignmentState& state, std::span<const TokenId> anchor_ids,
                            Index prompt_length) {
    const Index first_position = state.anchor_tokens, first_key = state.augment_tokens;
    const std::size_t first_visible = visible.size();
    const auto split = static_cast<std::size_t>(prompt_length);
    require<ShapeError>(prompt_length >= 0 && split <= anchor_ids.size(), "a prompt of ", prompt_length,
                        " tokens in a sequence of ", anchor_ids.size());
    if (split > 0) aligner.append(state, anchor_ids.first(split), true, ids, visible);
    prompt_lengths.push_back(state.augment_tokens - first_key);
    aligner.append(state, anchor_ids.subspan(split), false, ids, visible);
    require<ShapeError>(visible.size() - first_visible == anchor_ids.size(), "the aligner gave ",
                        visible.size() - first_visible, " visible counts for ", anchor_ids.size(), " anchor tokens");
    offsets.push_back(static_cast<Index>(ids.size()));
    Index key = first_key, before = 0;
    for (std::size_t t = 0; t < anchor_ids.size(); ++t) {
      const Index seen = visible[first_visible + t];
      require<ShapeError>(seen >= before && seen <= state.augment_tokens, "the aligner made ", seen,
                          " augment tokens visible after ", before, " of ", state.augment_tokens);
      before = seen;
      for (; key < seen; ++key) key_positions.push_back(first_position + static_cast<Index>(t));
    }
    // Tokens that nothing sees yet would be seen at the next position at the earliest.
    for (; key < state.augment_tokens; ++key)
      key_positions.push_back(first_position + static_cast<Index>(anchor_ids.size()));
  }
};

}  // namespace calm::inline CALM_ABI
