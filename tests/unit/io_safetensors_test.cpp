#include <doctest/doctest.h>
#include <calm/core/random.hpp>
#include <calm/io/safetensors.hpp>

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

namespace io_safetensors_test {

namespace {

using calm::DType;
using calm::Index;
using calm::Matrix;

struct Text {
  std::string bytes;
  void write(const std::byte* data, Index count) {
    bytes.append(reinterpret_cast<const char*>(data), static_cast<std::size_t>(count));
  }
};

std::string bytes_of(const calm::SafetensorsWriter& writer) {
  Text text;
  writer.write_to(text);
  return text.bytes;
}

calm::SafetensorsFile open(const std::string& bytes) {
  return calm::SafetensorsFile(calm::FileMap::of_bytes("f.safetensors", bytes));
}

/// The file with this header and `values` bytes after it.
std::string with_header(const std::string& header, std::size_t values = 0) {
  const std::uint64_t length = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + std::string(values, '\1');
}

std::string error_of(const std::string& bytes) {
  try {
    open(bytes);
  } catch (const calm::FormatError& error) {
    return error.what();
  }
  return "no error";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

Matrix<float> some_values(Index rows, Index cols) {
  Matrix<float> m(rows, cols);
  calm::Random random(7);
  for (float& x : m.values()) x = static_cast<float>(random.normal());
  return m;
}

/// A file of every dtype with a vector, a scalar, an empty tensor and metadata.
std::string small_file() {
  const Matrix<float> a = some_values(2, 3), v = some_values(1, 5);
  const Matrix<double> d(2, 2);
  calm::SafetensorsWriter writer;
  writer.add<float>("half", {5}, v.values(), DType::f16);
  writer.add("a", a);
  writer.add<float>("none", {0, 4}, {});
  writer.add("d", d);
  writer.add<float>("b", {5, 1}, v.values(), DType::bf16);
  writer.add<float>("gate", {}, v.values().first(1));
  writer.set_metadata("format", "pt");
  writer.set_metadata("q\"\n", "é");
  return bytes_of(writer);
}

/// Reads everything that an opened file offers.
double sum_of(const calm::SafetensorsFile& file) {
  double sum = 0;
  for (const auto& tensor : file.tensors()) {
    if (!calm::dtype_of_safetensors_name(tensor.dtype) || tensor.shape.size() > 2) continue;
    const calm::StoredMatrix stored = file.matrix(tensor.name);
    if (stored.empty()) continue;  // a matrix of no values may have any number of rows
    const Matrix<double> values = stored.dense<double>();
    for (const double x : values.values()) sum += x;
  }
  return sum;
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

}  // namespace

TEST_CASE("a tensor of every dtype comes back with the values that its type can hold") {
  const Matrix<float> values = some_values(3, 4);
  Matrix<double> exact(3, 4);
  for (Index i = 0; i < 12; ++i) exact.data()[i] = static_cast<double>(values.data()[i]) + 1e-12;
  calm::SafetensorsWriter writer;
  for (const DType dtype : {DType::bf16, DType::f32, DType::f16, DType::f64})
    writer.add("t." + std::string(name_of(dtype)), exact, dtype);
  const calm::SafetensorsFile file = open(bytes_of(writer));
  CHECK(file.matrix("t.f64", 3, 4).dtype() == DType::f64);
  CHECK(file.matrix("t.bf16", 3, 4).dtype() == DType::bf16);
  for (const DType dtype : {DType::bf16, DType::f32, DType::f16, DType::f64}) {
    const Matrix<double> read = file.matrix("t." + std::string(name_of(dtype)), 3, 4).dense<double>();
    const Matrix<double> expected = calm::StoredMatrix::from(exact, dtype).dense<double>();
    for (Index i = 0; i < 12; ++i) CHECK(read.data()[i] == expected.data()[i]);
  }
  CHECK(file.matrix("t.f64").dense<double>()(2, 3) == exact(2, 3));
}

TEST_CASE("the bytes are those that the format describes") {
  Matrix<float> m(1, 2);
  m(0, 0) = 1;
  m(0, 1) = -2;
  calm::SafetensorsWriter writer;
  writer.add<float>("b", {2}, m.values(), DType::bf16);
  writer.add("a", m);
  writer.set_metadata("k", "v");
  std::string header = R"({"__metadata__":{"k":"v"},"b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},)"
                       R"("a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}})";
  header.resize(184, ' ');  // 8 + 184 is a multiple of 64
  const std::string expected =
      std::string("\xb8\0\0\0\0\0\0\0", 8) + header + std::string("\0\0\x80\x3f\0\0\0\xc0\x80\x3f\0\xc0", 12);
  CHECK(bytes_of(writer) == expected);
  CHECK(bytes_of(writer) == bytes_of(writer));
}

