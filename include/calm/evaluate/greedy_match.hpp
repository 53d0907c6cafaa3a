// greedy_matches: whether greedy decoding would write a completion, token for token, from one pass over the text.
//
// Greedy decoding writes the completion exactly if at each of its positions, given what stands before, the most likely
// token is the next one. So nothing needs to be generated; the end token counts where the example has it.
#pragma once

#include <calm/train/trainer.hpp>

namespace calm::inline CALM_ABI {

/// One entry for each example. `batch_tokens`: about so many tokens are run at a time. Tokens that an example does not
/// score need not match.
template <class Model>
std::vector<bool> greedy_matches(auto& ctx, const Model& model, std::span<const Example> examples,
                                 Index batch_tokens = 2048) {
  using Scalar = typename Model::Scalar;
  std::vector<bool> matches;
  for (std::size_t begin = 0; begin < examples.size();) {
    PackedBatch batch;
    std::vector<std::size_t> counts;  // scored rows of each example
    for (Index tokens = 0;
         begin < examples.size() && (tokens == 0 || tokens + examples[begin].tokens() <= batch_tokens); ++begin) {
      const std::size_t before = batch.rows().size();
      batch.add(examples[begin]);
      counts.push_back(batch.rows().size() - before);
      tokens += examples[begin].tokens();
    }
    KeptStates<Model> states;
    const MatrixView<Scalar> logits = score_rows(ctx, model, batch, states, nullptr).logits;
    Index row = 0;
    for (const std::size_t scored : counts) {
      bool all = true;
      for (std::size_t i = 0; i < scored; ++i, ++row) {
        const Scalar* values = logits.row(row);
        all = all &&
              std::max_element(values, values + logits.cols) - values == batch.targets()[static_cast<std::size_t>(row)];
      }
      matches.push_back(all);
    }
  }
  return matches;
}

}  // namespace calm::inline CALM_ABI
