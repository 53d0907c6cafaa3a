// The preprocessor switches of the library.
//
// CALM_ABI names the inline namespace that holds everything. It differs for every combination of CALM_WITH_... flags,
// so that two translation units built with different flags fail to link instead of mixing silently. CALM_WITH_ONEDNN
// (the CMake target calm::onednn defines it) makes oneDNN the default of CpuBackend's products (backend/cpu.hpp).
#pragma once

#include <cstdint>

#ifdef CALM_WITH_ONEDNN
#define CALM_ABI eigen_cpu_onednn
#else
#define CALM_ABI eigen_cpu
#endif

namespace calm::inline CALM_ABI {

/// Every size and index of the library; signed, so that differences are safe.
using Index = std::int64_t;

/// A token of a model's vocabulary.
using TokenId = std::int32_t;

}  // namespace calm::inline CALM_ABI
