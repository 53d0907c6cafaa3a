// LayerTap: an observer that copies the residual stream of an augment after chosen blocks, and changes nothing.
#pragma once

#include <calm/nn/parameter.hpp>
#include <calm/tensor/buffer.hpp>

#include <algorithm>

namespace calm::inline CALM_ABI {

/// The streams that were tapped, one [T, D] for each tapped block.
template <class Scalar>
struct TappedStates {
  std::vector<Index> blocks;            // ascending, distinct
  std::vector<Buffer<Scalar>> streams;  // as blocks

  explicit TappedStates(const std::vector<Index>& tapped = {}) {
    for (const Index block : tapped) add(block);
  }

  /// Taps one more block.
  [[gnu::cold]] void add(Index block) {
    for (const Index tapped : blocks)
      if (tapped == block) return;
    blocks.push_back(block);
    for (std::size_t i = blocks.size() - 1; i > 0 && blocks[i] < blocks[i - 1]; --i)
      std::swap(blocks[i], blocks[i - 1]);
    make_as_many(streams, blocks.size());
  }

  /// The number of leading blocks that have to run.
  Index depth() const { return blocks.empty() ? 0 : blocks.back() + 1; }

  /// The stream after a tapped block.
  [[gnu::cold]] MatrixView<const Scalar> after(Index block) const {
    for (std::size_t i = 0; i < blocks.size(); ++i)
      if (blocks[i] == block) return streams[i].view();
    fail<ShapeError>({"block ", block, " is not tapped"});
  }
};

template <class Scalar>
class LayerTap {
 public:
  explicit LayerTap(TappedStates<Scalar>& states) : states_(states) {}

  [[gnu::cold]] void after_block(auto& ctx, Index block, MatrixView<Scalar>& x) {
    for (std::size_t i = 0; i < states_.blocks.size(); ++i)
      if (states_.blocks[i] == block)
        ctx.backend.scale(MatrixView<const Scalar>(x), 1, states_.streams[i].resize(x.rows, x.cols));
  }

  /// A tap passes no gradient: the augment is frozen.
  void after_block_backward(auto&, Index, MatrixView<Scalar>) const {}

 private:
  TappedStates<Scalar>& states_;
};

}  // namespace calm::inline CALM_ABI