TEST_CASE("a writer without tensors writes a file without tensors") {
  const calm::SafetensorsFile file = open(bytes_of(calm::SafetensorsWriter()));
  CHECK(file.tensors().empty());
  CHECK(file.metadata().empty());
}

TEST_CASE("a file on the disk is read in place and outlives its reader") {
  std::string folder = (std::filesystem::temp_directory_path() / "calm-safetensors-XXXXXX").string();
  REQUIRE(::mkdtemp(folder.data()) != nullptr);
  const auto path = std::filesystem::path(folder) / "m.safetensors";
  const Matrix<float> values = some_values(300, 400);  // more than the writer encodes at once
  calm::SafetensorsWriter writer;
  writer.add("w", values);
  writer.write(path);
  CHECK(calm::FileMap::open(path)->text() == bytes_of(writer));
  calm::StoredMatrix w;
  {
    const calm::SafetensorsFile file(path);
    w = file.matrix("w", 300, 400);
    CHECK(w.data() == file.file()->data() + file.entry("w").offset);
  }
  const float* in_place = w.in_place<float>();
  REQUIRE(in_place != nullptr);
  CHECK(reinterpret_cast<std::uintptr_t>(in_place) % 64 == 0);
  CHECK(std::equal(in_place, in_place + values.size(), values.data()));
  CHECK_THROWS_AS(calm::SafetensorsFile(path.string() + "x"), calm::IoError);
  std::filesystem::remove_all(folder);
}

TEST_CASE("every tensor is aligned to its type, also after one of an odd size") {
  const calm::SafetensorsFile file = open(small_file());
  for (const auto& tensor : file.tensors())
    CHECK(tensor.offset % bytes_of(*calm::dtype_of_safetensors_name(tensor.dtype), 1) == 0);
  CHECK(file.tensors().front().offset % 64 == 0);
  CHECK(file.metadata().at("q\"\n") == "é");
  CHECK(file.matrix("half").rows() == 1);
  CHECK(file.matrix("half").cols() == 5);
  CHECK(file.matrix("gate", 1, 1).size() == 1);
  CHECK(file.matrix("b", 5, 1).rows() == 5);
  CHECK(file.matrix("none", 0, 4).empty());
}

TEST_CASE("stored values are copied bit for bit") {
  Matrix<float> values(1, 3);
  values(0, 0) = std::numeric_limits<float>::quiet_NaN();
  values(0, 1) = -0.0F;
  const calm::StoredMatrix stored = calm::StoredMatrix::from(values, DType::bf16);
  calm::SafetensorsWriter writer;
  writer.add("x", {3}, stored);
  const calm::SafetensorsFile file = open(bytes_of(writer));
  CHECK(std::memcmp(file.matrix("x").data(), stored.data(), 6) == 0);
}

TEST_CASE("a tensor that is missing or of another shape is an error that names it, both shapes and the file") {
  const calm::SafetensorsFile file = open(small_file());
  const auto error = [&](const std::string& name, Index rows, Index cols) {
    try {
      file.matrix(name, rows, cols);
    } catch (const calm::FormatError& caught) {
      return std::string(caught.what());
    }
    return std::string("no error");
  };
  CHECK(error("a", 3, 2) == R"(f.safetensors: tensor "a" has the shape [2, 3]; expected [3, 2])");
  CHECK(error("half", 1, 6) == R"(f.safetensors: tensor "half" has the shape [5]; expected [6])");
  CHECK(error("half", 5, 1) == R"(f.safetensors: tensor "half" has the shape [5]; expected [5, 1])");
  CHECK(error("lm_head", 3, 2) == R"(f.safetensors: has no tensor "lm_head" among its 6)");
  CHECK(file.contains("a"));
  CHECK(!file.contains("aa"));
  CHECK(!file.contains(""));
}

