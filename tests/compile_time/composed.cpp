// One composed model, trained for a step and decoded for a token: what a program that composes asks of the compiler.
#include <calm/compose.hpp>

using Model = calm::Transformer<calm::zoo::Llama>;
using Composed = calm::ComposedModel<Model, Model>;
using Context = calm::Context<calm::CpuBackend>;

void step(const Composed& model, Context& ctx, const calm::TokenBatch& batch, Composed::States& states,
          calm::Gradients<float>& grads) {
  Composed::Tape tape;
  model.prepare(ctx, batch, states);
  const auto stream = model.forward(ctx, batch, states, &tape);
  model.backward(ctx, batch, states, tape, stream, grads);
}

calm::MatrixView<float> decode(const Composed& model, Context& ctx, Composed::Session& session,
                               const calm::TokenBatch& batch) {
  return model.advance(ctx, session, batch, calm::NullObserver{});
}
