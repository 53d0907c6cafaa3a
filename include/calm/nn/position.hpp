// Rotary positions (Su et al., arXiv 2104.09864), half-split as Llama's checkpoints store them: value i of a head turns
// with value i + width / 2 by the angle position * base^(-2 i / width).
#pragma once

#include <calm/backend/backend.hpp>

#include <cmath>
#include <numbers>
#include <vector>

namespace calm::inline CALM_ABI {

/// cos and sin for every token of a batch: [T, width / 2].
template <class Scalar>
struct RotaryAngles {
  MatrixView<const Scalar> cosines, sines;
};

/// How rotary frequencies are stretched for contexts longer than those of pretraining, as config.json names it.
struct RotaryScaling {
  enum class Kind : std::uint8_t { none, linear, llama3, divided };
  Kind kind = Kind::none;
  double factor = 1;
  double low_frequency_factor = 1, high_frequency_factor = 4;  // llama3
  double original_context = 8192;                              // llama3
  std::vector<double> divisors = {};                           // divided: one for each frequency, as GGUF stores them

  friend bool operator==(const RotaryScaling&, const RotaryScaling&) = default;

  /// Frequency i. linear: divided by the factor. llama3: long waves are divided, short ones stay, between them a blend
  /// (Llama 3.1, arXiv 2407.21783, section 3.4; the formula is that of its reference code).
  double scaled(double frequency, std::size_t i) const {
    if (kind == Kind::none) return frequency;
    if (kind == Kind::divided) return frequency / divisors.at(i);
    if (kind == Kind::linear) return frequency / factor;
    const double turns = original_context * frequency / (2 * std::numbers::pi);  // within the original context
    if (turns < low_frequency_factor) return frequency / factor;
    if (turns > high_frequency_factor) return frequency;
    const double blend = (turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor);
    return (1 - blend) * frequency / factor + blend * frequency;
  }
};

template <class Scalar>
class Rotary {
 public:
  Rotary() = default;
  /// `width` values of each head are turned: all of them, or the first ones.
  Rotary(Index width, double base, const RotaryScaling& scaling = {})
      : frequencies_(static_cast<std::size_t>(width / 2)) {
    require<ConfigError>(width % 2 == 0, "rotary positions need an even head width, found ", width);
    for (std::size_t i = 0; i < frequencies_.size(); ++i)
      frequencies_[i] = static_cast<Scalar>(
          scaling.scaled(std::pow(base, -2 * static_cast<double>(i) / static_cast<double>(width)), i));
  }

  /// Angles in the context's arena, once for all blocks of a pass.
  [[gnu::cold]] RotaryAngles<Scalar> angles(auto& ctx, std::span<const Index> positions) const {
    const auto rows = static_cast<Index>(positions.size()), half = static_cast<Index>(frequencies_.size());
    const auto cosines = ctx.arena.template matrix<Scalar>(rows, half),
               sines = ctx.arena.template matrix<Scalar>(rows, half);
    ctx.backend.rotary_angles(positions, std::span<const Scalar>(frequencies_), cosines, sines);
    return {cosines, sines};
  }

  /// Turns every head of x [T, heads * width] in place; the gradient turns back.
  [[gnu::cold]] static void forward(auto& ctx, MatrixView<Scalar> x, const RotaryAngles<Scalar>& angles, Index heads) {
    ctx.backend.rotate(x, angles.cosines, angles.sines, heads, 1);
  }
  [[gnu::cold]] static void backward(auto& ctx, MatrixView<Scalar> dx, const RotaryAngles<Scalar>& angles,
                                     Index heads) {
    ctx.backend.rotate(dx, angles.cosines, angles.sines, heads, -1);
  }

 private:
  std::vector<Scalar> frequencies_;
};

}  // namespace calm::inline CALM_ABI
