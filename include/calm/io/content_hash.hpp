// XXH3-128 of bytes and files: tells two contents apart and finds a changed file; no protection against an attacker.
// 32 lower-case hexadecimal digits in the canonical (big-endian) order, as `xxh128sum` prints them.
#pragma once

#include <calm/io/file_map.hpp>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace calm::inline CALM_ABI {

inline std::string content_hash(std::span<const std::byte> bytes) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(bytes.data(), bytes.size()));
  std::string digits;
  for (const unsigned char byte : canonical.digest) {
    digits += "0123456789abcdef"[byte >> 4];
    digits += "0123456789abcdef"[byte & 15];
  }
  return digits;
}

inline std::string content_hash(std::string_view text) { return content_hash(std::as_bytes(std::span(text))); }

/// The hash of a file's bytes. Throws IoError.
inline std::string content_hash_of_file(const std::filesystem::path& path) {
  return content_hash(FileMap::open(path)->bytes());
}

}  // namespace calm::inline CALM_ABI
