// A specialist in training whose tokens are the anchor's. Its table of tokens is the anchor's own, turned onto its main
// axes and fixed: what the specialist says is then said in the anchor's space, and the 49,152 rows need no optimizer.
// While it learns, its head knows candidates alone: the tokens that answers are made of and some others (a sampled
// softmax with fixed samples; Jean et al., arXiv 1412.2007). Without that the head would be most of the work.
#pragma once

#include <calm/backend/cpu.hpp>
#include <calm/model/random_weights.hpp>
#include <calm/model/transformer.hpp>
#include <calm/model/zoo/llama.hpp>
#include <calm/train/dataset.hpp>

#include <Eigen/Eigenvalues>
#include <map>

namespace knowledge {

using calm::Index;

inline const std::string embedding_name = "model.embed_tokens.weight";

/// Blocks are trained; norms and the table of tokens stay as they are.
struct TrainedBlocks {
  static constexpr bool trainable = true;
  using Linear = calm::Trainable;
  using Other = calm::Frozen;
};

/// Rows [vocabulary, width] of a table on its `width` main axes, each of them with the same deviation.
inline calm::Matrix<float> on_main_axes(const calm::StoredMatrix& table, Index width, double deviation) {
  using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const calm::Matrix<float> dense = table.dense<float>();
  const Eigen::Map<const Rows> x(dense.data(), dense.rows(), dense.cols());
  const Eigen::RowVectorXf mean = x.colwise().mean();
  const Rows centered = x.rowwise() - mean;
  const Eigen::MatrixXd covariance = (centered.transpose() * centered).cast<double>() / static_cast<double>(x.rows());
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> axes(covariance);  // ascending
  const Eigen::MatrixXd scaled = axes.eigenvectors().rightCols(width) *
                                 axes.eigenvalues().tail(width).cwiseSqrt().cwiseInverse().asDiagonal() * deviation;
  calm::Matrix<float> result(dense.rows(), width);
  Eigen::Map<Rows>(result.data(), result.rows(), width) = centered * scaled.cast<float>();
  return result;
}

/// A LanguageModel of calm, so that the library's trainer takes it: a Transformer under a head of candidates.
class Student {
 public:
  using Model = calm::Transformer<calm::zoo::Llama, TrainedBlocks>;
  using Scalar = float;
  using View = calm::MatrixView<float>;
  using ConstView = calm::MatrixView<const float>;
  using States = Model::States;
  using Tape = Model::Tape;
  using Norm = calm::RmsNorm<calm::Frozen, float>;
  struct HeadCache {
    View normed;
    Norm::Cache norm;
  };
  static constexpr bool trainable = true;

  Student(Model model, const std::vector<calm::TokenId>& candidates)
      : model_(std::move(model)), spec_(model_.spec()), norm_(spec_.width, spec_.norm_epsilon),
        map_("candidates", static_cast<Index>(candidates.size()), spec_.width,
             [&](const std::string&, Index rows, Index cols) {
               const calm::StoredMatrix table =
                   calm::weights_of(model_)(embedding_name, model_.spec().vocabulary, cols);
               calm::Matrix<float> chosen(rows, cols);
               for (std::size_t i = 0; i < candidates.size(); ++i)
                 table.read_rows(candidates[i], 1, &chosen(static_cast<Index>(i), 0));
               return calm::StoredMatrix::from(chosen);
             }) {
    for (const calm::TokenId id : candidates) number_.emplace(id, static_cast<calm::TokenId>(number_.size()));
    spec_.vocabulary = map_.out();
  }

  const calm::ModelSpec& spec() const { return spec_; }
  const Model& model() const { return model_; }

  /// The example with its targets as numbers of candidates; other tokens do not count.
  calm::Example with_candidates(calm::Example example) const {
    if (example.targets.empty()) example.targets = example.completion;
    if (example.scored.empty()) example.scored.assign(example.completion.size(), true);
    for (std::size_t i = 0; i < example.completion.size(); ++i) {
      const auto found = number_.find(example.targets[i]);
      if (found == number_.end()) example.scored[i] = false;
      example.targets[i] = found == number_.end() ? 0 : found->second;
    }
    return example;
  }

  void prepare(auto& ctx, const calm::TokenBatch& batch, States& states) const { model_.prepare(ctx, batch, states); }
  View forward(auto& ctx, const calm::TokenBatch& batch, const States& states, Tape* tape) const {
    return model_.forward(ctx, batch, states, tape);
  }
  void backward(auto& ctx, const calm::TokenBatch& batch, const States& states, const Tape& tape, View dx,
                calm::Gradients<float>& grads) const {
    model_.backward(ctx, batch, states, tape, dx, grads);
  }
  void head(auto& ctx, ConstView rows, View logits, HeadCache& cache) const {
    cache.normed = ctx.arena.template matrix<float>(rows.rows, rows.cols);
    norm_.forward(ctx, rows, cache.normed, cache.norm);
    map_.forward(ctx, ConstView(cache.normed), logits, calm::Assign{});
  }
  template <class... Grads>
  void head_backward(auto& ctx, ConstView rows, ConstView dlogits, View drows, const HeadCache& cache,
                     Grads&...) const {
    const View dnormed = ctx.arena.template matrix<float>(rows.rows, rows.cols);
    map_.backward(ctx, ConstView(cache.normed), dlogits, dnormed, calm::Assign{});
    norm_.backward(ctx, rows, ConstView(dnormed), drows, calm::Assign{}, cache.norm);
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) { Model::visit(self.model_, prefix, fn); }

 private:
  Model model_;
  calm::ModelSpec spec_;
  Norm norm_;
  calm::Linear<calm::Frozen, float> map_;
  std::map<calm::TokenId, calm::TokenId> number_;
};

}  // namespace knowledge