TEST_CASE("a tensor of a dtype that calm does not read hinders nobody until it is read") {
  const std::string bytes =
      with_header(R"({"ids":)" + entry("I64", "[2]", "[0,16]") + R"(,"x":)" + entry("F32", "[1]", "[16,20]") +
                      R"(,"f4":)" + entry("F4", "[2]", "[20,21]") + "}",
                  21);
  const calm::SafetensorsFile file = open(bytes);
  CHECK(file.matrix("x").size() == 1);
  CHECK(file.entry("ids").dtype == "I64");
  try {
    file.matrix("ids");
    FAIL("an I64 tensor was read");
  } catch (const calm::FormatError& error) {
    CHECK(has(error.what(), R"(tensor "ids": values of dtype I64 cannot be read)"));
  }
}

TEST_CASE("mistakes in what is to be written are errors that name the tensor") {
  const Matrix<float> m = some_values(2, 2);
  calm::SafetensorsWriter writer;
  writer.add("m", m);
  CHECK_THROWS_AS(writer.add("m", m), calm::ConfigError);
  CHECK_THROWS_AS(writer.add("__metadata__", m), calm::ConfigError);
  CHECK_THROWS_AS(writer.add<float>("n", {3}, m.values()), calm::ShapeError);
  CHECK_THROWS_AS(writer.add<float>("n", {-2, -2}, m.values()), calm::FormatError);
  writer.add("\xff", m);
  CHECK_THROWS_AS(bytes_of(writer), calm::FormatError);
}

TEST_CASE("hostile headers are refused with the place and the reason") {
  const std::string f32 = entry("F32", "[1]", "[0,4]");
  const auto one = [](const std::string& tensor) { return R"({"t":)" + tensor + "}"; };
  REQUIRE(error_of(with_header(one(f32), 4)) == "no error");

  CHECK(has(error_of(""), "f.safetensors: byte 0: the length of the header takes 8 bytes, the file has 0"));
  CHECK(has(error_of(std::string(7, '\0')), "the file has 7"));
  CHECK(has(error_of(std::string(8, '\0')), "byte 8: the header does not begin with '{'"));
  CHECK(has(error_of(std::string(8, '\xff') + "{}"), "a header of 18446744073709551615 bytes in a file of 10"));
  CHECK(has(error_of(std::string("\xff\xff\xff\xff\xff\xff\xff\x7f{}", 10)), "a header of 9223372036854775807"));
  CHECK(has(error_of(std::string("\3\0\0\0\0\0\0\0{}", 10)), "a header of 3 bytes in a file of 10"));
  CHECK(has(error_of("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"));
  CHECK(has(error_of(with_header(" {}")), "does not begin with '{'"));
  CHECK(has(error_of(with_header("{} x")), "not valid JSON"));
  CHECK(has(error_of(with_header(std::string("{}\0\0", 4))), "byte 2: not valid JSON"));

  CHECK(has(error_of(with_header(R"({"t":)" + f32 + R"(,"t":)" + f32 + "}", 4)), R"(the key "t" occurs twice)"));
  CHECK(has(error_of(with_header(one(R"({"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]})"), 4)),
            R"(in "t": the key "dtype" occurs twice)"));
  std::string deep = "{\"t\":";
  for (int i = 0; i < 100000; ++i) deep += '[';
  CHECK(has(error_of(with_header(deep)), "levels of nesting"));

  CHECK(
      has(error_of(with_header(one("[]"))), R"(tensor "t": expected an object with the key "dtype", found an array)"));
  CHECK(has(error_of(with_header(one("{}"))), R"(tensor "t": the key "dtype" is missing)"));
  CHECK(has(error_of(with_header(one(entry("F99", "[1]", "[0,4]")), 4)), R"(tensor "t": unknown dtype "F99")"));
  CHECK(has(error_of(with_header(one(entry("F32", "1", "[0,4]")), 4)), R"("shape": expected an array)"));
  CHECK(has(error_of(with_header(one(entry("F32", "[-1]", "[0,4]")), 4)), "shape: expected an integer of at least 0"));
  CHECK(
      has(error_of(with_header(one(entry("F32", "[1.0]", "[0,4]")), 4)), "shape: expected an integer, found a number"));
  CHECK(has(error_of(with_header(one(entry("F32", "[4294967296,4294967296]", "[0,4]")), 4)),
            "does not fit into 63 bits"));
  CHECK(
      has(error_of(with_header(one(entry("F32", "[2305843009213693952]", "[0,4]")), 4)), "does not fit into 63 bits"));
  CHECK(has(error_of(with_header(one(entry("F32", "[18446744073709551617]", "[0,4]")), 4)),
            "shape: expected an integer"));
  CHECK(has(error_of(with_header(one(entry("F4", "[1]", "[0,1]")), 1)), "do not end with a byte"));
  CHECK(has(error_of(with_header(one(entry("F32", "[" + std::string("1,") + std::string(62, '1') + "]", "[0,4]")), 4)),
            "shape: expected an integer"));

  CHECK(has(error_of(with_header(one(entry("F32", "[1]", "[0]")), 4)), "data_offsets: expected [begin, end], found 1"));
  CHECK(has(error_of(with_header(one(entry("F32", "[1]", "[-4,0]")), 4)), "data_offsets: expected an integer of at"));
  CHECK(has(error_of(with_header(one(entry("F32", "[1]", "[4,0]")), 4)), "data_offsets [4, 0] do not lie in the 4"));
  CHECK(has(error_of(with_header(one(entry("F32", "[1]", "[0,4]")), 3)), "do not lie in the 3 bytes"));
  CHECK(has(error_of(with_header(one(entry("F32", "[1]", "[9223372036854775804,9223372036854775807]")), 4)),
            "do not lie in the 4 bytes"));
  CHECK(has(error_of(with_header(one(entry("F32", "[2]", "[0,4]")), 4)), "hold 4 bytes; F32 [2] takes 8"));
  CHECK(has(error_of(with_header(one(entry("F32", "[1]", "[4,8]")), 8)), "with a gap after the values before it"));
  CHECK(has(error_of(with_header(one(f32), 5)), "1 bytes after the last tensor belong to none"));
  const std::string overlap =
      R"({"s":)" + entry("F32", "[2]", "[0,8]") + R"(,"t":)" + entry("F32", "[2]", "[4,12]") + "}";
  CHECK(has(error_of(with_header(overlap, 12)), R"(tensor "t": begins at byte)"));
  CHECK(has(error_of(with_header(overlap, 12)), "inside the values before it"));

  CHECK(
      has(error_of(with_header(R"({"__metadata__":{"k":1}})")), R"("__metadata__": "k": expected a string, found an)"));
  CHECK(has(error_of(with_header(R"({"__metadata__":"k"})")), R"("__metadata__": expected an object, found a string)"));
}

TEST_CASE("a file cut off at any byte is refused") {
  const std::string bytes = small_file();
  REQUIRE(error_of(bytes) == "no error");
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    CAPTURE(length);
    const std::string error = error_of(bytes.substr(0, length));
    CHECK(error != "no error");
    CHECK(has(error, "f.safetensors: "));
  }
  CHECK(error_of(bytes + 'x') != "no error");
}

