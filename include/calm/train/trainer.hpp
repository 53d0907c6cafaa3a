// Trainer: optimizer steps over packed batches, for any LanguageModel with trainable weights.
//
// The loss is the mean over all scored completion tokens of a step, its accumulated batches together. A step that meets
// NaN or infinity throws before anything has changed.
#pragma once

#include <calm/train/dataset.hpp>
#include <calm/train/optimizer.hpp>
#include <calm/train/schedule.hpp>
#include <calm/train/workers.hpp>

#include <algorithm>
#include <cmath>

namespace calm::inline CALM_ABI {

/// The states of one batch (the augments', and the anchor's below the lowest link), and whether they are filled; or
/// those of its pieces.
template <class Model>
struct KeptStates {
  typename Model::States states;
  bool filled = false;
  std::vector<KeptStates> pieces;

  std::size_t bytes() const {
    std::size_t total = states.bytes();
    for (const KeptStates& piece : pieces) total += piece.bytes();
    return total;
  }
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

/// The tokens of a batch, and that only the final stream of its scored rows is asked for.
inline TokenBatch scored_tokens(const PackedBatch& batch) {
  TokenBatch tokens = batch.tokens();
  tokens.rows = batch.rows();
  return tokens;
}

/// The rows of the final stream that predict, and their logits; views into the arena.
template <class Model>
struct ScoredRows {
  MatrixView<typename Model::Scalar> rows, logits;  // [scored, D], [scored, vocabulary]
  typename Model::HeadCache head;
};

/// Runs a batch up to the logits of its scored rows; nothing where there are none. Resets the arena first; fills `kept`
/// unless it is filled.
template <class Model>
ScoredRows<Model> score_rows(auto& ctx, const Model& model, const PackedBatch& batch, KeptStates<Model>& kept,
                             typename Model::Tape* tape) {
  using Scalar = typename Model::Scalar;
  using ConstView = MatrixView<const Scalar>;
  ctx.arena.reset();
  if (batch.empty()) return {};
  const TokenBatch tokens = scored_tokens(batch);
  if (!kept.filled) model.prepare(ctx, tokens, kept.states);
  kept.filled = true;
  ScoredRows<Model> scored;
  scored.rows = model.forward(ctx, tokens, kept.states, tape);
  require<ShapeError>(scored.rows.rows == tokens.final_rows(), "the model's forward() gave ", scored.rows.rows,
                      " rows where the batch asks for ", tokens.final_rows(), " (TokenBatch::rows)");
  scored.logits = ctx.arena.template matrix<Scalar>(scored.rows.rows, model.spec().vocabulary);
  model.head(ctx, ConstView(scored.rows), scored.logits, scored.head);
  return scored;
}

/// The losses of a batch's rows in its order, and with `grads` their gradients times `scale` added.
template <class Model, class... Grads>
double batch_loss(auto& ctx, const Model& model, const PackedBatch& batch, KeptStates<Model>& kept,
                  typename Model::Tape* tape, double scale, Grads&... grads) {
  using Scalar = typename Model::Scalar;
  using ConstView = MatrixView<const Scalar>;
  if (batch.empty()) return 0;
  const auto [rows, logits, head] = score_rows(ctx, model, batch, kept, tape);
  const auto losses = ctx.arena.template vector<Scalar>(logits.rows);
  for (const TokenId target : batch.targets())
    require<ShapeError>(target >= 0 && target < model.spec().vocabulary, "a target token is ", target,
                        ", which is outside the vocabulary of ", model.spec().vocabulary);
  ctx.backend.cross_entropy(ConstView(logits), batch.targets(), scale, losses, logits);
  double total = 0;
  for (const Scalar loss : losses) total += static_cast<double>(loss);
  if constexpr (sizeof...(Grads) == 1) {
    const auto drows = ctx.arena.template matrix<Scalar>(rows.rows, rows.cols);
    model.head_backward(ctx, ConstView(rows), ConstView(logits), drows, head, grads...);
    model.backward(ctx, scored_tokens(batch), kept.states, *tape, drows, grads...);
  }
  return total;
}

/// Mean loss over batches, in nats a scored token; nothing is trained.
template <class Model>
double mean_loss(auto& ctx, const Model& model, std::span<const PackedBatch> batches) {
  std::vector<const PackedBatch*> pieces;
  std::vector<Index> sizes;
  for (const PackedBatch& batch : batches)
    for (const PackedBatch& piece : batch.pieces()) {
      pieces.push_back(&piece);
      sizes.push_back(piece.tokens().tokens());
    }
  std::vector<double> losses(pieces.size());
  Workers workers(ctx);
  workers.for_each(sizes, [&](auto& context, Index, Index i) {
    KeptStates<Model> states;
    losses[static_cast<std::size_t>(i)] =
        batch_loss(context, model, *pieces[static_cast<std::size_t>(i)], states, nullptr, 1.0);
  });
  double total = 0, count = 0;
  for (const double loss : losses) total += loss;
  for (const PackedBatch& batch : batches) count += static_cast<double>(batch.rows().size());
  require<ConfigError>(count > 0, "mean_loss: no token is scored");
  return total / count;
}

/// Has many divisors, so that threads of many numbers get as many shares each.
inline constexpr Index usual_shares = 12;

/// A step is cut into pieces (PackedBatch::pieces) and these into at most `max_shares` shares, each with gradients of
/// its own that are added up in order. Shares are computed side by side; where they begin and end follows from the data
/// alone. With one share a batch is computed whole.
template <class Model, class Ctx, class OptimizerType = AdamW<typename Model::Scalar>>
class Trainer {
 public:
  using Scalar = typename Model::Scalar;
  static_assert(Optimizer<OptimizerType, Scalar, Ctx>);

