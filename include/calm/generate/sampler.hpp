// Sampler: the next token from logits: greedy, or by temperature, top-k and top-p (Holtzman et al., arXiv 1904.09751).
#pragma once

#include <calm/backend/cpu_vector.hpp>
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
    const double log_total = std::log(weigh(logits, largest, 1)) + static_cast<double>(largest);
    const auto best = static_cast<std::size_t>(found - logits.begin());
    const std::size_t chosen = options_.temperature == 0 ? best : draw(logits, largest, random).value_or(best);
    return {static_cast<TokenId>(chosen), static_cast<double>(logits[chosen]) - log_total};
  }

 private:
  /// Each token's exp((logit - largest) / temperature), of which nothing is left where a logit is that of a masked
  /// token, and their sum.
  template <class Scalar>
  double weigh(std::span<const Scalar> logits, Scalar largest, double temperature) {
    using Chunk = cpu::Chunk<double>;
    weights_.resize(logits.size());
    const Chunk least(-700.0), nothing(0.0);  // exp of less than that is no normal number
    Chunk total = nothing;
    cpu::for_chunks<double>(static_cast<Index>(logits.size()), [&](Index from, Index count) {
      double exponents[cpu::chunk];
      for (Index i = 0; i < count; ++i)
        exponents[i] = static_cast<double>(logits[static_cast<std::size_t>(from + i)] - largest) / temperature;
      const Chunk x(exponents, count), weights = where_less(x, least, nothing, exp(x));
      weights.store(weights_.data() + from, count);
      total = total + weights.head(count);
    });
    return total.sum();
  }

  /// A point between 0 and `total`, neither of which it is: Random's numbers are multiples of 2^-24.
  static double point_within(double total, Random& random) { return (random.uniform() + 0x1p-25) * total; }

  /// A token; none where the sum, rounded, is more than that of its parts.
  template <class Scalar>
  std::optional<std::size_t> draw(std::span<const Scalar> logits, Scalar largest, Random& random) {
    const double total = weigh(logits, largest, options_.temperature);
    if (options_.top_p < 1 || (options_.top_k > 0 && static_cast<std::size_t>(options_.top_k) < logits.size()))
      return draw_most_likely(logits, total, random);
    double point = point_within(total, random);
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      if (point < weights_[i]) return i;
      point -= weights_[i];
    }
    return std::nullopt;
  }

  /// One of the top_k most likely that together reach top_p. Tokens are put in order as far as is needed.
  template <class Scalar>
  std::size_t draw_most_likely(std::span<const Scalar> logits, double total, Random& random) {
    order_.resize(logits.size());
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    const std::size_t keep =
        options_.top_k > 0 ? std::min(logits.size(), static_cast<std::size_t>(options_.top_k)) : logits.size();
    std::size_t in_order = 0;
    const auto weight_of = [&](std::size_t i) {  // of the i-th most likely token
      while (i >= in_order) {
        const std::size_t to = keep < logits.size() ? keep : std::min(keep, std::max(std::size_t{64}, 16 * in_order));
        const auto at = [&](std::size_t place) { return order_.begin() + static_cast<std::ptrdiff_t>(place); };
        std::partial_sort(at(in_order), at(to), order_.end(), [&](std::size_t a, std::size_t b) {
          return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
        });
        in_order = to;
      }
      return weights_[order_[i]];
    };
    double within = total;  // of the first `count`, of which one is drawn
    std::size_t count = keep;
    if (keep < logits.size()) {
      within = 0;
      for (std::size_t i = 0; i < keep; ++i) within += weight_of(i);
    }
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
  std::vector<double> weights_;  // of all tokens
  std::vector<std::size_t> order_;
};

}  // namespace calm::inline CALM_ABI
