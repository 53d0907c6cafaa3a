// TransformerBlock: the pre-norm layer, x + attention(norm(x)), then + mlp(norm(that)).
//
// An architecture names its parts: `template <class Weights, class Scalar> using Norm / Mlp`. Contract: forward reads x
// and writes y (another buffer); backward turns the gradient of y into that of x, in place, and adds to grads.
#pragma once

#include <calm/nn/attention.hpp>
#include <calm/nn/mlp.hpp>
#include <calm/nn/norm.hpp>

namespace calm::inline CALM_ABI {

/// The sizes of one block.
struct BlockSizes {
  Index width = 0, hidden = 0;
  HeadShape heads;
  double norm_epsilon = 1e-5;
};

template <class Architecture, class Weights, class Scalar>
class TransformerBlock {
 public:
  static constexpr bool trainable = Weights::trainable;
  using Norm = typename Architecture::template Norm<typename Weights::Other, Scalar>;
  using Attention = SelfAttention<typename Weights::Linear, Scalar>;
  using Mlp = typename Architecture::template Mlp<typename Weights::Linear, Scalar>;

  struct Cache {
    MatrixView<const Scalar> x;
    MatrixView<Scalar> normed, middle, normed_middle;  // [T, D]
    typename Norm::Cache norm, norm_middle;
    typename Attention::Cache attention;
    typename Mlp::Cache mlp;
  };

  TransformerBlock(const std::string& name, const BlockSizes& sizes, WeightSource auto&& source)
      : input_norm_(name + ".input_layernorm", sizes.width, sizes.norm_epsilon, source),
        attention_(name + ".self_attn", sizes.width, sizes.heads, source),
        mlp_norm_(name + ".post_attention_layernorm", sizes.width, sizes.norm_epsilon, source),
        mlp_(name + ".mlp", sizes.width, sizes.hidden, source) {}

  void forward(auto& ctx, const AttentionPlan<Scalar>& plan, MatrixView<const Scalar> x, MatrixView<Scalar> y,
               Cache& cache) const {
    run(ctx, x, y, cache, [&](MatrixView<const Scalar> normed, MatrixView<Scalar> middle) {
      attention_.forward(ctx, plan, normed, middle, cache.attention);
    });
  }

  /// The same for new tokens, whose keys and values are appended to `rows`.
  void forward_cached(auto& ctx, const AttentionPlan<Scalar>& plan, const KvRows<Scalar>& rows,
                      MatrixView<const Scalar> x, MatrixView<Scalar> y) const {
    Cache cache;
    run(ctx, x, y, cache, [&](MatrixView<const Scalar> normed, MatrixView<Scalar> middle) {
      attention_.forward_cached(ctx, plan, rows, normed, middle);
    });
  }

  template <class... Grads>
  void backward(auto& ctx, const AttentionPlan<Scalar>& plan, MatrixView<Scalar> dx, const Cache& cache,
                Grads&... grads) const requires(sizeof...(Grads) == 0 || trainable) {
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    const auto dnormed = ctx.arena.template matrix<Scalar>(dx.rows, dx.cols);
    const auto through_norm = [&](const Norm& norm, MatrixView<const Scalar> input, const typename Norm::Cache& kept) {
      backward_through(
          norm,
          [&](const Norm& module, auto&... g) {
            module.backward(ctx, input, MatrixView<const Scalar>(dnormed), dx, Accumulate{}, kept, g...);
          },
          grads...);
    };
    mlp_.backward(ctx, MatrixView<const Scalar>(cache.normed_middle), MatrixView<const Scalar>(dx), dnormed, cache.mlp,
                  grads...);
    through_norm(mlp_norm_, cache.middle, cache.norm_middle);
    attention_.backward(ctx, plan, MatrixView<const Scalar>(cache.normed), MatrixView<const Scalar>(dx), dnormed,
                        cache.attention, grads...);
    through_norm(input_norm_, cache.x, cache.norm);
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    Norm::visit(self.input_norm_, prefix + ".input_layernorm", fn);
    Attention::visit(self.attention_, prefix + ".self_attn", fn);
    Norm::visit(self.mlp_norm_, prefix + ".post_attention_layernorm", fn);
    Mlp::visit(self.mlp_, prefix + ".mlp", fn);
  }

 private:
  template <class Attend>
  void run(auto& ctx, MatrixView<const Scalar> x, MatrixView<Scalar> y, Cache& cache, const Attend& attend_to) const {
    const auto like_x = [&] { return ctx.arena.template matrix<Scalar>(x.rows, x.cols); };
    cache.x = x;
    cache.normed = like_x();
    cache.middle = like_x();
    cache.normed_middle = like_x();
    input_norm_.forward(ctx, x, cache.normed, cache.norm);
    ctx.backend.scale(x, 1, cache.middle);
    attend_to(MatrixView<const Scalar>(cache.normed), cache.middle);
    mlp_norm_.forward(ctx, MatrixView<const Scalar>(cache.middle), cache.normed_middle, cache.norm_middle);
    ctx.backend.scale(MatrixView<const Scalar>(cache.middle), 1, y);
    mlp_.forward(ctx, MatrixView<const Scalar>(cache.normed_middle), y, cache.mlp);
  }

  Norm input_norm_;
  Attention attention_;
  Norm mlp_norm_;
  Mlp mlp_;
};

}  // namespace calm::inline CALM_ABI
