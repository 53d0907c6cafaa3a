// Integer arithmetic that refuses to overflow: every size that was read from a file goes through here.
#pragma once

#include <calm/core/error.hpp>

#include <limits>

namespace calm::inline CALM_ABI {

/// a * b; throws FormatError where the product does not fit. Both must be >= 0.
inline Index checked_multiply(Index a, Index b, const std::string& what) {
  require<FormatError>(a >= 0 && b >= 0, what, ": a size is negative (", a, ", ", b, ")");
  require<FormatError>(b == 0 || a <= std::numeric_limits<Index>::max() / b, what, ": the size ", a, " x ", b,
                       " does not fit into 63 bits");
  return a * b;
}

/// a + b; throws FormatError where the sum does not fit. Both must be >= 0.
inline Index checked_add(Index a, Index b, const std::string& what) {
  require<FormatError>(a >= 0 && b >= 0, what, ": a size is negative (", a, ", ", b, ")");
  require<FormatError>(a <= std::numeric_limits<Index>::max() - b, what, ": the size ", a, " + ", b,
                       " does not fit into 63 bits");
  return a + b;
}

/// The smallest integer that is not below a / b, for a >= 0 and b > 0.
constexpr Index ceil_divide(Index a, Index b) { return (a + b - 1) / b; }

}  // namespace calm::inline CALM_ABI
