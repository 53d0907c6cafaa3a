// expect: no matching
// expect: backward
#include <calm/compose.hpp>

#ifdef CALM_CORRECTED
using Linear = calm::Linear<calm::Trainable, float>;
#else
using Linear = calm::Linear<calm::Frozen, float>;
#endif

void f(const Linear& linear, calm::Context<calm::CpuBackend>& ctx, calm::MatrixView<const float> x,
       calm::MatrixView<const float> dy, calm::MatrixView<float> dx, calm::Gradients<float>& grads) {
  linear.backward(ctx, x, dy, dx, calm::Assign{}, grads);
}
