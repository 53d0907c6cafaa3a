// The one place of the library that reads preprocessor switches.
//
// CALM_ABI names the inline namespace that holds everything. It differs for every combination of CALM_WITH_... flags,
// so that two translation units built with different flags fail to link instead of mixing silently.
#pragma once

#include <cstdint>

#define CALM_ABI eigen_cpu

namespace calm::inline CALM_ABI {

/// Every size and index of the library; signed, so that differences are safe.
using Index = std::int64_t;

/// A token of a model's vocabulary.
using TokenId = std::int32_t;

}  // namespace calm::inline CALM_ABI