TEST_CASE("10,000 mutated files open to tensors that can be read, or are refused") {
  const std::string good = small_file();
  calm::Random random(2);
  const auto place_in = [&](const std::string& text) {
    return static_cast<std::size_t>(random.below(static_cast<Index>(text.size())));
  };
  const std::size_t value_bytes = good.size() - static_cast<std::size_t>(open(good).tensors().front().offset);
  int valid = 0;
  double sum = 0;
  for (int round = 0; round < 10000; ++round) {
    std::string bytes = good;
    for (Index i = random.below(4); i >= 0; --i) {
      const std::size_t place = place_in(bytes);
      const Index kind = random.below(5);
      if (kind == 0) bytes[place] = static_cast<char>(random.below(256));
      else if (kind == 1) bytes.erase(place, 1 + static_cast<std::size_t>(random.below(9)));
      else if (kind == 2) bytes.insert(place, bytes.substr(place_in(bytes), 9));
      else if (kind == 3) bytes[place] = "0123456789[]{}\",-"[static_cast<std::size_t>(random.below(17))];
      else bytes[place_in(good) % 8] = static_cast<char>(random.below(256));
      // Mostly let the length of the header follow, so that the mutation is seen behind it.
      if (random.below(8) != 0 && bytes.size() > 8 + value_bytes) {
        const std::uint64_t length = bytes.size() - 8 - value_bytes;
        std::memcpy(bytes.data(), &length, 8);
      }
    }
    try {
      sum += sum_of(open(bytes));
      ++valid;
    } catch (const calm::FormatError&) {
    }
  }
  CAPTURE(sum);
  CHECK(valid > 500);
  CHECK(valid < 9500);
}

}  // namespace io_safetensors_test
