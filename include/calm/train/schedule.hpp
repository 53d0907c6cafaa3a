// The learning rate of a step: linear warm-up, then a cosine down to a fraction of the peak (Loshchilov and Hutter,
// 2017).
#pragma once

#include <calm/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace calm::inline CALM_ABI {

struct CosineSchedule {
  double peak = 1e-3;
  Index warmup = 100;            // steps
  Index steps = 1000;            // in all
  double final_fraction = 0.05;  // of the peak, at the last step

  /// Throws ConfigError where a number makes no sense.
  void check() const {
    const auto not_negative = [](const char* name, double value) {
      require<ConfigError>(std::isfinite(value) && value >= 0, "CosineSchedule: ", name, " is ", value,
                           ", expected a finite number that is not negative");
    };
    not_negative("peak", peak);
    not_negative("final_fraction", final_fraction);
    not_negative("warmup", static_cast<double>(warmup));
    not_negative("steps", static_cast<double>(steps));
  }

  /// For steps counted from 1.
  double operator()(Index step) const {
    const double rise = warmup > 0 ? std::min(1.0, static_cast<double>(step) / static_cast<double>(warmup)) : 1.0;
    const double done = std::min(1.0, static_cast<double>(step) / static_cast<double>(std::max<Index>(1, steps)));
    const double fall = final_fraction + (1 - final_fraction) * 0.5 * (1 + std::cos(std::numbers::pi * done));
    return peak * rise * fall;
  }
};

}  // namespace calm::inline CALM_ABI
