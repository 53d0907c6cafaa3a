#include <doctest/doctest.h>
#include <calm/io/content_hash.hpp>
#include <calm/io/file_map.hpp>
#include <support/temporary_folder.hpp>

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace io_file_map_test {

namespace {

struct Folder : calm_test::TemporaryFolder {
  std::filesystem::path write(const std::string& name, const std::string& text) const {
    std::ofstream(path / name, std::ios::binary) << text;
    return path / name;
  }
};

std::string message_of_open(const std::filesystem::path& path) {
  try {
    calm::FileMap::open(path);
  } catch (const calm::IoError& error) {
    return error.what();
  }
  return "no error";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("a mapped file shows the bytes of the file") {
  const Folder folder;
  const std::string text("one\0two\xff", 8);
  const auto map = calm::FileMap::open(folder.write("f", text));
  CHECK(map->size() == 8);
  CHECK(map->text() == text);
  CHECK(map->bytes()[7] == std::byte{0xFF});
  CHECK(map->path() == (folder.path / "f").string());
}

TEST_CASE("a map keeps its bytes when the file is replaced or removed") {
  const Folder folder;
  const auto path = folder.write("f", "old");
  const auto map = calm::FileMap::open(path);
  std::filesystem::rename(folder.write("g", "new"), path);
  CHECK(map->text() == "old");
  CHECK(calm::FileMap::open(path)->text() == "new");
  std::filesystem::remove(path);
  CHECK(map->text() == "old");
}

TEST_CASE("an empty file is a map of no bytes") {
  const Folder folder;
  const auto map = calm::FileMap::open(folder.write("empty", ""));
  CHECK(map->size() == 0);
  CHECK(map->bytes().empty());
}

TEST_CASE("bytes in memory stand for a file") {
  std::string text = "abc";
  const auto map = calm::FileMap::of_bytes("somewhere", text);
  text = "xyz";
  CHECK(map->text() == "abc");
  CHECK(map->path() == "somewhere");
  CHECK(calm::FileMap::of_bytes("nothing", "")->size() == 0);
}

TEST_CASE("a file that cannot be opened is an error with its path and the reason") {
  const Folder folder;
  const auto missing = folder.path / "missing";
  CHECK(has(message_of_open(missing), missing.string()));
  CHECK(has(message_of_open(missing), "No such file or directory"));
  CHECK(has(message_of_open(folder.path), "is a folder"));
}

TEST_CASE("a pipe is refused and not waited for") {
  const Folder folder;
  const auto pipe = folder.path / "pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  CHECK(has(message_of_open(pipe), "is not a regular file"));
  CHECK(has(message_of_open("/dev/null"), "is not a regular file"));
}

TEST_CASE("a content hash is XXH3-128 as xxh128sum prints it") {
  CHECK(calm::content_hash("") == "99aa06d3014798d86001c324468d497f");
  CHECK(calm::content_hash("a") == "a96faf705af16834e6c632b61e964e1f");
  const Folder folder;
  const auto path = folder.write("f", std::string(100000, 'q') + "end");
  CHECK(calm::content_hash_of_file(path) == calm::content_hash(std::string(100000, 'q') + "end"));
  CHECK(calm::content_hash_of_file(path) != calm::content_hash(std::string(100000, 'q') + "enD"));
}

}  // namespace io_file_map_test
