// A CrossAttentionBridge alone: what an anchor's positions read from an augment's, under an alignment. A fresh bridge
// adds exactly nothing; the paper's preset adds something at once.
#include <calm/calm.hpp>

#include <cmath>
#include <iostream>

namespace {

calm::Matrix<float> random_stream(calm::Index rows, calm::Index cols, std::uint64_t seed) {
  calm::Matrix<float> m(rows, cols);
  calm::Random random(seed);
  for (float& x : m.values()) x = static_cast<float>(random.normal());
  return m;
}

}  // namespace

int main() {
  const auto augment = random_stream(5, 24, 1), anchor = random_stream(4, 32, 2);  // [Ta, D_A], [Tb, D_B]
  const std::vector<calm::Index> anchor_offsets{0, 4}, augment_offsets{0, 5};
  const std::vector<calm::VisibleRange> visible{{0, 0}, {0, 2}, {0, 3}, {0, 5}};  // what each anchor position may see
  const calm::BridgePlan<float> plan{{anchor_offsets, visible, {}}, augment_offsets, {}};
  calm::Context<calm::CpuBackend> ctx;

  const auto show = [&](const char* name, calm::BridgeOptions options) {
    options.heads = 4;
    const calm::CrossAttentionBridge<float> bridge("bridge", 32, 24, options);
    calm::CrossAttentionBridge<float>::Cache cache;
    const auto added = ctx.arena.matrix<float>(4, 32);
    ctx.backend.set_zero(added);
    bridge.forward(ctx, plan, augment.view(), anchor.view(), added, cache);
    std::cout << name << ", norm of what each position receives:";
    for (calm::Index t = 0; t < 4; ++t) {
      double squares = 0;
      for (calm::Index j = 0; j < 32; ++j)
        squares += static_cast<double>(added(t, j)) * static_cast<double>(added(t, j));
      std::cout << ' ' << calm::fixed(std::sqrt(squares), 3);
    }
    std::cout << "  (" << calm::count_parameters(bridge) << " parameters)\n";
  };
  show("fresh bridge", {});
  show("preset::paper", calm::preset::paper());
  std::cout << "position 0 sees nothing and receives nothing either way\n";
}
