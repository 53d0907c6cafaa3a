// Trainer: optimizer steps over packed batches, for any LanguageModel with trainable weights.
//
// The loss is the mean over all scored completion tokens of a step, its accumulated batches together. A step that meets
// NaN or infinity throws before anything has changed.
#pragma once

#include <calm/train/dataset.hpp>
#include <calm/train/optimizer.hpp>
#include <calm/train/schedule.hpp>

#include <cmath>

namespace calm::inline CALM_ABI {

/// The states of one batch (the augments', and the anchor's below the lowest link), and whether they are filled.
template <class Model>
struct KeptStates {
  typename Model::States states;
  bool filled = false;
};

/// One batch of a step: what to learn, and where to keep its states for later epochs (nullptr: nowhere).
template <class Model>
struct TrainingBatch {
  const PackedBatch* batch = nullptr;
  KeptStates<Model>* kept = nullptr;
};

struct StepResult {
  double loss = 0;           // mean, in nats a token
  double gradient_norm = 0;  // before clipping
  Index tokens = 0;          // that went through the model
};

/// The rows of the final stream that predict, and their logits; views into the arena.
template <class Model>
struct ScoredRows {
  MatrixView<typename Model::Scalar> stream, rows, logits;  // [T, D], [scored, D], [scored, vocabulary]
  typename Model::HeadCache head;
};

/// Runs a batch up to the logits of its scored rows. Resets the arena first; fills `kept` unless it is filled.
template <class Model>
ScoredRows<Model> score_rows(auto& ctx, const Model& model, const PackedBatch& batch, KeptStates<Model>& kept,
                             typename Model::Tape* tape) {
  using Scalar = typename Model::Scalar;
  using ConstView = MatrixView<const Scalar>;
  ctx.arena.reset();
  if (!kept.filled) model.prepare(ctx, batch.tokens(), kept.states);
  kept.filled = true;
  ScoredRows<Model> scored;
  scored.stream = model.forward(ctx, batch.tokens(), kept.states, tape);
  const auto count = static_cast<Index>(batch.rows().size());
  scored.rows = ctx.arena.template matrix<Scalar>(count, scored.stream.cols);
  scored.logits = ctx.arena.template matrix<Scalar>(count, model.spec().vocabulary);
  ctx.backend.gather_rows(ConstView(scored.stream), batch.rows(), scored.rows);  // only these reach the head
  model.head(ctx, ConstView(scored.rows), scored.logits, scored.head);
  return scored;
}

/// The losses of a batch's rows in its order, and with `grads` their gradients times `scale` added.
template <class Model, class... Grads>
double batch_loss(auto& ctx, const Model& model, const PackedBatch& batch, KeptStates<Model>& kept,
                  typename Model::Tape* tape, double scale, Grads&... grads) {
  using Scalar = typename Model::Scalar;
  using ConstView = MatrixView<const Scalar>;
  const auto [x, rows, logits, head] = score_rows(ctx, model, batch, kept, tape);
  const auto losses = ctx.arena.template vector<Scalar>(logits.rows);
  for (const TokenId target : batch.targets())
    require<ShapeError>(target >= 0 && target < model.spec().vocabulary, "a target token is ", target,
                        ", which is outside the vocabulary of ", model.spec().vocabulary);
  ctx.backend.cross_entropy(ConstView(logits), batch.targets(), scale, losses, logits);
  double total = 0;
  for (const Scalar loss : losses) total += static_cast<double>(loss);
  if constexpr (sizeof...(Grads) == 1) {
    const auto drows = ctx.arena.template matrix<Scalar>(rows.rows, x.cols),
               dx = ctx.arena.template matrix<Scalar>(x.rows, x.cols);
    model.head_backward(ctx, ConstView(rows), ConstView(logits), drows, head, grads...);
    ctx.backend.set_zero(dx);
    ctx.backend.scatter_rows(ConstView(drows), batch.rows(), dx);
    model.backward(ctx, batch.tokens(), kept.states, *tape, dx, grads...);
  }
  return total;
}

/// Mean loss over batches, in nats a scored token; nothing is trained.
template <class Model>
double mean_loss(auto& ctx, const Model& model, std::span<const PackedBatch> batches) {
  double total = 0, count = 0;
  for (const PackedBatch& batch : batches) {
    KeptStates<Model> states;
    total += batch_loss(ctx, model, batch, states, nullptr, 1.0);
    count += static_cast<double>(batch.rows().size());
  }
  require<ConfigError>(count > 0, "mean_loss: no token is scored");
  return total / count;
}

template <class Model, class Ctx>
class Trainer {
 public:
  using Scalar = typename Model::Scalar;

