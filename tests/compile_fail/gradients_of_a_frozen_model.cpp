// expect: constraints not satisfied
// expect: trainable
#include <calm/compose.hpp>

#ifdef CALM_CORRECTED
using Model = calm::Transformer<calm::zoo::Llama, calm::Trainable>;
#else
using Model = calm::Transformer<calm::zoo::Llama, calm::Frozen>;
#endif

void f(const Model& model, calm::Context<calm::CpuBackend>& ctx, const calm::TokenBatch& batch,
       const Model::States& states, const Model::Tape& tape, calm::Gradients<float>& grads) {
  model.backward(ctx, batch, states, tape, {}, grads);
}
