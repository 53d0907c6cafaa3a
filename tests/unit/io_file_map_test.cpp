#include <doctest/doctest.h>
#include <calm/io/content_hash.hpp>
#include <calm/io/file_map.hpp>
#include <support/temporary_folder.hpp>

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

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

/// Bytes of a map that are in memory, as Linux counts them.
calm::Index resident(const calm::FileMap& map) {
  std::ostringstream address;
  address << std::hex << reinterpret_cast<std::uintptr_t>(map.data()) << '-';
  std::ifstream maps("/proc/self/smaps");
  std::string line;
  while (std::getline(maps, line) && !line.starts_with(address.str())) continue;
  while (std::getline(maps, line))
    if (line.starts_with("Rss:")) return 1024 * std::stoll(line.substr(4));
  return -1;
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

TEST_CASE(
    "a weight of a mapped file is in memory once: packed, its pages go back to the system, and can be read again") {
  const Folder folder;
  const calm::Index rows = 1024, cols = 1000;
  std::vector<float> values(static_cast<std::size_t>(rows * cols));
  std::iota(values.begin(), values.end(), 0.0F);
  const auto path =
      folder.write("f", "head" + std::string(reinterpret_cast<const char*>(values.data()), 4 * values.size()));
  const auto map = calm::FileMap::open(path);
  const calm::StoredMatrix weight(map, map->data() + 4, calm::DType::f32, rows, cols, map->release());
  const calm::StoredMatrix rest = weight.middle_rows(rows / 2, rows / 2);
  CHECK(weight.dense<float>()(rows - 1, cols - 1) == values.back());
  CHECK(resident(*map) >= map->size() - 4);
  struct Packed {
    calm::Matrix<float> values;
    std::size_t bytes() const { return values.bytes(); }
  };
  const auto& packed = rest.packed<Packed>([&] { return Packed{rest.dense<float>()}; });
  CHECK(packed.values(rows / 2 - 1, cols - 1) == values.back());
  CHECK(resident(*map) < map->size() / 2 + 10'000);
  const auto again = weight.dense<float>();
  CHECK(std::equal(values.begin(), values.end(), again.data()));
  CHECK((calm::FileMap::of_bytes("copy", "bytes")->release() == nullptr));
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