  Trainer(Ctx& ctx, Model& model, const CosineSchedule& schedule, const AdamWOptions& options = {})
      : ctx_(ctx), model_(model), schedule_(schedule), grads_(model),
        optimizer_(static_cast<Index>(grads_.values().size()), options) {
    require<ConfigError>(!grads_.values().empty(), "the model has no trainable parameters");
  }

  /// One optimizer step over all given batches. Throws NumericError, leaving the weights as they were, where the loss
  /// or a gradient is not finite.
  StepResult step(std::span<const TrainingBatch<Model>> batches) {
    std::size_t scored = 0;
    for (const auto& batch : batches) scored += batch.batch->rows().size();
    require<ShapeError>(scored > 0, "a training step needs at least one scored token");
    grads_.set_zero();
    StepResult result;
    for (const auto& batch : batches) {
      KeptStates<Model>& kept = batch.kept ? *batch.kept : scratch_;
      if (!batch.kept) scratch_.filled = false;
      result.loss += batch_loss(ctx_, model_, *batch.batch, kept, &tape_, 1.0 / static_cast<double>(scored), grads_);
      result.tokens += batch.batch->tokens().tokens();
    }
    result.loss /= static_cast<double>(scored);
    double squares = 0;
    ctx_.backend.sum_of_squares(std::span<const Scalar>(grads_.values()), &squares);
    result.gradient_norm = std::sqrt(squares);
    check(result);
    ++step_;
    optimizer_.update(ctx_, model_, grads_, result.gradient_norm, schedule_(step_), step_);
    return result;
  }

  /// The same for batches whose states are not kept.
  StepResult step(const PackedBatch& batch) {
    const TrainingBatch<Model> one{&batch, nullptr};
    return step(std::span(&one, 1));
  }

  Index step_count() const { return step_; }
  const CosineSchedule& schedule() const { return schedule_; }
  const Gradients<Scalar>& gradients() const { return grads_; }
  Model& model() { return model_; }
  Ctx& context() { return ctx_; }
  AdamW<Scalar>& optimizer() { return optimizer_; }

  /// Goes on from a step whose weights and moments were restored.
  void resume_at(Index step) { step_ = step; }

 private:
  void check(const StepResult& result) {
    if (std::isfinite(result.loss) && std::isfinite(result.gradient_norm)) return;
    std::string where = std::isfinite(result.loss) ? "" : message("the loss is ", result.loss);
    for_each_parameter(model_, [&](const std::string& name, const auto& parameter) {
      if (!where.empty()) return;
      for (const Scalar g : flat(grads_[parameter]))
        if (!std::isfinite(g)) where = message("the gradient of ", name, " is ", g);
    });
    if (where.empty()) where = "the norm of the gradients overflows";
    throw NumericError(message("training step ", step_ + 1, ": ", where, "; the weights are those of step ", step_,
                               ". A lower learning rate or more warm-up may help."));
  }

  Ctx& ctx_;
  Model& model_;
  CosineSchedule schedule_;
  Gradients<Scalar> grads_;
  AdamW<Scalar> optimizer_;
  typename Model::Tape tape_;
  KeptStates<Model> scratch_;
  Index step_ = 0;
};

}  // namespace calm::inline CALM_ABI
