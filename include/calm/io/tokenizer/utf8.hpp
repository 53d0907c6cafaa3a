// UTF-8 as the tokenizers need it: one code point at a time, and where a text stops being valid.
//
// Valid means RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF.
#pragma once

#include <calm/core/config.hpp>

#include <cstdint>
#include <string>
#include <string_view>

namespace calm::inline CALM_ABI {

struct CodePoint {
  std::uint32_t value = 0;
  std::uint32_t bytes = 0;  // 0: the text does not begin with a valid code point
};

/// The code point that `text` begins with.
inline CodePoint code_point_at(std::string_view text) {
  const auto at = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  if (text.empty()) return {};
  const std::uint32_t first = at(0);
  if (first < 0x80) return {first, 1};
  const std::uint32_t bytes = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() < bytes) return {};
  std::uint32_t value = first & (0x7FU >> bytes);
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((at(i) & 0xC0U) != 0x80U) return {};
    value = value << 6 | (at(i) & 0x3FU);
  }
  const std::uint32_t least = bytes == 4 ? 0x10000 : bytes == 3 ? 0x800 : 0x80;
  if (value < least || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) return {};
  return {value, bytes};
}

inline void append_utf8(std::string& text, std::uint32_t value) {
  const auto put = [&](std::uint32_t byte) { text += static_cast<char>(byte); };
  if (value < 0x80) return put(value);
  if (value < 0x800) {
    put(0xC0 | value >> 6);
  } else {
    if (value < 0x10000) {
      put(0xE0 | value >> 12);
    } else {
      put(0xF0 | value >> 18);
      put(0x80 | (value >> 12 & 0x3F));
    }
    put(0x80 | (value >> 6 & 0x3F));
  }
  put(0x80 | (value & 0x3F));
}

/// How many bytes from the beginning on are valid UTF-8.
inline std::size_t valid_utf8_prefix(std::string_view text) {
  std::size_t place = 0;
  while (place < text.size()) {
    if (static_cast<unsigned char>(text[place]) < 0x80) {
      ++place;
      continue;
    }
    const CodePoint next = code_point_at(text.substr(place, 4));
    if (next.bytes == 0) break;
    place += next.bytes;
  }
  return place;
}

/// How many bytes at the end may be the beginning of a code point whose other bytes are still to come: 0 to 3.
inline std::size_t incomplete_utf8_suffix(std::string_view text) {
  for (std::size_t length = 1; length <= 3 && length <= text.size(); ++length) {
    const auto byte = static_cast<unsigned char>(text[text.size() - length]);
    if ((byte & 0xC0U) == 0x80U) continue;
    if (byte < 0xC2 || byte > 0xF4) return 0;
    const std::size_t whole = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : 2;
    if (length >= whole) return 0;
    if (length == 1) return 1;
    // The second byte already decides whether this can become valid (no overlong form, no surrogate, not too large).
    const auto second = static_cast<unsigned char>(text[text.size() - length + 1]);
    const bool possible = !(byte == 0xE0 && second < 0xA0) && !(byte == 0xED && second >= 0xA0) &&
                          !(byte == 0xF0 && second < 0x90) && !(byte == 0xF4 && second >= 0x90);
    return possible ? length : 0;
  }
  return 0;
}

/// The property White_Space of Unicode.
constexpr bool is_white_space(std::uint32_t c) {
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

}  // namespace calm::inline CALM_ABI
