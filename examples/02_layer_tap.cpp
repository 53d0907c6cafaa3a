// A LayerTap reads the residual stream of a model after chosen blocks and changes nothing: the logits with and without
// it have the same bits.
#include <calm/calm.hpp>

#include <cmath>
#include <iostream>

int main() {
  using Model = calm::Transformer<calm::zoo::Llama>;
  const Model model({.vocabulary = 100, .width = 48, .hidden = 128, .blocks = 4, .heads = {4, 2, 12}},
                    calm::RandomWeights{.seed = 2});
  calm::Context<calm::CpuBackend> ctx;

  const std::vector<calm::TokenId> ids{7, 1, 42, 99, 3, 8};
  const std::vector<calm::Index> offsets{0, 4, 6};  // two sequences, behind each other
  const calm::TokenBatch batch{ids, offsets, {}, {}};

  calm::TappedStates<float> taps({1, 3});  // after block 1 and block 3
  const auto tapped_stream = [&] {
    auto x = model.embed(ctx, batch);
    model.run(ctx, batch, {}, x, 0, model.spec().blocks, nullptr, calm::LayerTap<float>(taps));
    return x;
  }();
  const auto plain_stream = model.forward(ctx, batch, {}, nullptr);

  for (const calm::Index block : taps.blocks) {
    const auto stream = taps.after(block);  // [tokens, width]
    std::cout << "after block " << block << ": [" << stream.rows << ", " << stream.cols << "], norm of each token:";
    for (calm::Index t = 0; t < stream.rows; ++t) {
      double squares = 0;
      for (calm::Index j = 0; j < stream.cols; ++j)
        squares += static_cast<double>(stream(t, j)) * static_cast<double>(stream(t, j));
      std::cout << ' ' << calm::fixed(std::sqrt(squares), 2);
    }
    std::cout << '\n';
  }
  const auto a = flat(tapped_stream), b = flat(plain_stream);
  const bool same = std::equal(a.begin(), a.end(), b.begin());
  std::cout << "the final stream with and without the tap: " << (same ? "the same bits" : "different") << '\n';
  return same ? 0 : 1;
}
