// The gradient checker: compares analytic gradients with finite differences of the loss, in double.
//
// d loss / d x is estimated by the central difference of fourth order,
//   (8 (loss(x + h) - loss(x - h)) - (loss(x + 2h) - loss(x - 2h))) / 12h.
// It evaluates the loss four times for each value: take sizes as small as the shapes allow. For your own module:
//
//   const auto result = check_parameter_gradients(module, grads, [&] { return loss_of(module); });
//   require<NumericError>(result.worst_error < 1e-6, to_string(result));
#pragma once

#include <calm/nn/parameter.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace calm::inline CALM_ABI {

struct GradientCheckOptions {
  double step = 1e-4;   // h
  double floor = 1e-4;  // errors of gradients smaller than this are measured against this
  Index values = 0;     // at most so many of each parameter, evenly spread; 0: all
};

/// The value whose gradient is furthest off.
struct GradientCheckResult {
  double worst_error =
      0;             // |analytic - numeric| / max(|analytic|, |numeric|, floor); infinite where either is no number
  std::string name;  // of its parameter
  Index row = 0, col = 0;
  double analytic = 0, numeric = 0;
  Index checked = 0;  // values that were compared
};

inline std::string to_string(const GradientCheckResult& result) {
  if (result.checked == 0) return "no value was checked";
  return message(result.checked, " values checked; the worst is ", result.name, "[", result.row, ", ", result.col,
                 "]: analytic ", result.analytic, ", numeric ", result.numeric, ", relative error ",
                 result.worst_error);
}

/// Compares `analytic` with the differences of loss() as `values` change, and adds what it finds to `result`. The
/// values are as they were when it returns.
template <class Loss>
void check_gradient(const std::string& name, MatrixView<double> values, MatrixView<const double> analytic, Loss&& loss,
                    GradientCheckResult& result, const GradientCheckOptions& options = {}) {
  require<ShapeError>(values.rows == analytic.rows && values.cols == analytic.cols, name, " is [", values.rows, ", ",
                      values.cols, "], its gradient [", analytic.rows, ", ", analytic.cols, "]");
  const Index size = values.rows * values.cols;
  const Index count = options.values > 0 ? std::min(options.values, size) : size;
  for (Index n = 0; n < count; ++n) {
    const Index i = n * size / count, row = i / values.cols, col = i % values.cols;
    double& value = values(row, col);
    const double before = value;
    const auto loss_at = [&](double steps) {
      value = before + steps * options.step;
      return static_cast<double>(loss());
    };
    const double near = loss_at(1) - loss_at(-1), far = loss_at(2) - loss_at(-2);
    value = before;
    const double expected = (8 * near - far) / (12 * options.step), found = analytic(row, col);
    double error = std::abs(found - expected) / std::max({std::abs(found), std::abs(expected), options.floor});
    if (!std::isfinite(error)) error = std::numeric_limits<double>::infinity();
    if (result.checked++ == 0 || error > result.worst_error) {
      const Index checked = result.checked;
      result = {error, name, row, col, found, expected, checked};
    }
  }
}

/// Checks the gradients of every trainable weight of a module (whatever for_each_parameter visits). `grads` hold what
/// its backward gave for the loss that `loss()` evaluates.
template <class Module, class Loss>
GradientCheckResult check_parameter_gradients(Module& module, Gradients<double>& grads, Loss&& loss,
                                              const GradientCheckOptions& options = {}) {
  GradientCheckResult result;
  for_each_parameter(module, [&](const std::string& name, Parameter<double>& parameter) {
    check_gradient(name, parameter.value.view(), MatrixView<const double>(grads[parameter]), loss, result, options);
  });
  return result;
}

}  // namespace calm::inline CALM_ABI
