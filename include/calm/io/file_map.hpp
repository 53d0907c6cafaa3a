// FileMap: the bytes of a regular file, mapped read-only and shared. Nothing is copied; the system loads a page when it
// is first read.
//
// A file that another program shortens while it is mapped is outside of what this can catch (the system answers with a
// signal); replacing it by rename, as calm writes files, leaves the map whole.
#pragma once

#include <calm/core/error.hpp>
#include <calm/tensor/stored_matrix.hpp>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

namespace calm::inline CALM_ABI {

class FileMap {
 public:
  /// Maps the file at `path`, which may be empty. Throws IoError where it cannot be read or is no regular file.
  static std::shared_ptr<const FileMap> open(const std::filesystem::path& path) {
    std::shared_ptr<FileMap> map(new FileMap(path.string()));
    map->load();
    return map;
  }

  /// A copy of `bytes` that stands for a file called `name`, for tests and for data that came from elsewhere.
  static std::shared_ptr<const FileMap> of_bytes(std::string name, std::string_view bytes) {
    std::shared_ptr<FileMap> map(new FileMap(std::move(name)));
    map->copy_ = Matrix<std::byte>(1, static_cast<Index>(bytes.size()));
    if (!bytes.empty()) std::memcpy(map->copy_.data(), bytes.data(), bytes.size());
    map->data_ = map->copy_.data();
    map->size_ = map->copy_.size();
    return map;
  }

  FileMap(const FileMap&) = delete;
  FileMap& operator=(const FileMap&) = delete;
  ~FileMap() {
    if (mapped_) ::munmap(const_cast<std::byte*>(data_), static_cast<std::size_t>(size_));
  }

  /// The path as it was given to open().
  const std::string& path() const { return path_; }
  /// Null where the file is empty.
  const std::byte* data() const { return data_; }
  Index size() const { return size_; }
  std::span<const std::byte> bytes() const { return {data_, static_cast<std::size_t>(size_)}; }
  /// What gives the whole pages in some of the bytes back to the system, which has them in the file; null for a copy.
  ReleaseBytes release() const { return mapped_ ? &release_pages : nullptr; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), static_cast<std::size_t>(size_)}; }

 private:
  explicit FileMap(std::string path) : path_(std::move(path)) {}

  struct Descriptor {
    int number;
    ~Descriptor() {
      if (number >= 0) ::close(number);
    }
  };

  static std::string reason() { return std::generic_category().message(errno); }

  static void release_pages(const std::byte* data, Index bytes) {
    static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t begin = (address + page - 1) / page * page,
                         end = (address + static_cast<std::uintptr_t>(bytes)) / page * page;
    // What a private mapping that nobody writes to is read from again. A system that refuses keeps the pages.
    if (begin < end) ::madvise(const_cast<std::byte*>(data) + (begin - address), end - begin, MADV_DONTNEED);
  }

  void load() {
    // Without O_NONBLOCK, opening a named pipe would wait for somebody who writes to it.
    const Descriptor file{::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    require<IoError>(file.number >= 0, path_, ": cannot be opened: ", reason());
    struct stat status {};
    const int examined = ::fstat(file.number, &status);
    require<IoError>(examined == 0, path_, ": cannot be examined: ", reason());
    require<IoError>(!S_ISDIR(status.st_mode), path_, ": is a folder; a file was expected");
    require<IoError>(S_ISREG(status.st_mode), path_, ": is not a regular file");
    if (status.st_size == 0) return;  // mmap refuses a length of 0
    require<IoError>(static_cast<std::uintmax_t>(status.st_size) <= std::numeric_limits<std::size_t>::max(), path_,
                     ": its ", status.st_size, " bytes do not fit into this machine's address space");
    void* address = ::mmap(nullptr, static_cast<std::size_t>(status.st_size), PROT_READ, MAP_PRIVATE, file.number, 0);
    require<IoError>(address != MAP_FAILED, path_, ": its ", status.st_size, " bytes cannot be mapped: ", reason());
    data_ = static_cast<const std::byte*>(address);
    size_ = status.st_size;
    mapped_ = true;
  }

  std::string path_;
  const std::byte* data_ = nullptr;
  Index size_ = 0;
  bool mapped_ = false;
  Matrix<std::byte> copy_;
};

}  // namespace calm::inline CALM_ABI
