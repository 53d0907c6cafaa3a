// Intervals for measured proportions: how far chance alone may have moved a figure. 95 % unless z is given.
#pragma once

#include <calm/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <ranges>

namespace calm::inline CALM_ABI {

struct Interval {
  double low, high;
};

/// Of a proportion successes / trials (Wilson, 1927): within [0, 1], and sound near 0 and 1. [0, 1] without trials.
inline Interval wilson_interval(Index successes, Index trials, double z = 1.959964) {
  require<ConfigError>(0 <= successes && successes <= trials, "wilson_interval: ", successes, " successes of ", trials);
  if (trials == 0) return {0, 1};
  const double n = static_cast<double>(trials), p = static_cast<double>(successes) / n;
  const double shrink = 1 / (1 + z * z / n);
  const double middle = shrink * (p + z * z / (2 * n));
  const double half = shrink * z * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n));
  // Rounding must not push the bound off 0 or 1, where it lies exactly.
  return {successes == 0 ? 0 : std::max(0.0, middle - half), successes == trials ? 1 : std::min(1.0, middle + half)};
}

/// How much more often the first of two answered the same items right.
struct PairedDifference {
  double difference;  // proportion of the first minus that of the second
  Interval interval;
  Index only_first, only_second, items;
};

/// From the items on which the two differ (Agresti and Min, 2005: Wald's interval with half an item added to each of
/// the four cells, so that no difference in few items does not read as certainty).
inline PairedDifference paired_difference(Index only_first, Index only_second, Index items, double z = 1.959964) {
  require<ConfigError>(only_first >= 0 && only_second >= 0 && only_first <= items && only_second <= items - only_first,
                       "paired_difference: ", only_first, " and ", only_second, " of ", items, " items");
  if (items == 0) return {0, {-1, 1}, 0, 0, 0};
  const double n = static_cast<double>(items) + 2;
  const double b = static_cast<double>(only_first) + 0.5, c = static_cast<double>(only_second) + 0.5;
  const double middle = (b - c) / n;
  const double half = z * std::sqrt(b + c - (b - c) * (b - c) / n) / n;
  return {static_cast<double>(only_first - only_second) / static_cast<double>(items),
          {std::max(-1.0, middle - half), std::min(1.0, middle + half)},
          only_first,
          only_second,
          items};
}

/// From whether each item was right: two ranges of bool of one length, in the same order of items.
template <std::ranges::random_access_range Outcomes>
PairedDifference paired_difference(const Outcomes& first, const Outcomes& second, double z = 1.959964) {
  require<ShapeError>(first.size() == second.size(), "paired_difference: ", first.size(), " and ", second.size(),
                      " outcomes; both must be of the same items");
  Index only_first = 0, only_second = 0;
  for (std::size_t i = 0; i < first.size(); ++i) {
    only_first += first[i] && !second[i] ? 1 : 0;
    only_second += second[i] && !first[i] ? 1 : 0;
  }
  return paired_difference(only_first, only_second, static_cast<Index>(first.size()), z);
}

}  // namespace calm::inline CALM_ABI
