// Rotary positions (Su et al., arXiv 2104.09864), half-split as Llama's checkpoints store them: value i of a head turns
// with value i + width / 2 by the angle position * base^(-2 i / width).
#pragma once

#include <calm/backend/backend.hpp>

#include <cmath>
#include <vector>

namespace calm::inline CALM_ABI {

/// cos and sin for every token of a batch: [T, width / 2].
template <class Scalar>
struct RotaryAngles {
  MatrixView<const Scalar> cosines, sines;
};

template <class Scalar>
class Rotary {
 public:
  Rotary() = default;
  Rotary(Index head_width, double base) : frequencies_(static_cast<std::size_t>(head_width / 2)) {
    require<ConfigError>(head_width % 2 == 0, "rotary positions need an even head width, found ", head_width);
    for (std::size_t i = 0; i < frequencies_.size(); ++i)
      frequencies_[i] =
          static_cast<Scalar>(std::pow(base, -2 * static_cast<double>(i) / static_cast<double>(head_width)));
  }

  /// Angles in the context's arena, once for all blocks of a pass.
  RotaryAngles<Scalar> angles(auto& ctx, std::span<const Index> positions) const {
    const auto rows = static_cast<Index>(positions.size()), half = static_cast<Index>(frequencies_.size());
    const auto cosines = ctx.arena.template matrix<Scalar>(rows, half),
               sines = ctx.arena.template matrix<Scalar>(rows, half);
    ctx.backend.rotary_angles(positions, std::span<const Scalar>(frequencies_), cosines, sines);
    return {cosines, sines};
  }

  /// Turns every head of x [T, heads * width] in place; the gradient turns back.
  static void forward(auto& ctx, MatrixView<Scalar> x, const RotaryAngles<Scalar>& angles, Index heads) {
    ctx.backend.rotate(x, angles.cosines, angles.sines, heads, 1);
  }
  static void backward(auto& ctx, MatrixView<Scalar> dx, const RotaryAngles<Scalar>& angles, Index heads) {
    ctx.backend.rotate(dx, angles.cosines, angles.sines, heads, -1);
  }

 private:
  std::vector<Scalar> frequencies_;
};

}  // namespace calm::inline CALM_ABI
