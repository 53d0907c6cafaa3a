#include <doctest/doctest.h>
#include <calm/io/atomic_file.hpp>
#include <calm/io/file_map.hpp>
#include <support/temporary_folder.hpp>

#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

namespace io_atomic_file_test {

namespace {

struct Folder : calm_test::TemporaryFolder {
  int files() const {
    int count = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(path)) ++count;
    return count;
  }
};

std::string read(const std::filesystem::path& path) { return std::string(calm::FileMap::open(path)->text()); }

/// Counts the calls to the system and fails at call number `at`, or ends the process there.
struct FaultyFiles {
  enum Fault { fails, is_killed };
  Fault fault;
  int at;
  int* calls;
  calm::PosixFiles system{};

  bool strikes() {
    if (++*calls != at) return false;
    if (fault == is_killed) ::_exit(0);
    errno = ENOSPC;
    return true;
  }
  int create(const char* path, ::mode_t mode) { return strikes() ? -1 : system.create(path, mode); }
  ::ssize_t write(int file, const std::byte* bytes, std::size_t count) {
    const bool will_strike = *calls + 1 == at;
    if (will_strike && count > 1) (void)system.write(file, bytes, count / 2);  // the disk takes a part of it
    return strikes() ? -1 : system.write(file, bytes, count > 3 ? 3 : count);  // and short writes before
  }
  int sync(int file) { return strikes() ? -1 : system.sync(file); }
  int close(int file) {
    const int result = system.close(file);
    return strikes() ? -1 : result;
  }
  int rename(const char* from, const char* to) { return strikes() ? -1 : system.rename(from, to); }
  int remove(const char* path) { return system.remove(path); }
  int sync_folder(const char* path) { return strikes() ? -1 : system.sync_folder(path); }
};

const std::string old_text = "the old file", new_text = "the new file, which is longer";

void write_new(const std::filesystem::path& path, FaultyFiles files) {
  calm::write_file_atomically(
      path,
      [](auto& file) {
        file.write(std::string_view(new_text).substr(0, 10));
        file.write(std::string_view(new_text).substr(10));
      },
      files);
}

/// The calls of one undisturbed writing.
int calls_of_writing() {
  const Folder folder;
  int calls = 0;
  write_new(folder.path / "f", {FaultyFiles::fails, -1, &calls});
  return calls;
}

}  // namespace

TEST_CASE("a file is written whole, in place of an old one or of none") {
  const Folder folder;
  const auto path = folder.path / "f";
  calm::write_file_atomically(path, old_text);
  CHECK(read(path) == old_text);
  int calls = 0;
  write_new(path, {FaultyFiles::fails, -1, &calls});
  CHECK(read(path) == new_text);
  CHECK(folder.files() == 1);
  CHECK(calls >= 14);  // the short writes above were all continued
  calm::write_file_atomically(path, "");
  CHECK(read(path).empty());
}

TEST_CASE("files that belong together are both replaced or neither, whichever call fails before the second name") {
  const auto write_both = [](const Folder& folder, int at, int* calls) {
    calm::AtomicFile<FaultyFiles> first(folder.path / "a", {FaultyFiles::fails, at, calls}),
        second(folder.path / "b", {FaultyFiles::fails, at, calls});
    first.write(new_text);
    second.write(new_text);
    calm::commit_together(first, second);
  };
  int all = 0;
  {
    const Folder folder;
    write_both(folder, -1, &all);
    CHECK(read(folder.path / "a") == new_text);
    CHECK(read(folder.path / "b") == new_text);
  }
  for (int at = 1; at <= all; ++at) {
    CAPTURE(at);
    const Folder folder;
    for (const char* name : {"a", "b"}) calm::write_file_atomically(folder.path / name, old_text);
    int calls = 0;
    CHECK_THROWS_AS(write_both(folder, at, &calls), calm::IoError);
    const bool second_name = at == all - 2;  // its rename, and the two folders behind it, are the last calls
    CHECK((read(folder.path / "a") == read(folder.path / "b")) == !second_name);
    CHECK(folder.files() == 2);
  }
}

