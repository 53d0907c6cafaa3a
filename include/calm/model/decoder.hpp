// Decoder: what Transformer and ComposedModel have in common, so that every tool of the library takes either.
//
// A pass runs over a TokenBatch, ragged and without padding, and gives the residual stream [T, width], or the rows of
// it that are asked for; head() turns rows into logits. An observer reads and writes the stream after each block, of
// the last one these rows.
#pragma once

#include <calm/model/spec.hpp>

#include <concepts>

namespace calm::inline CALM_ABI {

/// Sequences behind each other: sequence s holds tokens [offsets[s], offsets[s + 1]).
struct TokenBatch {
  std::span<const TokenId> ids;
  std::span<const Index> offsets;         // [sequences + 1]
  std::span<const Index> prompt_lengths;  // [sequences] tokens of each that belong to the prompt; empty: none
  std::span<const Index> slots;           // advance() only: [sequences] the session's slot that each continues
  std::span<const Index> rows = {};       // the tokens, ascending, whose final stream is asked for, so that the last
                                          // block gives no other; empty: all. Refused by sessions of fewer blocks

  Index tokens() const { return static_cast<Index>(ids.size()); }
  /// Rows of the final stream.
  Index final_rows() const { return rows.empty() ? tokens() : static_cast<Index>(rows.size()); }
  Index sequences() const { return static_cast<Index>(offsets.size()) - 1; }
  Index length(Index s) const {
    return offsets[static_cast<std::size_t>(s + 1)] - offsets[static_cast<std::size_t>(s)];
  }
  Index prompt_length(Index s) const {
    return prompt_lengths.empty() ? 0 : prompt_lengths[static_cast<std::size_t>(s)];
  }

  /// Throws ShapeError where the offsets do not cut the ids into sequences, or two of these continue the same slot.
  [[gnu::cold]] void check() const {
    require<ShapeError>(!offsets.empty() && offsets.front() == 0 && offsets.back() == tokens(),
                        "TokenBatch: the offsets must begin with 0 and end with the number of tokens, ", tokens());
    for (std::size_t s = 1; s < offsets.size(); ++s)
      require<ShapeError>(offsets[s - 1] <= offsets[s], "TokenBatch: offset ", s,
                          " lies before the one that precedes it");
    require<ShapeError>(prompt_lengths.empty() || static_cast<Index>(prompt_lengths.size()) == sequences(),
                        "TokenBatch: ", prompt_lengths.size(), " prompt lengths for ", sequences(), " sequences");
    for (std::size_t i = 0; i < rows.size(); ++i)
      require<ShapeError>(rows[i] > (i == 0 ? -1 : rows[i - 1]) && rows[i] < tokens(), "TokenBatch: row ", i, " is ",
                          rows[i], "; rows must ascend, each below the number of tokens, ", tokens());
    require<ShapeError>(slots.empty() || static_cast<Index>(slots.size()) == sequences(), "TokenBatch: ", slots.size(),
                        " slots for ", sequences(), " sequences");
    for (std::size_t s = 1; s < slots.size(); ++s)  // few, and without a set, which would allocate at every token
      for (std::size_t before = 0; before < s; ++before)
        require<ShapeError>(slots[before] != slots[s], "TokenBatch: the sequences ", before, " and ", s,
                            " both continue slot ", slots[s]);
  }
};

/// What a session runs.
struct SessionOptions {
  Index blocks = -1;     // only the first `blocks` blocks; -1: all
  bool augments = true;  // false: a composed model decodes as its anchor alone
};

/// Sees nothing and costs nothing.
struct NullObserver {
  template <class Scalar>
  void after_block(auto&, Index, MatrixView<Scalar>&) const {}
  template <class Scalar>
  void after_block_backward(auto&, Index, MatrixView<Scalar>) const {}
};

/// What training, generation and evaluation need of a model, for a context of type Ctx. `states` are what a pass needs
/// beside the tokens and what does not depend on trainable weights: the caller may keep and reuse them for the same
/// batch. A `tape` (or nullptr) receives what backward needs.
template <class M, class Ctx>
concept LanguageModel = requires(const M& model, Ctx& ctx, const TokenBatch& batch, typename M::States& states,
                                 typename M::Tape* tape, typename M::HeadCache& head, typename M::Session& session,
                                 MatrixView<typename M::Scalar> stream, MatrixView<const typename M::Scalar> rows,
                                 Index n) {
  typename M::Scalar;
  { model.spec() } -> std::convertible_to<const ModelSpec&>;

  // Fills the states for a batch, among them the stream that no trainable weight reaches.
  model.prepare(ctx, batch, states);
  // After prepare(): runs all blocks; the stream [T, width], or the rows of it that the batch asks for, lies in the
  // arena.
  { model.forward(ctx, batch, states, tape) } -> std::same_as<MatrixView<typename M::Scalar>>;
  // Rows of the final stream to logits [rows, vocabulary], and back.
  model.head(ctx, rows, stream, head);
  model.head_backward(ctx, rows, rows, stream, head);

  // Inference with caches: slots for `n` sequences of at most `n` tokens; advance() appends tokens and gives their
  // stream, or the rows of it that the batch asks for.
  { model.make_session(ctx, n, n, SessionOptions{}) } -> std::same_as<typename M::Session>;
  { model.advance(ctx, session, batch, NullObserver{}) } -> std::same_as<MatrixView<typename M::Scalar>>;
  { session.length(n) } -> std::convertible_to<Index>;
  // Whether the contexts of all models hold these ids, of which the first n are a prompt, and then n tokens that are
  // not known yet, behind what a slot holds (nullptr: in an empty one of a session with these options). May be true
  // where the tokens that are not known turn out to be too long.
  {
    model.fits(static_cast<const typename M::Session*>(nullptr), n, batch.ids, n, n, SessionOptions{})
    } -> std::same_as<bool>;
  session.check_room(batch);
  session.clear(n);
};

/// A LanguageModel made of blocks whose stream an observer can read and write: what can be an anchor or an augment.
template <class M, class Ctx>
concept Decoder = LanguageModel<M, Ctx> &&
    requires(const M& model, Ctx& ctx, const TokenBatch& batch, typename M::States& states, typename M::Tape* tape,
             MatrixView<typename M::Scalar> stream, NullObserver observer, Index n) {
  // The residual stream before block 0, in the arena.
  { model.embed(ctx, batch) } -> std::same_as<MatrixView<typename M::Scalar>>;
  // The part of prepare() that an outer composition needs: what the augments contribute.
  model.prepare_augments(ctx, batch, states);
  // Runs blocks [first, last): replaces the stream, calls observer.after_block after each.
  model.run(ctx, batch, states, stream, n, n, tape, observer);
  // Replaces the gradient of the stream after block last - 1 by that before block first; after each block's
  // observer.after_block_backward.
  model.run_backward(ctx, batch, states, *tape, stream, n, n, observer);
};

}  // namespace calm::inline CALM_ABI
