// chrF: how much a text shares with its reference, as an F-score over character n-grams (Popovic, WMT 2015).
//
// With the settings of sacrebleu: n from 1 to 6, recall counts twice (beta 2), white space left out, counts summed over
// the corpus before precision and recall are averaged over n.
#pragma once

#include <calm/core/config.hpp>

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace calm::inline CALM_ABI {

class Chrf {
 public:
  static constexpr std::size_t orders = 6;

  /// Adds one pair of UTF-8 texts.
  void add(std::string_view text, std::string_view reference) {
    const auto a = characters(text), b = characters(reference);
    for (std::size_t n = 1; n <= orders; ++n) {
      std::map<std::string, Index> found = grams(a, n), expected = grams(b, n);
      Counts& counts = counts_[n - 1];
      for (const auto& [gram, count] : found) {
        counts.found += count;
        const auto same = expected.find(gram);
        if (same != expected.end()) counts.shared += std::min(count, same->second);
      }
      for (const auto& [gram, count] : expected) counts.expected += count;
    }
  }

  /// From 0 to 100 over all pairs so far.
  double score() const {
    double precision = 0, recall = 0, used = 0;
    for (const Counts& counts : counts_) {
      if (counts.found == 0 || counts.expected == 0) continue;
      precision += static_cast<double>(counts.shared) / static_cast<double>(counts.found);
      recall += static_cast<double>(counts.shared) / static_cast<double>(counts.expected);
      ++used;
    }
    if (precision + recall == 0) return 0;
    precision /= used;
    recall /= used;
    constexpr double beta_squared = 4;
    return 100 * (1 + beta_squared) * precision * recall / (beta_squared * precision + recall);
  }

 private:
  struct Counts {
    Index found = 0, expected = 0, shared = 0;
  };

  /// Code points as strings of bytes, without white space.
  static std::vector<std::string> characters(std::string_view text) {
    std::vector<std::string> result;
    for (std::size_t i = 0; i < text.size();) {
      std::size_t end = i + 1;
      while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) ++end;
      const std::string_view character = text.substr(i, end - i);
      if (character.find_first_of(" \t\n\r\v\f") == std::string_view::npos) result.emplace_back(character);
      i = end;
    }
    return result;
  }

  static std::map<std::string, Index> grams(const std::vector<std::string>& characters, std::size_t n) {
    std::map<std::string, Index> result;
    for (std::size_t i = 0; i + n <= characters.size(); ++i) {
      std::string gram;
      for (std::size_t j = i; j < i + n; ++j) gram += characters[j];
      ++result[gram];
    }
    return result;
  }

  std::array<Counts, orders> counts_;
};

}  // namespace calm::inline CALM_ABI
