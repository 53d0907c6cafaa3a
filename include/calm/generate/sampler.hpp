// Sampler: the next token from logits: greedy, or by temperature, top-k and top-p (Holtzman et al., arXiv 1904.09751).
#pragma once

#include <calm/core/error.hpp>
#include <calm/core/random.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
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
    require<NumericError>(!logits.empty(), "there are no logits to choose from");
    for (const Scalar x : logits)
      require<NumericError>(!std::isnan(x), "a logit is NaN: the model's weights or inputs are broken");
    const auto found = std::max_element(logits.begin(), logits.end());
    const Scalar largest = *found;
    require<NumericError>(std::isfinite(largest), "the largest logit is ", largest);
    const double log_total = std::log(sum_of_weights(logits, largest, 1.0)) + static_cast<double>(largest);
    const auto best = static_cast<std::size_t>(found - logits.begin());
    const bool all =
        options_.top_p == 1 && (options_.top_k == 0 || static_cast<std::size_t>(options_.top_k) >= logits.size());
    const std::size_t chosen = options_.temperature == 0 ? best
                               : all                     ? draw(logits, largest, random).value_or(best)
                                                         : draw_most_likely(logits, largest, random);
    return {static_cast<TokenId>(chosen), static_cast<double>(logits[chosen]) - log_total};
  }

 private:
  template <class Scalar>
  static double weight(Scalar logit, Scalar largest, double temperature) {
    return std::exp(static_cast<double>(logit - largest) / temperature);
  }
  template <class Scalar>
  static double sum_of_weights(std::span<const Scalar> logits, Scalar largest, double temperature) {
    double total = 0;
    for (const Scalar x : logits) total += weight(x, largest, temperature);
    return total;
  }

  /// A point between 0 and `total`, neither of which it is: Random's numbers are multiples of 2^-24.
  static double point_within(double total, Random& random) { return (random.uniform() + 0x1p-25) * total; }

  /// Any token; none where the sum, rounded, is more than that of its parts.
  template <class Scalar>
  std::optional<std::size_t> draw(std::span<const Scalar> logits, Scalar largest, Random& random) const {
    double point = point_within(sum_of_weights(logits, largest, options_.temperature), random);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      const double own = weight(logits[i], largest, options_.temperature);
      if (point < own) return i;
      point -= own;
    }
    return std::nullopt;
  }

  /// One of the top_k most likely that together reach top_p. Tokens are put in order as far as is needed.
  template <class Scalar>
  std::size_t draw_most_likely(std::span<const Scalar> logits, Scalar largest, Random& random) {
    order_.resize(logits.size());
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    weights_.clear();
    const std::size_t keep =
        options_.top_k > 0 ? std::min(logits.size(), static_cast<std::size_t>(options_.top_k)) : logits.size();
    const auto weight_of = [&](std::size_t i) {  // of the i-th most likely token
      while (i >= weights_.size()) {
        const std::size_t from = weights_.size();
        const std::size_t to = keep < logits.size() ? keep : std::min(keep, std::max(std::size_t{64}, 16 * from));
        const auto at = [&](std::size_t place) { return order_.begin() + static_cast<std::ptrdiff_t>(place); };
        std::partial_sort(at(from), at(to), order_.end(), [&](std::size_t a, std::size_t b) {
          return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
        });
        for (std::size_t j = from; j < to; ++j)
          weights_.push_back(weight(logits[order_[j]], largest, options_.temperature));
      }
      return weights_[i];
    };
    double within = 0;  // the sum of the first `count`, of which one is drawn
    std::size_t count = keep;
    if (keep == logits.size()) within = sum_of_weights(logits, largest, options_.temperature);
    else
      for (std::size_t i = 0; i < keep; ++i) within += weight_of(i);
    if (options_.top_p < 1) {
      const double enough = options_.top_p * within;
      within = 0;
      for (count = 0; count < keep && (count == 0 || within < enough); ++count) within += weight_of(count);
    }
    double point = point_within(within, random);
    std::size_t i = 0;
    for (; i + 1 < count && point >= weight_of(i) && weight_of(i + 1) > 0; ++i) point -= weight_of(i);
    return order_[i];
  }

  SamplerOptions options_;
  std::vector<std::size_t> order_;
  std::vector<double> weights_;  // of the tokens that are in order
};

}  // namespace calm::inline CALM_ABI
