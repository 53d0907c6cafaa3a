// What the fuzz targets share. A target reads any bytes as a file of one format and touches all that an opened file
// offers; it passes where the bytes are refused with a typed error. A crash, another exception, a hang or a large
// allocation stops libFuzzer, which keeps the bytes as crash-*.
#pragma once

#include <calm/core/error.hpp>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

namespace fuzz {

/// A folder for files that must lie on the disk; removed at the end.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "calm-fuzz-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) std::abort();
    path_ = name;
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  const std::filesystem::path& path() const { return path_; }

  /// Not atomic, and so much faster than calm's own writer.
  std::filesystem::path write(const std::string& name, std::string_view bytes) const {
    std::filesystem::remove(path_ / name);  // some file systems wait for the disk where a file is cut to nothing first
    std::ofstream(path_ / name, std::ios::binary) << bytes;
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

inline std::string_view text_of(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

inline volatile double sink = 0;

/// Keeps the compiler from leaving out what computes x.
inline void use(double x) { sink = x; }

}  // namespace fuzz