  Trainer(Ctx& ctx, Model& model, const CosineSchedule& schedule, const typename OptimizerType::Options& options = {},
          Index max_shares = usual_shares)
      : ctx_(ctx), model_(model), schedule_(schedule), grads_(model),
        optimizer_(static_cast<Index>(grads_.values().size()), options), workers_(ctx),
        places_(static_cast<std::size_t>(workers_.size())) {
    require<ConfigError>(!grads_.values().empty(), "the model has no trainable parameters");
    schedule_.check();
    optimizer_.options().check();
    require<ConfigError>(max_shares >= 1, "at least one share of a step, found ", max_shares);
    constexpr std::size_t room = std::size_t{256} << 20;  // for gradients of shares
    const auto fitting = static_cast<Index>(room / (grads_.values().size() * sizeof(Scalar)));
    max_shares_ = std::clamp<Index>(fitting, 1, max_shares);
  }

  /// One optimizer step over all given batches. Throws NumericError, leaving the weights as they were, where the loss
  /// or a gradient is not finite.
  StepResult step(std::span<const TrainingBatch<Model>> batches) {
    StepResult result;
    const double scored = collect_pieces(batches, result);
    const Index shares = cut_into_shares(result.tokens);
    while (static_cast<Index>(share_grads_.size()) < shares - 1) share_grads_.emplace_back(model_);
    losses_.assign(static_cast<std::size_t>(shares), 0);
    workers_.for_each(sizes_, [&](auto& ctx, Index place, Index share) {
      Gradients<Scalar>& grads = share == 0 ? grads_ : share_grads_[static_cast<std::size_t>(share - 1)];
      grads.set_zero();
      auto& [tape, scratch] = places_[static_cast<std::size_t>(place)];
      for (std::size_t i = ends_[static_cast<std::size_t>(share)]; i < ends_[static_cast<std::size_t>(share) + 1];
           ++i) {
        const auto& [batch, kept] = pieces_[i];
        scratch.filled = false;
        losses_[static_cast<std::size_t>(share)] +=
            batch_loss(ctx, model_, *batch, kept ? *kept : scratch, &tape, 1.0 / scored, grads);
      }
    });
    for (Index share = 1; share < shares; ++share) add_gradients(share_grads_[static_cast<std::size_t>(share - 1)]);
    for (const double loss : losses_) result.loss += loss / scored;
    double squares = 0;
    ctx_.backend.sum_of_squares(std::span<const Scalar>(grads_.values()), &squares);
    result.gradient_norm = std::sqrt(squares);
    check(result);
    ++step_;
    optimizer_.update(ctx_, grads_, result.gradient_norm, schedule_(step_), step_);
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
  static constexpr std::string_view optimizer_name = OptimizerType::name;
  OptimizerType& optimizer() { return optimizer_; }

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

  /// Fills pieces_ with those that have scored tokens, and result.tokens. Returns the number of scored tokens.
  double collect_pieces(std::span<const TrainingBatch<Model>> batches, StepResult& result) {
    pieces_.clear();
    std::size_t scored = 0;
    for (auto at = batches.begin(); at != batches.end(); ++at) {
      const PackedBatch* batch = at->batch;
      require<ConfigError>(batch != nullptr, "TrainingBatch ", at - batches.begin(), " of the step has no batch");
      // Shares are computed side by side, so the states of a batch that comes twice belong to its first time.
      const bool again = std::any_of(batches.begin(), at, [&](const auto& other) { return other.kept == at->kept; });
      KeptStates<Model>* kept = again ? nullptr : at->kept;
      scored += batch->rows().size();
      result.tokens += batch->tokens().tokens();
      const auto pieces = max_shares_ == 1 ? std::span(batch, 1) : batch->pieces();
      if (kept && pieces.size() > 1) kept->pieces.resize(pieces.size());
      for (std::size_t i = 0; i < pieces.size(); ++i)
        if (!pieces[i].empty()) pieces_.push_back({&pieces[i], kept && pieces.size() > 1 ? &kept->pieces[i] : kept});
    }
    require<ShapeError>(scored > 0, "a training step needs at least one scored token");
    return static_cast<double>(scored);
  }

  /// Cuts pieces_ into shares of about as many of the step's tokens each; returns their number.
  Index cut_into_shares(Index tokens) {
    const Index shares = std::min(max_shares_, static_cast<Index>(pieces_.size()));
    ends_.assign(1, 0);
    sizes_.assign(static_cast<std::size_t>(shares), 0);
    Index before = 0;
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      const Index size = pieces_[i].batch->tokens().tokens(), share = (2 * before + size) * shares / (2 * tokens);
      while (static_cast<Index>(ends_.size()) <= share) ends_.push_back(i);
      sizes_[static_cast<std::size_t>(share)] += size;
      before += size;
    }
    while (static_cast<Index>(ends_.size()) <= shares) ends_.push_back(pieces_.size());
    return shares;
  }

  void add_gradients(Gradients<Scalar>& from) {
    for (const Parameter<Scalar>* parameter : grads_.parameters())
      ctx_.backend.add(MatrixView<const Scalar>(from[*parameter]), grads_[*parameter]);
  }

  /// What one share needs at a time.
  struct Place {
    typename Model::Tape tape;
    KeptStates<Model> scratch;
  };

  Ctx& ctx_;
  Model& model_;
  CosineSchedule schedule_;
  Gradients<Scalar> grads_;  // of the first share, then of all
  OptimizerType optimizer_;
  Workers<Ctx> workers_;
  Index max_shares_;
  std::vector<Gradients<Scalar>> share_grads_;  // of the others
  std::vector<Place> places_;
  std::vector<TrainingBatch<Model>> pieces_;
  std::vector<std::size_t> ends_;  // [shares + 1] share s computes pieces [ends[s], ends[s + 1])
  std::vector<Index> sizes_;       // [shares] tokens
  std::vector<double> losses_;     // [shares]
  Index step_ = 0;
};

}  // namespace calm::inline CALM_ABI
