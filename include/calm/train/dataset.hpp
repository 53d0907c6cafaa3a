// Training examples and the packed batches that are made of them: sequences behind each other, no padding, and a loss
// on the completions only.
#pragma once

#include <calm/core/arithmetic.hpp>
#include <calm/core/random.hpp>
#include <calm/model/decoder.hpp>

#include <numeric>

namespace calm::inline CALM_ABI {

/// Tokens of a prompt and of what should follow it. The end token, where one is wanted, is the completion's last.
struct Example {
  std::vector<TokenId> prompt, completion;
  std::vector<bool> scored = {};      // which completion tokens count in the loss; empty: all
  std::vector<TokenId> targets = {};  // what should be predicted in place of each completion token; empty: the token

  Index tokens() const { return static_cast<Index>(prompt.size() + completion.size()) - 1; }
};

/// Examples as one ragged batch of inputs, with the rows that predict a scored token and these tokens.
class PackedBatch {
 public:
  /// Tokens whose activations stay in the caches of a core.
  static constexpr Index piece_tokens = 384;

  PackedBatch() = default;
  /// Also cuts the batch, between sequences, into pieces of about the same size. Throws ShapeError for an empty prompt
  /// or completion.
  explicit PackedBatch(std::span<const Example> examples) {
    Index total = 0, before = 0, last = -1;
    for (const Example& example : examples) {
      check(example);
      append(example);
      total += example.tokens();
    }
    const Index count = ceil_divide(total, piece_tokens);
    if (count <= 1) return;
    for (const Example& example : examples) {
      const Index piece = (2 * before + example.tokens()) * count / (2 * total);  // that of its middle
      if (piece != last) pieces_.emplace_back();
      pieces_.back().append(example);
      before += example.tokens();
      last = piece;
    }
  }

  /// Adds to the last piece.
  void add(const Example& example) {
    check(example);
    append(example);
    if (!pieces_.empty()) pieces_.back().append(example);
  }

  TokenBatch tokens() const { return {ids_, offsets_, prompt_lengths_, {}}; }
  std::span<const Index> rows() const { return rows_; }          // rows of the stream that predict
  std::span<const TokenId> targets() const { return targets_; }  // what they should predict
  bool empty() const { return rows_.empty(); }

  /// Batches of about piece_tokens tokens or less that hold the same sequences in the same order; a small batch is its
  /// only piece.
  std::span<const PackedBatch> pieces() const {
    return pieces_.empty() ? std::span<const PackedBatch>(this, 1) : std::span<const PackedBatch>(pieces_);
  }

 private:
  void check(const Example& example) const {
    require<ShapeError>(!example.prompt.empty() && !example.completion.empty(), "example ", prompt_lengths_.size(),
                        " has ", example.prompt.size(), " prompt and ", example.completion.size(),
                        " completion tokens; both need at least one");
    require<ShapeError>(example.scored.empty() || example.scored.size() == example.completion.size(), "example ",
                        prompt_lengths_.size(), " says of ", example.scored.size(),
                        " tokens whether they count, but its completion has ", example.completion.size());
    require<ShapeError>(example.targets.empty() || example.targets.size() == example.completion.size(), "example ",
                        prompt_lengths_.size(), " gives ", example.targets.size(), " targets for ",
                        example.completion.size(), " completion tokens");
  }

  void append(const Example& example) {
    ids_.insert(ids_.end(), example.prompt.begin(), example.prompt.end());
    const auto first_row = static_cast<Index>(ids_.size()) - 1;
    ids_.insert(ids_.end(), example.completion.begin(), example.completion.end() - 1);
    offsets_.push_back(static_cast<Index>(ids_.size()));
    prompt_lengths_.push_back(static_cast<Index>(example.prompt.size()));
    for (std::size_t i = 0; i < example.completion.size(); ++i) {
      if (!example.scored.empty() && !example.scored[i]) continue;
      rows_.push_back(first_row + static_cast<Index>(i));
      targets_.push_back(example.targets.empty() ? example.completion[i] : example.targets[i]);
    }
  }

  std::vector<TokenId> ids_;
  std::vector<Index> offsets_{0};
  std::vector<Index> prompt_lengths_;
  std::vector<Index> rows_;
  std::vector<TokenId> targets_;
  std::vector<PackedBatch> pieces_;  // empty where there is one
};

/// Examples cut once into batches of about `batch_tokens` tokens, in an order that the seed fixes. An epoch visits each
/// batch once, in an order of its own; batches stay as they are, so that states kept for one can be used again. A
/// batch of which nothing is scored is left out.
class PackedDataset {
 public:
  PackedDataset(std::span<const Example> examples, Index batch_tokens, std::uint64_t seed) : seed_(seed) {
    require<ConfigError>(!examples.empty(), "a dataset needs at least one example");
    require<ConfigError>(batch_tokens > 0, "batch_tokens must be positive, found ", batch_tokens);
    std::vector<Example> batch;
    Index tokens = 0;
    const auto close_batch = [&] {
      if (batches_.emplace_back(batch).empty()) batches_.pop_back();
    };
    for (const std::size_t i : shuffled(examples.size(), stream_of("dataset"))) {
      if (!batch.empty() && tokens + examples[i].tokens() > batch_tokens) {
        close_batch();
        batch.clear();
        tokens = 0;
      }
      batch.push_back(examples[i]);
      tokens += examples[i].tokens();
    }
    close_batch();
    require<ConfigError>(!batches_.empty(), "a dataset needs at least one example with a scored token");
  }

  Index size() const { return static_cast<Index>(batches_.size()); }
  const PackedBatch& operator[](Index i) const { return batches_[static_cast<std::size_t>(i)]; }
  std::span<const PackedBatch> batches() const { return batches_; }

  /// The number of the batch that is the n-th to be visited, counted over epochs.
  Index at(Index n) const {
    const auto order = shuffled(batches_.size(), static_cast<std::uint64_t>(n / size()));
    return static_cast<Index>(order[static_cast<std::size_t>(n % size())]);
  }

 private:
  std::vector<std::size_t> shuffled(std::size_t count, std::uint64_t stream) const {
    std::vector<std::size_t> order(count);
    std::iota(order.begin(), order.end(), std::size_t{0});
    Random random(seed_, stream);
    for (std::size_t i = count; i > 1; --i)
      std::swap(order[i - 1], order[static_cast<std::size_t>(random.below(static_cast<Index>(i)))]);
    return order;
  }

  std::vector<PackedBatch> batches_;
  std::uint64_t seed_;
};

}  // namespace calm::inline CALM_ABI
