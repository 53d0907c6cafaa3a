// Names and sizes of others in messages.
#pragma once

#include <calm/core/error.hpp>

#include <algorithm>
#include <span>
#include <string>
#include <string_view>

namespace calm::inline CALM_ABI {

/// Text of others for a message: control characters as '?' (those up to U+009F: terminals obey some), no more than
/// `most` bytes.
inline std::string printable(std::string_view text, std::size_t most) {
  std::size_t length = std::min(text.size(), most);
  while (length < text.size() && length > 0 && (static_cast<unsigned char>(text[length]) & 0xC0U) == 0x80U) --length;
  std::string result;
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  for (std::size_t i = 0; i < length; ++i) {
    const bool is_second_set = byte(i) == 0xC2 && i + 1 < length && byte(i + 1) >= 0x80 && byte(i + 1) < 0xA0;
    result += byte(i) < 0x20 || byte(i) == 0x7F || is_second_set ? '?' : text[i];
    if (is_second_set) ++i;
  }
  return length < text.size() ? result + "..." : result;
}

/// The same in quotes, for names.
inline std::string in_quotes(std::string_view text) { return '"' + printable(text, 80) + '"'; }

/// "[2, 3]".
inline std::string shape_text(std::span<const Index> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += message(i == 0 ? "" : ", ", shape[i]);
  return text + ']';
}

}  // namespace calm::inline CALM_ABI
