// GateModel: the rival without bridges. Both models run beside each other, and a small trained network on their final
// states mixes their logits token by token: logits = g logits_A + (1 - g) logits_B, g = sigmoid(v silu(W [x_A, x_B])).
//
// It is a LanguageModel of calm, so the library's training and generation take it as they take a composed model.
#pragma once

#include <calm/backend/cpu.hpp>
#include <calm/model/decoder.hpp>
#include <calm/nn/activation.hpp>
#include <calm/nn/linear.hpp>
#include <calm/nn/norm.hpp>
#include <calm/tensor/buffer.hpp>

#include <memory>

namespace key_value {

template <class ModelA, class ModelB>
class GateModel {
 public:
  using Scalar = typename ModelB::Scalar;
  using View = calm::MatrixView<Scalar>;
  using ConstView = calm::MatrixView<const Scalar>;
  static constexpr bool trainable = true;

  /// The final streams of both models beside each other; they are frozen, so they may be kept.
  struct States {
    calm::Buffer<Scalar> stream;
    std::size_t bytes() const { return stream.bytes(); }
  };
  struct Tape {};
  struct HeadCache {
    View a, b, normed, hidden, active, gate, logits_a, logits_b;
  };
  struct Session {
    typename ModelA::Session a;
    typename ModelB::Session b;
    calm::Index length(calm::Index slot) const { return b.length(slot); }
    void clear(calm::Index slot) { a.clear(slot), b.clear(slot); }
    void check_room(const calm::TokenBatch& batch) const { a.check_room(batch), b.check_room(batch); }
  };

  GateModel(std::shared_ptr<const ModelA> a, std::shared_ptr<const ModelB> b, calm::Index hidden, std::uint64_t seed)
      : a_(std::move(a)), b_(std::move(b)), spec_(b_->spec()), norm_(a_->spec().width + spec_.width, 1e-6),
        hidden_(calm::random_linear<Scalar>(hidden, a_->spec().width + spec_.width, seed, "gate.hidden")),
        gate_(calm::Matrix<Scalar>(1, hidden)) {}

  const calm::ModelSpec& spec() const { return spec_; }

  void prepare(auto& ctx, const calm::TokenBatch& batch, States& states) const {
    typename ModelA::States states_a;
    typename ModelB::States states_b;
    join(ctx, a_->forward(ctx, batch, states_a, nullptr), b_->forward(ctx, batch, states_b, nullptr),
         states.stream.resize(batch.final_rows(), width()));
  }

  View forward(auto& ctx, const calm::TokenBatch&, const States& states, Tape*) const {
    const ConstView kept = states.stream.view();
    const View x = ctx.arena.template matrix<Scalar>(kept.rows, kept.cols);
    ctx.backend.scale(kept, 1, x);
    return x;
  }
  void backward(auto&, const calm::TokenBatch&, const States&, const Tape&, View, calm::Gradients<Scalar>&) const {}

  void head(auto& ctx, ConstView rows, View logits, HeadCache& cache) const {
    const auto matrix = [&](calm::Index cols) { return ctx.arena.template matrix<Scalar>(rows.rows, cols); };
    cache = {matrix(a_->spec().width), matrix(spec_.width), matrix(width()),          matrix(hidden_.out()),
             matrix(hidden_.out()),    matrix(1),           matrix(spec_.vocabulary), matrix(spec_.vocabulary)};
    ctx.backend.scale(rows.middle_cols(0, cache.a.cols), 1, cache.a);
    ctx.backend.scale(rows.middle_cols(cache.a.cols, cache.b.cols), 1, cache.b);
    typename calm::RmsNorm<calm::Frozen, Scalar>::Cache norm;
    norm_.forward(ctx, rows, cache.normed, norm);
    hidden_.forward(ctx, ConstView(cache.normed), cache.hidden, calm::Assign{});
    ctx.backend.template activation<calm::Silu>(ConstView(cache.hidden), cache.active);
    gate_.forward(ctx, ConstView(cache.active), cache.gate, calm::Assign{});
    typename ModelA::HeadCache head_a;
    typename ModelB::HeadCache head_b;
    a_->head(ctx, ConstView(cache.a), cache.logits_a, head_a);
    b_->head(ctx, ConstView(cache.b), cache.logits_b, head_b);
    for (calm::Index t = 0; t < rows.rows; ++t) {
      Scalar& g = cache.gate(t, 0);
      g = 1 / (1 + std::exp(-g));
      for (calm::Index v = 0; v < spec_.vocabulary; ++v)
        logits(t, v) = g * cache.logits_a(t, v) + (1 - g) * cache.logits_b(t, v);
    }
  }

