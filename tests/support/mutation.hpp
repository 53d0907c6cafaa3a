// Damaged files for tests of readers.
#pragma once

#include <calm/core/random.hpp>

#include <string>
#include <vector>

namespace calm_test {

/// One to three changes of single bytes, runs of bytes and numbers.
inline std::string mutated(std::string bytes, calm::Random& random) {
  static const std::vector<std::string> pieces = {
      "0", "-1", "0.5", "4294967296", "9223372036854775807", "1e400", "true", "null", "\"\"", "[[[[", "{}", "\\",
      ",", ":",  "../", "\xFF",       std::string(1, '\0')};
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random.below(static_cast<calm::Index>(n))); };
  for (std::size_t n = 1 + below(3); n > 0 && !bytes.empty(); --n) {
    const std::size_t at = below(bytes.size());
    const std::size_t digit = bytes.find_first_of("0123456789", at);
    switch (below(6)) {
      case 0: bytes[at] = static_cast<char>(below(256)); break;
      case 1: bytes.erase(at, 1 + below(8)); break;
      case 2: bytes.insert(at, pieces[below(pieces.size())]); break;
      case 3: bytes.insert(at, bytes.substr(below(bytes.size()), below(40))); break;
      case 4:  // a value for another
        if (digit != std::string::npos)
          bytes.replace(digit, bytes.find_first_not_of("0123456789.", digit) - digit, pieces[below(pieces.size())]);
        break;
      default:
        if (digit != std::string::npos) bytes[digit] = static_cast<char>('0' + below(10));
    }
  }
  return bytes;
}

}  // namespace calm_test
