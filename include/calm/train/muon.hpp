// Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): the momentum of a matrix is brought to a
// matrix whose singular values all lie near 1 before it is taken as the step, so that rare directions are learned as
// fast as frequent ones. Vectors (norms, gates) and tables of tokens (embeddings, output heads) are updated by AdamW,
// whose second moment stays zero for the matrices.
#pragma once

#include <calm/train/optimizer.hpp>

#include <utility>

namespace calm::inline CALM_ABI {

struct MuonOptions {
  double momentum = 0.95;
  double weight_decay = 0.01;
  AdamWOptions others = {};  // of vectors and tables; clip_norm is that of all gradients

  /// Throws ConfigError where a number makes no sense.
  void check() const {
    others.check();
    check_option("MuonOptions", "momentum", momentum, 1);
    check_option("MuonOptions", "weight_decay", weight_decay, std::numeric_limits<double>::infinity());
  }
};

template <class S>
class Muon : public AdamW<S> {
 public:
  using Options = MuonOptions;
  static constexpr std::string_view name = "Muon";

  Muon(Index parameters, const MuonOptions& options) : AdamW<S>(parameters, options.others), muon_(options) {}

  /// One update of the parameters from their gradients, which have the given norm; `step` counts from 1. Its memory
  /// comes from the arena, which it resets.
  void update(auto& ctx, Gradients<S>& grads, double norm, double learning_rate, Index step) {
    const double scale = this->clipping_scale(norm);
    for (Parameter<S>* parameter : grads.parameters()) {
      if (parameter->decay && !parameter->table) update_matrix(ctx, *parameter, grads, scale, learning_rate);
      else this->update_parameter(ctx, *parameter, grads, scale, learning_rate, step);
    }
  }

  const MuonOptions& options() const { return muon_; }

 private:
  using View = MatrixView<S>;
  using ConstView = MatrixView<const S>;

  /// w = (1 - rate decay) w - rate 0.2 sqrt(max(rows, cols)) O, O from Nesterov's momentum. The factor gives the step
  /// the size of one of AdamW, so that both take the same rates (Liu et al., arXiv 2502.16982, section 2.2).
  void update_matrix(auto& ctx, Parameter<S>& parameter, Gradients<S>& grads, double scale, double learning_rate) {
    ctx.arena.reset();
    const View weight = parameter.value.view(), gradient = grads[parameter];
    const View momentum(this->first_moment().data() + parameter.offset, weight.rows, weight.cols);
    const View clipped = ctx.arena.template matrix<S>(weight.rows, weight.cols);
    const View ahead = ctx.arena.template matrix<S>(weight.rows, weight.cols);
    ctx.backend.scale(ConstView(gradient), scale, clipped);
    ctx.backend.scale(ConstView(momentum), muon_.momentum, momentum);
    ctx.backend.add(ConstView(clipped), momentum);
    ctx.backend.scale(ConstView(momentum), muon_.momentum, ahead);
    ctx.backend.add(ConstView(clipped), ahead);
    const View direction = orthogonalise(ctx, ahead, clipped);
    const double size = 0.2 * std::sqrt(static_cast<double>(std::max(weight.rows, weight.cols)));
    ctx.backend.scale(ConstView(direction), -learning_rate * size, direction);
    ctx.backend.scale(ConstView(weight), 1 - learning_rate * muon_.weight_decay, weight);
    ctx.backend.add(ConstView(direction), weight);
  }

  /// For x = U S V^T about U V^T, in x or `room`, by five Newton-Schulz steps x <- a x + (b G + c G^2) x with G = x
  /// x^T; with G = x^T x on the other side where that is smaller. Singular values end between 0.7 and 1.2.
  View orthogonalise(auto& ctx, View x, View room) const {
    constexpr double a = 3.4445, b = -4.7750, c = 2.0315;
    const bool wide = x.rows <= x.cols;
    const Index n = std::min(x.rows, x.cols);
    const View gram = ctx.arena.template matrix<S>(n, n), scaled = ctx.arena.template matrix<S>(n, n);
    const View polynomial = ctx.arena.template matrix<S>(n, n);
    double squares = 0;
    ctx.backend.sum_of_squares(flat(ConstView(x)), &squares);
    ctx.backend.scale(ConstView(x), 1 / (std::sqrt(squares) + 1e-12), x);
    for (int i = 0; i < 5; ++i) {
      if (wide) {
        ctx.backend.multiply(ConstView(x), ConstView(x), gram, Assign{});
      } else {
        ctx.backend.set_zero(gram);
        ctx.backend.multiply_weight_gradient(ConstView(x), ConstView(x), gram);
      }
      ctx.backend.scale(ConstView(gram), c, scaled);
      ctx.backend.scale(ConstView(gram), b, polynomial);
      ctx.backend.multiply(ConstView(gram), ConstView(scaled), polynomial, Accumulate{});
      ctx.backend.scale(ConstView(x), a, room);
      if (wide) ctx.backend.multiply_input_gradient(ConstView(x), ConstView(polynomial), room, Accumulate{});
      else ctx.backend.multiply(ConstView(polynomial), ConstView(x), room, Accumulate{});
      std::swap(x, room);
    }
    return x;
  }

  MuonOptions muon_;
};

}  // namespace calm::inline CALM_ABI
