// Sampler: the next token from logits: greedy, or by temperature, top-k and top-p (Holtzman et al., arXiv 1904.09751).
#pragma once

#include <calm/core/error.hpp>
#include <calm/core/random.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <vector>

namespace calm::inline CALM_ABI {

struct SamplerOptions {
  double temperature = 0;  // 0: the most likely token
  Index top_k = 0;         // only the k most likely tokens; 0: all
  double top_p = 1;        // only the most likely tokens that together reach p
  std::uint64_t seed = 0;
};

struct SampledToken {
  TokenId id = 0;
  double log_probability = 0;  // under the model itself, before temperature and cuts
};

class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options) : options_(options) {
    require<ConfigError>(std::isfinite(options.temperature) && options.temperature >= 0,
                         "the temperature must be at least 0, found ", options.temperature);
    require<ConfigError>(options.top_k >= 0, "top_k must be at least 0, found ", options.top_k);
    require<ConfigError>(options.top_p > 0 && options.top_p <= 1, "top_p must lie in (0, 1], found ", options.top_p);
  }

  /// Of equally likely tokens the one with the lowest id wins. Throws NumericError where no logit is finite or one is
  /// NaN.
  template <class Scalar>
  SampledToken operator()(std::span<const Scalar> logits, Random& random) {
    const auto best = std::max_element(logits.begin(), logits.end());
    for (const Scalar x : logits)
      require<NumericError>(!std::isnan(x), "a logit is NaN: the model's weights or inputs are broken");
    require<NumericError>(std::isfinite(*best), "the largest logit is ", *best);
    const double log_total = log_sum_exp(logits, *best);
    const auto chosen =
        options_.temperature == 0 ? static_cast<std::size_t>(best - logits.begin()) : draw(logits, random);
    return {static_cast<TokenId>(chosen), static_cast<double>(logits[chosen]) - log_total};
  }

 private:
  template <class Scalar>
  static double log_sum_exp(std::span<const Scalar> logits, Scalar largest) {
    double total = 0;
    for (const Scalar x : logits) total += std::exp(static_cast<double>(x - largest));
    return std::log(total) + static_cast<double>(largest);
  }

  template <class Scalar>
  std::size_t draw(std::span<const Scalar> logits, Random& random) {
    order_.resize(logits.size());
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    const auto more_likely = [&](std::size_t a, std::size_t b) {
      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    };
    const std::size_t keep =
        options_.top_k > 0 ? std::min(logits.size(), static_cast<std::size_t>(options_.top_k)) : logits.size();
    std::partial_sort(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(keep), order_.end(), more_likely);
    weights_.resize(keep);
    double total = 0;
    for (std::size_t i = 0; i < keep; ++i) {
      weights_[i] = std::exp(static_cast<double>(logits[order_[i]] - logits[order_[0]]) / options_.temperature);
      total += weights_[i];
    }
    double within = 0;
    std::size_t count = 0;
    while (count < keep && (count == 0 || within < options_.top_p * total)) within += weights_[count++];
    double point = random.uniform() * within;
    std::size_t i = 0;
    while (i + 1 < count && point >= weights_[i]) point -= weights_[i++];
    return order_[i];
  }

  SamplerOptions options_;
  std::vector<std::size_t> order_;
  std::vector<double> weights_;
};

}  // namespace calm::inline CALM_ABI