  void head_backward(auto& ctx, ConstView, ConstView, View drows, const HeadCache&) const {
    ctx.backend.set_zero(drows);  // both models are frozen
  }
  void head_backward(auto& ctx, ConstView rows, ConstView dlogits, View drows, const HeadCache& cache,
                     calm::Gradients<Scalar>& grads) const {
    const View dgate = ctx.arena.template matrix<Scalar>(rows.rows, 1),
               dactive = ctx.arena.template matrix<Scalar>(rows.rows, hidden_.out());
    for (calm::Index t = 0; t < rows.rows; ++t) {
      Scalar along = 0;
      for (calm::Index v = 0; v < spec_.vocabulary; ++v)
        along += dlogits(t, v) * (cache.logits_a(t, v) - cache.logits_b(t, v));
      dgate(t, 0) = along * cache.gate(t, 0) * (1 - cache.gate(t, 0));
    }
    gate_.backward(ctx, ConstView(cache.active), ConstView(dgate), dactive, calm::Assign{}, grads);
    ctx.backend.template activation_backward<calm::Silu>(ConstView(dactive), ConstView(cache.hidden), dactive);
    hidden_.backward(ctx, ConstView(cache.normed), ConstView(dactive), View{}, calm::Assign{}, grads);
    ctx.backend.set_zero(drows);
  }

  Session make_session(auto& ctx, calm::Index slots, calm::Index capacity,
                       const calm::SessionOptions& options = {}) const {
    return {a_->make_session(ctx, slots, capacity, options), b_->make_session(ctx, slots, capacity, options)};
  }

  bool fits(const Session* session, calm::Index slot, std::span<const calm::TokenId> ids, calm::Index prompt_length,
            calm::Index more, const calm::SessionOptions& options = {}) const {
    return a_->fits(session ? &session->a : nullptr, slot, ids, prompt_length, more, options) &&
           b_->fits(session ? &session->b : nullptr, slot, ids, prompt_length, more, options);
  }

  View advance(auto& ctx, Session& session, const calm::TokenBatch& batch, auto&& observer) const {
    const View x = ctx.arena.template matrix<Scalar>(batch.final_rows(), width());
    join(ctx, a_->advance(ctx, session.a, batch, observer), b_->advance(ctx, session.b, batch, observer), x);
    return x;
  }

  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    calm::Linear<calm::Trainable, Scalar>::visit(self.hidden_, prefix + "gate.hidden", fn);
    calm::Linear<calm::Trainable, Scalar>::visit(self.gate_, prefix + "gate.out", fn);
  }

 private:
  calm::Index width() const { return a_->spec().width + spec_.width; }

  static void join(auto& ctx, View a, View b, View both) {
    ctx.backend.scale(ConstView(a), 1, both.middle_cols(0, a.cols));
    ctx.backend.scale(ConstView(b), 1, both.middle_cols(a.cols, b.cols));
  }

  std::shared_ptr<const ModelA> a_;
  std::shared_ptr<const ModelB> b_;
  calm::ModelSpec spec_;
  calm::RmsNorm<calm::Frozen, Scalar> norm_;
  calm::Linear<calm::Trainable, Scalar> hidden_, gate_;
};

}  // namespace key_value