TEST_CASE("a call that fails, whichever, leaves the old file and no temporary") {
  const int calls = calls_of_writing();
  for (int at = 1; at <= calls; ++at) {
    CAPTURE(at);
    const Folder folder;
    const auto path = folder.path / "f";
    calm::write_file_atomically(path, old_text);
    int made = 0;
    std::string error;
    try {
      write_new(path, {FaultyFiles::fails, at, &made});
    } catch (const calm::IoError& caught) {
      error = caught.what();
    }
    CHECK(error.find(path.string()) != std::string::npos);
    CHECK(error.find("No space left on device") != std::string::npos);
    CHECK(read(path) == (at == calls ? new_text : old_text));  // the last call comes after the rename
    CHECK(folder.files() == 1);
  }
}

TEST_CASE("a process that is killed at any call leaves the old file or the new one") {
  const int calls = calls_of_writing();
  for (int at = 1; at <= calls; ++at) {
    CAPTURE(at);
    const Folder folder;
    const auto path = folder.path / "f";
    calm::write_file_atomically(path, old_text);
    const ::pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      int made = 0;
      try {
        write_new(path, {FaultyFiles::is_killed, at, &made});
      } catch (...) {
      }
      ::_exit(1);  // it was not killed
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    CHECK(read(path) == (at == calls ? new_text : old_text));
    int made = 0;
    write_new(path, {FaultyFiles::fails, -1, &made});  // what the killed one left behind is in nobody's way
    CHECK(read(path) == new_text);
  }
}

TEST_CASE("a full disk leaves the old file") {
  const Folder folder;
  const auto path = folder.path / "f";
  calm::write_file_atomically(path, old_text);
  ::rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  ::rlimit small = before;
  small.rlim_cur = 1000;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  std::string error;
  try {
    calm::write_file_atomically(path, std::string(5000, 'x'));
  } catch (const calm::IoError& caught) {
    error = caught.what();
  }
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
  CHECK(error.find("after 1000 bytes: File too large") != std::string::npos);
  CHECK(read(path) == old_text);
  CHECK(folder.files() == 1);
}

TEST_CASE("an exception of the producer leaves the old file") {
  const Folder folder;
  const auto path = folder.path / "f";
  calm::write_file_atomically(path, old_text);
  const auto produce = [](auto& file) {
    file.write("half");
    throw std::runtime_error("no more");
  };
  CHECK_THROWS_AS(calm::write_file_atomically(path, produce), std::runtime_error);
  CHECK(read(path) == old_text);
  CHECK(folder.files() == 1);
}

TEST_CASE("what is no file is not replaced") {
  const Folder folder;
  const auto pipe = folder.path / "pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  CHECK_THROWS_AS(calm::write_file_atomically(pipe, "x"), calm::IoError);
  CHECK(std::filesystem::is_fifo(pipe));
  std::filesystem::create_directory(folder.path / "sub");
  CHECK_THROWS_AS(calm::write_file_atomically(folder.path / "sub", "x"), calm::IoError);
  CHECK_THROWS_AS(calm::write_file_atomically(folder.path / "missing" / "f", "x"), calm::IoError);
  CHECK_THROWS_AS(calm::write_file_atomically("", "x"), calm::IoError);
  CHECK(folder.files() == 2);
}

TEST_CASE("a symbolic link is replaced, and what it names is left alone") {
  const Folder folder;
  calm::write_file_atomically(folder.path / "target", old_text);
  std::filesystem::create_symlink("target", folder.path / "link");
  calm::write_file_atomically(folder.path / "link", new_text);
  CHECK(read(folder.path / "target") == old_text);
  CHECK(read(folder.path / "link") == new_text);
}

TEST_CASE("the new file has the permissions of the old one") {
  const Folder folder;
  const auto path = folder.path / "f";
  calm::write_file_atomically(path, old_text);
  REQUIRE(::chmod(path.c_str(), 0640) == 0);
  calm::write_file_atomically(path, new_text);
  struct stat status {};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  CHECK((status.st_mode & 07777U) == 0640U);
}

}  // namespace io_atomic_file_test
