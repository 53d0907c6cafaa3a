// Embedding: y[t] = table[ids[t]], and the same table as the output map where a model ties the two.
//
// Contract: forward writes y; backward adds dy to the table's gradient; project and project_backward are the tied
// output map, with the contract of Linear. Ids outside the table are a ShapeError that names the position.
#pragma once

#include <calm/nn/linear.hpp>

namespace calm::inline CALM_ABI {

/// Throws ShapeError, which names the position, for an id outside the vocabulary.
inline void check_ids(std::span<const TokenId> ids, Index vocabulary) {
  for (std::size_t t = 0; t < ids.size(); ++t)
    require<ShapeError>(ids[t] >= 0 && ids[t] < vocabulary, "token ", t, " is ", ids[t],
                        ", which is outside the vocabulary of ", vocabulary);
}

template <class Weights, class Scalar>
class Embedding {
 public:
  static constexpr bool trainable = Weights::trainable;

  Embedding(const std::string& name, Index vocabulary, Index width, WeightSource auto&& source)
      : table_(name, vocabulary, width, source) {
    if constexpr (trainable) table_.mark_as_table();
  }

  [[gnu::cold]] void forward(auto& ctx, std::span<const TokenId> ids, MatrixView<Scalar> y) const {
    check_ids(ids, table_.out());
    if constexpr (trainable) ctx.backend.gather(table_.weight().value.view(), ids, y);
    else ctx.backend.gather(table_.weight(), ids, y);
  }

  [[gnu::cold]] void backward(auto& ctx, std::span<const TokenId> ids, MatrixView<const Scalar> dy,
                              Gradients<Scalar>& grads) const requires trainable {
    ctx.backend.scatter_add(ids, dy, grads[table_.weight()]);
  }

  /// The table as a linear map [T, D] -> [T, vocabulary].
  const Linear<Weights, Scalar>& as_linear() const { return table_; }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    Linear<Weights, Scalar>::visit(self.table_, prefix, fn);
  }

 private:
  Linear<Weights, Scalar> table_;
};

}  // namespace calm::inline CALM_ABI
