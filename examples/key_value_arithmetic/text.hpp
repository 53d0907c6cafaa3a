// The text of the experiment: its characters are the tokens, the same for both models.
#pragma once

#include <calm/core/error.hpp>

#include <string>
#include <vector>

namespace key_value {

/// Begin, end, space, the operators, digits, letters.
inline constexpr std::string_view characters = "^$ +-=0123456789abcdefghijklmnopqrstuvwxyz";
inline constexpr calm::Index vocabulary = static_cast<calm::Index>(characters.size());
inline constexpr calm::TokenId begin_token = 0, end_token = 1;

inline std::vector<calm::TokenId> encode(std::string_view text) {
  std::vector<calm::TokenId> ids;
  ids.reserve(text.size());
  for (const char c : text) {
    const std::size_t at = characters.find(c);
    calm::require<calm::ConfigError>(at != std::string_view::npos, "the character '", c,
                                     "' is not in the vocabulary \"", characters, "\"");
    ids.push_back(static_cast<calm::TokenId>(at));
  }
  return ids;
}

inline std::string decode(const std::vector<calm::TokenId>& ids) {
  std::string text;
  for (const calm::TokenId id : ids) text += characters.at(static_cast<std::size_t>(id));
  return text;
}

}  // namespace key_value
