// Tiny random models, ragged batches and losses for the tests of models and compositions.
#pragma once

#include <calm/backend/cpu.hpp>
#include <calm/compose/composed_model.hpp>
#include <calm/model/random_weights.hpp>
#include <calm/model/transformer.hpp>
#include <calm/model/zoo/llama.hpp>
#include <support/values.hpp>

#include <memory>
#include <numeric>

namespace calm_test {

using Cpu = calm::Context<calm::CpuBackend>;

/// Weights of ordinary size in every place, so that no gradient is small by chance: norms around one, embeddings with
/// deviation one. Stored in `dtype`.
struct TestWeights {
  std::uint64_t seed = 0;
  calm::DType dtype = calm::DType::f64;

  calm::StoredMatrix operator()(const std::string& name, Index rows, Index cols) const {
    Matrix<double> m(rows, cols);
    calm::Random random(seed, calm::stream_of(name));
    const bool norm = contains(name, "norm"), embedding = contains(name, "embed");
    const double deviation = norm ? 0.2 : embedding ? 1 : 1 / std::sqrt(static_cast<double>(cols));
    for (double& x : m.values()) x = (norm ? 1 : 0) + deviation * random.normal();
    return calm::StoredMatrix::from(m, dtype);
  }
};

/// Non-gated, another activation: an architecture of the tests' own.
struct PlainArchitecture : calm::ArchitectureDefaults {
  template <class Weights, class Scalar>
  using Norm = calm::RmsNorm<Weights, Scalar>;
  template <class Weights, class Scalar>
  using Mlp = calm::Mlp<calm::GeluTanh, false, Weights, Scalar>;
};

/// Random values for every trainable weight, also for those that start as zero.
template <class Model>
void randomise(Model& model, std::uint64_t seed) {
  calm::for_each_parameter(model, [&](const std::string& name, auto& parameter) {
    using S = std::remove_cvref_t<decltype(*parameter.value.data())>;
    calm::Random random(seed, calm::stream_of(name));
    const bool norm = contains(name, "norm");
    const double deviation = norm ? 0.2
                             : contains(name, "gate") && parameter.value.size() == 1
                                 ? 0.7
                                 : 1 / std::sqrt(static_cast<double>(parameter.value.cols()));
    for (S& x : parameter.value.values()) x = static_cast<S>((norm ? 1 : 0) + deviation * random.normal());
  });
}

/// A TokenBatch that owns its numbers.
struct Batch {
  std::vector<TokenId> ids;
  std::vector<Index> offsets{0}, prompts, slots;

