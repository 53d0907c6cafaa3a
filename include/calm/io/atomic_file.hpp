// AtomicFile: a file that appears under its name whole or not at all.
//
// The bytes go to a temporary in the same folder (`.NAME.PID-N.tmp`); commit() brings them to the disk and renames the
// temporary over the name. Whatever fails before leaves the old file as it was and removes the temporary; a process
// that is killed leaves the old file and perhaps a temporary, which nothing reads. A symbolic link is replaced, not
// followed, so that a cache of linked files is never written through.
#pragma once

#include <calm/core/error.hpp>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <concepts>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

namespace calm::inline CALM_ABI {

/// The calls to the system that AtomicFile makes; each returns -1 and sets errno where it fails. Tests give another
/// class with the same functions, which fails or ends the process at a call of their choice.
struct PosixFiles {
  int create(const char* path, ::mode_t mode) { return ::open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode); }
  ::ssize_t write(int file, const std::byte* bytes, std::size_t count) { return ::write(file, bytes, count); }
  int sync(int file) { return ::fsync(file); }
  int close(int file) { return ::close(file); }
  int rename(const char* from, const char* to) { return ::rename(from, to); }
  int remove(const char* path) { return ::unlink(path); }
  int sync_folder(const char* path) {
    const int folder = ::open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return -1;
    const int result = ::fsync(folder);
    const int error = errno;
    ::close(folder);
    errno = error;
    return result != 0 && error == EINVAL ? 0 : result;  // some file systems cannot sync a folder, nor need it
  }
};

template <class System = PosixFiles>
class AtomicFile {
 public:
  /// Makes the temporary. The folder must exist. Throws IoError.
  explicit AtomicFile(std::filesystem::path path, System system = {})
      : path_(std::move(path)), system_(std::move(system)) {
    require<IoError>(path_.has_filename(), path_.string(), ": is no name for a file");
    const std::optional<::mode_t> old_mode = mode_of_old_file();
    for (int attempt = 0; file_ < 0; ++attempt) {
      temporary_ = path_.parent_path() / message('.', path_.filename().string(), '.', ::getpid(), '-', attempt, ".tmp");
      file_ = system_.create(temporary_.c_str(), 0666);
      require<IoError>(file_ >= 0 || (errno == EEXIST && attempt < 10000), path_.string(),
                       ": cannot be written: ", temporary_.string(), ": ", reason(errno));
    }
    // Where the mode cannot be kept (a file system without modes) the default one has to do.
    if (old_mode && ::fchmod(file_, *old_mode) != 0) errno = 0;
  }

  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile() { discard(); }

  /// Appends the bytes. Throws IoError where the disk is full, and so on; the file is then lost, the old one is not.
  void write(const std::byte* bytes, Index count) {
    while (count > 0) {
      // Linux writes at most 2 GiB - 4 KiB at once; smaller steps cost nothing.
      const auto step = static_cast<std::size_t>(std::min<Index>(count, Index{1} << 26));
      const ::ssize_t written = system_.write(file_, bytes, step);
      if (written < 0 && errno == EINTR) continue;
      require<IoError>(written > 0, path_.string(), ": writing failed after ", size_,
                       " bytes: ", reason(written == 0 ? ENOSPC : errno), untouched);
      bytes += written;
      count -= written;
      size_ += written;
    }
  }

  void write(std::string_view text) {
    write(reinterpret_cast<const std::byte*>(text.data()), static_cast<Index>(text.size()));
  }

  /// Brings the bytes to the disk, which may be full, under the name of the temporary: before the commit() of the first
  /// of several files that belong together.
  void finish() {
    if (file_ < 0) return;
    check(system_.sync(file_), ": writing failed: ");
    check(system_.close(std::exchange(file_, -1)), ": writing failed: ");
    finished_ = true;
  }

  /// Brings the bytes to the disk and gives them their name.
  void commit() {
    put_in_place();
    sync_folder();
  }

  /// The two halves of commit(): the name, and the folder that holds it on the disk.
  void put_in_place() {
    finish();
    require<IoError>(finished_, path_.string(), ": its writing has failed before; it cannot be put in its place");
    check(system_.rename(temporary_.c_str(), path_.c_str()), ": cannot be put in its place: ");
    temporary_.clear();
  }
  void sync_folder() {
    const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : std::filesystem::path(".");
    const int synced = system_.sync_folder(folder.c_str());
    require<IoError>(synced == 0, path_.string(),
                     ": the new file is in its place, but a crash of the machine may undo ",
                     "that: its folder cannot be brought to the disk: ", reason(errno));
  }

  const std::filesystem::path& path() const { return path_; }
  /// Bytes written so far.
  Index size() const { return size_; }

 private:
  static constexpr std::string_view untouched = "; what was there before is unchanged";

  static std::string reason(int error) { return std::generic_category().message(error); }

  void check(int result, std::string_view failure) const {
    require<IoError>(result == 0, path_.string(), failure, reason(errno), untouched);
  }

  std::optional<::mode_t> mode_of_old_file() const {
    struct stat status {};
    if (::stat(path_.c_str(), &status) != 0) return {};
    // A rename would put a plain file in the place of a device or a pipe.
    require<IoError>(S_ISREG(status.st_mode), path_.string(),
                     S_ISDIR(status.st_mode) ? ": is a folder" : ": is a device",
                     ", not a file that could be replaced");
    return status.st_mode & 07777U;
  }

  void discard() noexcept {
    if (file_ >= 0) system_.close(std::exchange(file_, -1));
    if (!temporary_.empty()) system_.remove(temporary_.c_str());
    temporary_.clear();
  }

  std::filesystem::path path_, temporary_;
  System system_;
  int file_ = -1;
  bool finished_ = false;
  Index size_ = 0;
};

/// Gives files that belong together their names only when the disk holds all of them. A kill between the names, or a
/// rename that is refused, leaves the first new and the rest old.
void commit_together(auto&... files) {
  (files.finish(), ...);
  (files.put_in_place(), ...);
  (files.sync_folder(), ...);
}

/// Writes the file at `path`: `produce(file)` calls file.write(...) as often as it likes. An exception, of the system
/// or of `produce`, leaves what was there before.
template <class Produce, class System = PosixFiles>
requires std::invocable < Produce&, AtomicFile<System>
& > void write_file_atomically(const std::filesystem::path& path, Produce&& produce, System system = {}) {
  AtomicFile<System> file(path, std::move(system));
  produce(file);
  file.commit();
}

/// Writes `text` as the whole of the file at `path`.
template <class System = PosixFiles>
void write_file_atomically(const std::filesystem::path& path, std::string_view text, System system = {}) {
  write_file_atomically(
      path, [&](AtomicFile<System>& file) { file.write(text); }, std::move(system));
}

}  // namespace calm::inline CALM_ABI
