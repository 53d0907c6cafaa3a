// Folders and files by name, where the file system's refusal is an IoError.
#pragma once

#include <calm/core/error.hpp>

#include <filesystem>
#include <string>
#include <system_error>

namespace calm::inline CALM_ABI {

/// Whether something has this name. Throws IoError where that cannot be looked at.
inline bool is_there(const std::filesystem::path& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  require<IoError>(std::filesystem::status_known(status), path.string(), ": cannot be looked at: ", error.message());
  return std::filesystem::exists(status);
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