  void add(std::vector<TokenId> tokens, Index prompt = 0, Index slot = -1) {
    ids.insert(ids.end(), tokens.begin(), tokens.end());
    offsets.push_back(static_cast<Index>(ids.size()));
    prompts.push_back(prompt);
    slots.push_back(slot < 0 ? static_cast<Index>(slots.size()) : slot);
  }
  calm::TokenBatch view() const { return {ids, offsets, prompts, {}}; }
  calm::TokenBatch cached() const { return {ids, offsets, prompts, slots}; }
};

inline std::vector<TokenId> random_tokens(Index count, Index vocabulary, std::uint64_t seed) {
  calm::Random random(seed, 3);
  std::vector<TokenId> ids;
  for (Index i = 0; i < count; ++i) ids.push_back(static_cast<TokenId>(random.below(vocabulary)));
  return ids;
}

/// Sequences of the given lengths, each with the given number of prompt tokens.
inline Batch random_batch(const std::vector<std::pair<Index, Index>>& lengths_and_prompts, Index vocabulary,
                          std::uint64_t seed) {
  Batch batch;
  for (const auto& [length, prompt] : lengths_and_prompts) batch.add(random_tokens(length, vocabulary, seed++), prompt);
  return batch;
}

/// Logits of every position by the path of training.
template <class Model, class Ctx>
Matrix<typename Model::Scalar> forward_logits(const Model& model, Ctx& ctx, const Batch& batch,
                                              typename Model::States& states) {
  using S = typename Model::Scalar;
  ctx.arena.reset();
  model.prepare(ctx, batch.view(), states);
  const MatrixView<S> x = model.forward(ctx, batch.view(), states, nullptr);
  typename Model::HeadCache head;
  Matrix<S> logits = poisoned<S>(x.rows, model.spec().vocabulary);
  model.head(ctx, MatrixView<const S>(x), logits.view(), head);
  return logits;
}
template <class Model, class Ctx>
Matrix<typename Model::Scalar> forward_logits(const Model& model, Ctx& ctx, const Batch& batch) {
  typename Model::States states;
  return forward_logits(model, ctx, batch, states);
}

/// Logits of one call of advance().
template <class Model, class Ctx>
Matrix<typename Model::Scalar> advance_logits(const Model& model, Ctx& ctx, typename Model::Session& session,
                                              const Batch& batch) {
  using S = typename Model::Scalar;
  ctx.arena.reset();
  const MatrixView<S> x = model.advance(ctx, session, batch.cached(), calm::NullObserver{});
  typename Model::HeadCache head;
  Matrix<S> logits = poisoned<S>(x.rows, model.spec().vocabulary);
  model.head(ctx, MatrixView<const S>(x), logits.view(), head);
  return logits;
}

/// Logits of every position of one sequence, given to a slot piece by piece. The prompt comes as one piece before
/// these.
template <class Model, class Ctx>
Matrix<typename Model::Scalar> cached_logits(const Model& model, Ctx& ctx, typename Model::Session& session, Index slot,
                                             const std::vector<TokenId>& ids, Index prompt,
                                             const std::vector<Index>& pieces) {
  Matrix<typename Model::Scalar> all(static_cast<Index>(ids.size()), model.spec().vocabulary);
  Index done = 0;
  const auto give = [&](Index count, Index prompt_length) {
    Batch batch;
    batch.add({ids.begin() + done, ids.begin() + done + count}, prompt_length, slot);
    const auto logits = advance_logits(model, ctx, session, batch);
    std::copy_n(logits.data(), logits.size(), all.view().row(done));
    done += count;
  };
  if (prompt > 0) give(prompt, prompt);
  for (std::size_t i = 0; done < static_cast<Index>(ids.size()); ++i)
    give(std::min(pieces[i % pieces.size()], static_cast<Index>(ids.size()) - done), 0);
  return all;
}

/// The mean cross entropy of random targets at every position, for prepared states; with `grads` also its gradients.
template <class Model, class Ctx, class... Grads>
double prepared_loss(const Model& model, Ctx& ctx, const Batch& batch, const typename Model::States& states,
                     Grads&... grads) {
  using S = typename Model::Scalar;
  ctx.arena.reset();
  const calm::TokenBatch tokens = batch.view();
  typename Model::Tape tape;
  typename Model::HeadCache head;
  const MatrixView<S> x = model.forward(ctx, tokens, states, sizeof...(Grads) > 0 ? &tape : nullptr);
  const MatrixView<S> logits = ctx.arena.template matrix<S>(x.rows, model.spec().vocabulary);
  model.head(ctx, MatrixView<const S>(x), logits, head);
  const auto targets = random_tokens(x.rows, model.spec().vocabulary, 1234);
  const auto losses = ctx.arena.template vector<S>(x.rows);
  ctx.backend.cross_entropy(MatrixView<const S>(logits), std::span<const TokenId>(targets),
                            1 / static_cast<double>(x.rows), losses, logits);
  if constexpr (sizeof...(Grads) > 0) {
    Matrix<S> dx = poisoned<S>(x.rows, x.cols);
    model.head_backward(ctx, MatrixView<const S>(x), MatrixView<const S>(logits), dx.view(), head, grads...);
    model.backward(ctx, tokens, states, tape, dx.view(), grads...);
  }
  return static_cast<double>(std::accumulate(losses.begin(), losses.end(), S{0})) / static_cast<double>(x.rows);
}
template <class Model, class Ctx, class... Grads>
double random_target_loss(const Model& model, Ctx& ctx, const Batch& batch, Grads&... grads) {
  typename Model::States states;
  ctx.arena.reset();
  model.prepare(ctx, batch.view(), states);
  return prepared_loss(model, ctx, batch, states, grads...);
}

/// An aligner with a tokenizer of its own. Anchor token i brings i mod 3 augment tokens (none, one or two). The prompt
/// is encoded whole: each of its augment tokens depends on all of it.
class UnevenAligner final : public calm::Aligner {
 public:
  explicit UnevenAligner(Index augment_vocabulary) : vocabulary_(augment_vocabulary) {}

  void append(calm::AlignmentState& state, std::span<const TokenId> anchor_ids, bool prompt,
              std::vector<TokenId>& augment_ids, std::vector<Index>& visible) const override {
    const Index context = prompt ? std::accumulate(anchor_ids.begin(), anchor_ids.end(), Index{0}) : 0;
    for (const TokenId id : anchor_ids) {
      for (Index n = 0; n < id % 3; ++n) {
        augment_ids.push_back(static_cast<TokenId>((id * 7 + n * 5 + context) % vocabulary_));
        ++state.augment_tokens;
      }
      ++state.anchor_tokens;
      visible.push_back(state.augment_tokens);
    }
  }
  Index augment_capacity(Index anchor_tokens) const override { return 2 * anchor_tokens; }

 private:
  Index vocabulary_;
};

}  // namespace calm_test
