// AdamW with decoupled weight decay (Loshchilov and Hutter, 2019) over all parameters of a model, and gradient clipping
// by the norm of them all. The moments lie in contiguous ranges, in the order of the gradients.
#pragma once

#include <calm/nn/parameter.hpp>

#include <limits>
#include <string_view>

namespace calm::inline CALM_ABI {

/// Throws ConfigError for an option that is not of [0, below).
inline void check_option(const char* options, const char* name, double value, double below) {
  require<ConfigError>(value >= 0 && value < below, options, ": ", name, " is ", value,
                       ", expected a number of at least 0 and below ", below);
}

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.98, epsilon = 1e-8;
  double weight_decay = 0.01;  // of matrices; norms and gates do not decay
  double clip_norm = 1;        // 0: no clipping

  /// Throws ConfigError where a number makes no sense.
  void check() const {
    constexpr const char* self = "AdamWOptions";
    constexpr double infinity = std::numeric_limits<double>::infinity();
    check_option(self, "beta1", beta1, 1);
    check_option(self, "beta2", beta2, 1);
    check_option(self, "weight_decay", weight_decay, infinity);
    check_option(self, "clip_norm", clip_norm, infinity);
    require<ConfigError>(epsilon > 0 && epsilon < infinity, self, ": epsilon is ", epsilon,
                         ", expected a number above 0");
  }
};

/// What Trainer takes: made of the number of parameters and its Options, which can check themselves; known in
/// checkpoints by its name and two moments, each as long as all parameters. update() is one step for gradients of a
/// norm, at a rate, counted from 1; it may take memory from the arena of the context and reset it.
template <class O, class Scalar, class Ctx>
concept Optimizer = requires(O optimizer, const typename O::Options& options, Ctx& ctx, Gradients<Scalar>& grads) {
  O(Index{1}, options);
  options.check();
  std::string_view(O::name);
  optimizer.update(ctx, grads, 1.0, 1e-3, Index{1});
  { optimizer.first_moment() } -> std::same_as<Matrix<Scalar>&>;
  { optimizer.second_moment() } -> std::same_as<Matrix<Scalar>&>;
  { optimizer.options() } -> std::same_as<const typename O::Options&>;
};

template <class Scalar>
class AdamW {
 public:
  using Options = AdamWOptions;
  static constexpr std::string_view name = "AdamW";

  AdamW(Index parameters, const AdamWOptions& options)
      : options_(options), first_(1, parameters), second_(1, parameters) {}

  /// One update of the parameters from their gradients, which have the given norm; `step` counts from 1.
  void update(auto& ctx, const Gradients<Scalar>& grads, double norm, double learning_rate, Index step) {
    const double scale = clipping_scale(norm);
    for (Parameter<Scalar>* parameter : grads.parameters())
      update_parameter(ctx, *parameter, grads, scale, learning_rate, step);
  }

  Matrix<Scalar>& first_moment() { return first_; }
  Matrix<Scalar>& second_moment() { return second_; }
  const AdamWOptions& options() const { return options_; }

 protected:
  /// What gradients of this norm are multiplied with.
  double clipping_scale(double norm) const {
    return options_.clip_norm > 0 && norm > options_.clip_norm ? options_.clip_norm / norm : 1;
  }

  void update_parameter(auto& ctx, Parameter<Scalar>& parameter, const Gradients<Scalar>& grads, double scale,
                        double learning_rate, Index step) {
    const auto range = [&](auto values) {
      return values.subspan(static_cast<std::size_t>(parameter.offset),
                            static_cast<std::size_t>(parameter.value.size()));
    };
    ctx.backend.adamw(parameter.value.values(), range(grads.values()), range(first_.values()), range(second_.values()),
                      AdamWStep{learning_rate, options_.beta1, options_.beta2, options_.epsilon,
                                parameter.decay ? options_.weight_decay : 0, step},
                      &scale);
  }

 private:
  AdamWOptions options_;
  Matrix<Scalar> first_, second_;
};

}  // namespace calm::inline CALM_ABI
