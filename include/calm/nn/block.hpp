// TransformerBlock: what attention and an MLP add to the residual stream, each behind and before the norms that the
// architecture names (architecture.hpp); one after the other, or both from the same stream.
//
// Contract: forward reads x and writes y (another buffer), all rows or those of the plan, and the cache; without one
// nothing is kept for a gradient. backward gives the gradient of x for that of y, in place where y has all rows, and
// adds to grads.
#pragma once

#include <calm/nn/attention.hpp>
#include <calm/nn/mlp.hpp>
#include <calm/nn/norm.hpp>

#include <algorithm>
#include <type_traits>

namespace calm::inline CALM_ABI {

/// Stands where an architecture has no norm.
struct NoNorm {
  static constexpr bool trainable = false;
  struct Cache {};
  NoNorm(const std::string&, Index, double, auto&&) {}
  static void visit(auto&, const std::string&, auto&&) {}
};

template <class Architecture, class Weights, class Scalar>
class TransformerBlock {
 public:
  static constexpr bool trainable = Weights::trainable;
  static constexpr BlockNorms norms = Architecture::norms;
  using View = MatrixView<Scalar>;
  using ConstView = MatrixView<const Scalar>;
  using Norm = typename Architecture::template Norm<typename Weights::Other, Scalar>;
  using Attention = SelfAttention<Architecture, typename Weights::Linear, Scalar>;
  using Mlp = typename Architecture::template Mlp<typename Weights::Linear, Scalar>;
  template <bool Present>
  using OptionalNorm = std::conditional_t<Present, Norm, NoNorm>;

  /// What backward needs of the norms around attention or the MLP.
  template <class Before, class After>
  struct BranchCache {
    ConstView input;
    View normed, output;  // [T, D]; output: before the norm behind it
    typename Before::Cache before;
    typename After::Cache after;
  };

  using BeforeAttention = OptionalNorm<!norms.before_attention.empty()>;
  using AfterAttention = OptionalNorm<!norms.after_attention.empty()>;
  using BeforeMlp = OptionalNorm<!norms.before_mlp.empty()>;
  using AfterMlp = OptionalNorm<!norms.after_mlp.empty()>;

  struct Cache {
    View middle;
    BranchCache<BeforeAttention, AfterAttention> attention_norms;
    BranchCache<BeforeMlp, AfterMlp> mlp_norms;
    typename Attention::Cache attention;
    typename Mlp::Cache mlp;
  };

  TransformerBlock(const std::string& name, const BlockSizes& sizes, WeightSource auto&& source)
      : before_attention_(full_name(name, norms.before_attention), sizes.width, sizes.norm_epsilon, source),
        attention_(name + ".self_attn", sizes, source),
        after_attention_(full_name(name, norms.after_attention), sizes.width, sizes.norm_epsilon, source),
        before_mlp_(full_name(name, norms.before_mlp), sizes.width, sizes.norm_epsilon, source),
        mlp_(name + ".mlp", sizes.width, sizes.hidden, source),
        after_mlp_(full_name(name, norms.after_mlp), sizes.width, sizes.norm_epsilon, source) {}

  [[gnu::cold]] void forward(auto& ctx, const AttentionPlan<Scalar>& plan, ConstView x, View y, Cache& cache) const {
    attend_and_run(ctx, plan, x, y, cache, true);
  }
  [[gnu::cold]] void forward(auto& ctx, const AttentionPlan<Scalar>& plan, ConstView x, View y) const {
    Cache cache;
    attend_and_run(ctx, plan, x, y, cache, false);
  }

  /// The same for new tokens, whose keys and values are appended to `rows`.
  [[gnu::cold]] void forward_cached(auto& ctx, const AttentionPlan<Scalar>& plan, const KvRows<Scalar>& rows,
                                    ConstView x, View y) const {
    Cache cache;
    run(ctx, plan, x, y, cache, false,
        [&](ConstView in, View out, auto mode) { attention_.forward_cached(ctx, plan, rows, in, out, mode); });
  }

  template <class... Grads>
  [[gnu::cold]] View backward(auto& ctx, const AttentionPlan<Scalar>& plan, View d, const Cache& cache,
                              Grads&... grads) const requires(sizeof...(Grads) == 0 || trainable) {
    const View dx = plan.rows.empty() ? d : ctx.arena.template matrix<Scalar>(cache.attention_norms.input.rows, d.cols);
    const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
    View dy = d;  // of what each branch adds: the gradient of the stream behind it
    if constexpr (Architecture::parallel) {
      dy = ctx.arena.template matrix<Scalar>(d.rows, d.cols);
      ctx.backend.scale(ConstView(d), 1, dy);
    }
    branch_backward(
        ctx, before_mlp_, after_mlp_, cache.mlp_norms, dy, d,
        [&](ConstView in, ConstView dout, View din) { mlp_.backward(ctx, in, dout, din, cache.mlp, grads...); },
        grads...);
    if (!plan.rows.empty()) going_on_backward(ctx, plan, ConstView(d), dx);
    branch_backward(
        ctx, before_attention_, after_attention_, cache.attention_norms, dy, dx,
        [&](ConstView in, ConstView dout, View din) {
          attention_.backward(ctx, plan, in, dout, din, cache.attention, grads...);
        },
        grads...);
    return dx;
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    BeforeAttention::visit(self.before_attention_, full_name(prefix, norms.before_attention), fn);
    Attention::visit(self.attention_, prefix + ".self_attn", fn);
    AfterAttention::visit(self.after_attention_, full_name(prefix, norms.after_attention), fn);
    BeforeMlp::visit(self.before_mlp_, full_name(prefix, norms.before_mlp), fn);
    Mlp::visit(self.mlp_, prefix + ".mlp", fn);
    AfterMlp::visit(self.after_mlp_, full_name(prefix, norms.after_mlp), fn);
  }

