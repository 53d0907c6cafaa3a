// What the benchmark programs share: products by name, the memory of this process.
#pragma once

#include <calm/backend/cpu.hpp>
#include <calm/backend/cpu_bf16.hpp>
#include <calm/backend/cpu_stored.hpp>

#include <sys/resource.h>

#include <cmath>
#include <string>
#include <vector>

/// The names that products_named() knows.
inline const std::vector<std::string> names_of_products = {
    "packed", "stored",      "interleaved", "bf16",
#ifdef CALM_WITH_ONEDNN
    "onednn", "onednn-bf16",
#endif
};

/// Products with frozen weights: packed in f32, as they are stored, the same interleaved, or packed in bf16; packed by
/// oneDNN in f32 or bf16.
inline calm::MakeProducts products_named(const std::string& name) {
  if (name == "stored") return calm::stored_products;
  if (name == "interleaved") return calm::interleaved_products;
  if (name == "bf16") return calm::bf16_products;
#ifdef CALM_WITH_ONEDNN
  if (name == "onednn") {
    calm::require<calm::ConfigError>(
        calm::onednn_keeps_bits(),
        "--products onednn needs AVX-512 (without it calm multiplies by its own products): use interleaved or packed");
    return calm::onednn_products;
  }
  if (name == "onednn-bf16") return calm::onednn_bf16_products;
#endif
  return calm::own_products;
}

/// The largest resident memory of this process so far.
inline double peak_resident_mb() {
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  return std::round(static_cast<double>(used.ru_maxrss) / 1024);  // ru_maxrss is in KiB
}
