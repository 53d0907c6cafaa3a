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

inline std::string hash_digits(XXH128_hash_t hash) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  std::string digits;
  for (const unsigned char byte : canonical.digest) {
    digits += "0123456789abcdef"[byte >> 4];
    digits += "0123456789abcdef"[byte & 15];
  }
  return digits;
}

inline std::string content_hash(std::span<const std::byte> bytes) {
  return hash_digits(XXH3_128bits(bytes.data(), bytes.size()));
}

inline std::string content_hash(std::string_view text) { return content_hash(std::as_bytes(std::span(text))); }

/// content_hash of a text that comes in parts.
class ContentHasher {
 public:
  ContentHasher() { XXH3_128bits_reset(&state_); }
  void add(std::string_view part) { XXH3_128bits_update(&state_, part.data(), part.size()); }
  std::string digits() const { return hash_digits(XXH3_128bits_digest(&state_)); }

 private:
  XXH3_state_t state_{};
};

/// The hash of a file's bytes. Throws IoError.
inline std::string content_hash_of_file(const std::filesystem::path& path) {
  return content_hash(FileMap::open(path)->bytes());
}

}  // namespace calm::inline CALM_ABI