 private:
  static std::string full_name(const std::string& block, std::string_view norm) {
    return block + "." + std::string(norm);
  }

  [[gnu::cold]] void attend_and_run(auto& ctx, const AttentionPlan<Scalar>& plan, ConstView x, View y, Cache& cache,
                                    bool keeps) const {
    run(ctx, plan, x, y, cache, keeps,
        [&](ConstView in, View out, auto mode) { attention_.forward(ctx, plan, in, out, cache.attention, mode); });
  }

  template <class Attend>
  [[gnu::cold]] void run(auto& ctx, const AttentionPlan<Scalar>& plan, ConstView x, View y, Cache& cache, bool keeps,
                         const Attend& attend_to) const {
    const auto run_mlp = [&](ConstView in, View out, auto mode) {
      if (keeps) return mlp_.forward(ctx, in, out, cache.mlp, mode);
      const Index step = rows_at_a_time(in.rows);
      for (Index t = 0; t < in.rows; t += step) {
        const typename std::decay_t<decltype(ctx.arena)>::Mark mark(ctx.arena);
        const Index count = std::min(step, in.rows - t);
        mlp_.forward(ctx, in.middle_rows(t, count), out.middle_rows(t, count), cache.mlp, mode);
      }
    };
    const bool in_place = Architecture::parallel || !keeps;  // the MLP's input need not outlive it
    cache.middle = in_place ? y : ctx.arena.template matrix<Scalar>(y.rows, y.cols);
    const ConstView stream = going_on(ctx, plan, x);
    ctx.backend.scale(stream, 1, cache.middle);
    branch(ctx, before_attention_, after_attention_, x, cache.middle, cache.attention_norms, attend_to);
    if (!in_place) ctx.backend.scale(ConstView(cache.middle), 1, y);
    branch(ctx, before_mlp_, after_mlp_, Architecture::parallel ? stream : ConstView(cache.middle), y, cache.mlp_norms,
           run_mlp);
  }

  /// Rows that the MLP takes at a time where nothing is kept: some, if what it makes of them stays in a core's second
  /// cache beside the weights; else all.
  Index rows_at_a_time(Index rows) const {
    constexpr Index some = 64, near = 384 * 1024 / static_cast<Index>(sizeof(Scalar));
    return some * mlp_.values_of_row() <= near ? some : rows;
  }

  /// total += after(module(before(input)))
  template <class Before, class After, class Module>
  [[gnu::cold]] static void branch(auto& ctx, const Before& before, const After& after, ConstView input, View total,
                                   BranchCache<Before, After>& cache, const Module& module) {
    const auto like = [&](ConstView m) { return ctx.arena.template matrix<Scalar>(m.rows, m.cols); };
    cache.input = input;
    ConstView inner = input;
    if constexpr (!std::is_same_v<Before, NoNorm>) {
      cache.normed = like(input);
      before.forward(ctx, input, cache.normed, cache.before);
      inner = cache.normed;
    }
    if constexpr (std::is_same_v<After, NoNorm>) {
      module(inner, total, Accumulate{});
    } else {
      cache.output = like(total);
      module(inner, cache.output, Assign{});
      const View normed = like(total);
      after.forward(ctx, ConstView(cache.output), normed, cache.after);
      ctx.backend.add(ConstView(normed), total);
    }
  }

  /// dx += the gradient through one branch, from that of what it adds; dy may be dx.
  template <class Before, class After, class Module, class... Grads>
  [[gnu::cold]] static void branch_backward(auto& ctx, const Before& before, const After& after,
                                            const BranchCache<Before, After>& cache, ConstView dy, View dx,
                                            const Module& module, Grads&... grads) {
    const View dinner = ctx.arena.template matrix<Scalar>(dx.rows, dx.cols);
    const auto through = [&](const auto& norm, ConstView input, ConstView dout, View din, auto mode, const auto& kept) {
      backward_through(
          norm, [&](const auto& m, auto&... g) { m.backward(ctx, input, dout, din, mode, kept, g...); }, grads...);
    };
    ConstView doutput = dy;
    if constexpr (!std::is_same_v<After, NoNorm>) {
      const View d = ctx.arena.template matrix<Scalar>(dy.rows, dy.cols);
      through(after, ConstView(cache.output), dy, d, Assign{}, cache.after);
      doutput = d;
    }
    module(std::is_same_v<Before, NoNorm> ? cache.input : ConstView(cache.normed), doutput, dinner);
    if constexpr (std::is_same_v<Before, NoNorm>) ctx.backend.add(ConstView(dinner), dx);
    else through(before, cache.input, ConstView(dinner), dx, Accumulate{}, cache.before);
  }

  BeforeAttention before_attention_;
  Attention attention_;
  AfterAttention after_attention_;
  BeforeMlp before_mlp_;
  Mlp mlp_;
  AfterMlp after_mlp_;
};

}  // namespace calm::inline CALM_ABI
