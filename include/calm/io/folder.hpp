// Folders and files by name, where the file system's refusal is an IoError.
#pragma once

#include <calm/core/error.hpp>

#include <filesystem>
#include <string>
#include <system_error>

namespace calm::inline CALM_ABI {

/// Whether something has this name; what may not be looked at is taken as missing, and opening it says why.
inline bool is_there(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::exists(path, ignored);
}
inline bool is_folder(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::is_directory(path, ignored);
}

/// Makes a folder, and those above it, where they are missing. Throws IoError.
inline void make_folder(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  require<IoError>(is_folder(path), path.string(),
                   ": the folder cannot be made: ", error ? error.message() : std::string("a file has this name"));
}

}  // namespace calm::inline CALM_ABI
