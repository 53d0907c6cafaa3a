#include <doctest/doctest.h>
#include <calm/core/random.hpp>
#include <calm/io/gguf.hpp>
#include <calm/io/safetensors.hpp>

#include <support/gguf_builder.hpp>

#include <cstring>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

namespace io_gguf_test {

namespace {

using calm::DType;
using calm::GgufType;
using calm::Index;
using calm::Matrix;
using calm::StoredMatrix;

calm::GgufFile open(const std::string& bytes) { return calm::GgufFile(calm::FileMap::of_bytes("m.gguf", bytes)); }

template <class Function>
std::string error_in(const Function& function) {
  try {
    function();
  } catch (const calm::FormatError& error) {
    return error.what();
  }
  return "no error";
}

std::string error_of(const std::string& bytes) {
  return error_in([&] { open(bytes); });
}
std::string error_of(const GgufBuilder& builder) { return error_of(builder.bytes()); }

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

Matrix<float> some_values(Index rows, Index cols) {
  Matrix<float> m(rows, cols);
  calm::Random random(7);
  for (float& x : m.values()) x = static_cast<float>(random.normal());
  return m;
}

constexpr auto one_f32 = std::string_view("\0\0\x80\x3f", 4);

/// Every type of value and of readable tensor in about 3 kB.
std::string small_file() {
  GgufBuilder builder;
  builder.set_string("general.architecture", "llama");
  builder.set_integer("general.alignment", 16);
  builder.alignment = 16;
  builder.set_number("i8", GgufType::i8, std::int8_t{-3});
  builder.set_number("u64", GgufType::u64, std::numeric_limits<std::uint64_t>::max());
  builder.set_number("f32", GgufType::f32, 0.5F);
  builder.set_number("f64", GgufType::f64, 1e300);
  builder.set_number("yes", GgufType::boolean, std::uint8_t{1});
  builder.set_strings("tokens", {"<s>", "", "a b"});
  builder.set_numbers<float>("scores", GgufType::f32, {0.5F, -1.5F});
  builder.set_numbers<std::int32_t>("kinds", GgufType::i32, {3, -1, 1});
  builder.set_numbers<std::uint8_t>("flags", GgufType::boolean, {1, 0});
  builder.set_numbers<std::uint8_t>("none", GgufType::u16, {});
  const Matrix<float> values = some_values(2, 32);
  for (const DType dtype : calm::all_dtypes) {
    const Index block = calm::block_of(dtype).values;
    const std::string name(calm::name_of(dtype));
    if (calm::is_encodable(dtype)) {
      builder.add_matrix(name, StoredMatrix::from(values, dtype));
    } else {
      const std::vector<std::byte> zeros(static_cast<std::size_t>(calm::bytes_of(dtype, block)));
      builder.add_matrix(name, StoredMatrix(nullptr, zeros.data(), dtype, 1, block));
    }
  }
  builder.add_tensor("vector", {1}, 0, std::string(one_f32));
  builder.add_tensor("scalar", {}, 0, std::string(one_f32));
  builder.add_tensor("cube", {1, 1, 1}, 0, std::string(one_f32));
  builder.add_tensor("empty", {0, 5}, 0, "");
  builder.add_tensor("ternary", {256}, 35, std::string(66, '\0'));
  return builder.bytes();
}

/// Reads everything that an opened file offers.
double sum_of(const calm::GgufFile& file) {
  double sum = 0;
  const auto& metadata = file.metadata();
  for (const auto& [key, value] : metadata.entries()) {
    if (value.type == GgufType::string) {
      if (value.is_array)
        for (const std::string_view text : metadata.get_strings(key)) sum += static_cast<double>(text.size());
      else sum += static_cast<double>(metadata.get_string(key).size());
    } else if (value.type == GgufType::boolean) {
      if (!value.is_array) sum += metadata.get_boolean(key) ? 1 : 0;
    } else {
      try {
        if (!value.is_array) sum += metadata.get_number(key);
        else
          for (const double x : metadata.get_numbers(key)) sum += x;
      } catch (const calm::FormatError&) {  // NaN, infinity, 64 bits
      }
    }
  }
  for (const auto& tensor : file.tensors()) {
    for (Index i = 0; i < tensor.bytes; ++i)  // also of types that have no reader
      sum += std::to_integer<int>(file.file()->data()[tensor.offset + i]);
    if (!tensor.type->dtype || tensor.rank > 2) continue;
    const StoredMatrix stored = file.matrix(tensor.name);
    if (stored.empty()) continue;  // a matrix of no values may have any number of rows
    const Matrix<float> values = stored.dense<float>();
    for (const float x : values.values()) sum += static_cast<double>(x);
  }
  return sum;
}

}  // namespace

TEST_CASE("a file that the package gguf wrote is read with all its values") {
  const auto folder = std::filesystem::path(CALM_TEST_DATA) / "quantised";
  const calm::GgufFile file(folder / "tiny.gguf");
  const calm::SafetensorsFile golden(folder / "golden.safetensors");
  const auto& metadata = file.metadata();
  constexpr Index least = std::numeric_limits<Index>::min();
  CHECK(file.version() == 3);
  CHECK(metadata.get_string("general.architecture") == "llama");
  CHECK(metadata.get_integer("test.uint8") == 200);
  CHECK(metadata.get_integer("test.int8", least) == -3);
  CHECK(metadata.get_integer("test.uint16") == 60000);
  CHECK(metadata.get_integer("test.int16", least) == -300);
  CHECK(metadata.get_integer("test.uint32") == 4000000000);
  CHECK(metadata.get_integer("test.int32", least) == -70000);
  CHECK(metadata.get_integer("test.uint64") == Index{1} << 62);
  CHECK(metadata.get_integer("test.int64", least) == -(Index{1} << 62));
  CHECK(metadata.get_number("test.float32") == 0.5);
  CHECK(metadata.get_number("test.float64") == 0.1);
  CHECK(metadata.get_number("test.int8") == -3);
  CHECK(metadata.get_boolean("test.bool"));
  CHECK(metadata.get_string("test.string") == "hé");
  CHECK(metadata.get_strings("test.strings") == std::vector<std::string_view>{"<s>", "", "▁a"});
  CHECK(metadata.get_integers("test.integers", least) == std::vector<Index>{1, -2, 3});
  CHECK(metadata.get_numbers("test.numbers") == std::vector<double>{0.5, -1.5});
  CHECK(metadata.entries().size() == 16);

  const StoredMatrix vector = file.matrix("vector", 1, 32), half = file.matrix("half", 2, 32);
  CHECK(half.dtype() == DType::f16);
  for (Index i = 0; i < 32; ++i) {
    CHECK(vector.dense<float>()(0, i) == static_cast<float>(i - 16));
    CHECK(half.dense<float>()(1, i) == static_cast<float>(i - 127) / 2);
  }
  for (const DType dtype : calm::all_dtypes) {
    const Index block = calm::block_of(dtype).values;
    if (block == 1) continue;
    const std::string name(calm::name_of(dtype));
    CAPTURE(name);
    const StoredMatrix found = file.matrix(name, 2, block);
    CHECK(found.dtype() == dtype);
    CHECK(std::memcmp(found.data(), golden.file()->data() + golden.entry(name + ".blocks").offset,
                      static_cast<std::size_t>(found.stored_bytes())) == 0);
  }
  CHECK(file.tensors().size() == 10);
}

TEST_CASE("a tensor stays in the mapped file and outlives its reader") {
  StoredMatrix q4;
  {
    const calm::GgufFile file(std::filesystem::path(CALM_TEST_DATA) / "quantised" / "tiny.gguf");
    q4 = file.matrix("q4_0");
    CHECK(q4.data() == file.file()->data() + file.entry("q4_0").offset);
    CHECK(file.entry("q4_0").offset % file.alignment() == 0);
  }
  CHECK(q4.dense<float>().size() == 64);
  CHECK_THROWS_AS(calm::GgufFile("/nowhere/m.gguf"), calm::IoError);
}

TEST_CASE("the first dimension of a tensor is the length of its rows") {
  GgufBuilder builder;
  const Matrix<float> values = some_values(3, 4);
  builder.add_matrix("w", StoredMatrix::from(values));
  const calm::GgufFile file = open(builder.bytes());
  const StoredMatrix w = file.matrix("w", 3, 4);
  CHECK(w.dense<float>()(1, 0) == values(1, 0));
  CHECK(file.entry("w").shape() == std::vector<Index>{3, 4});
  CHECK(error_in([&] { file.matrix("w", 4, 3); }) == R"(m.gguf: tensor "w" has the shape [3, 4]; expected [4, 3])");
  CHECK(error_in([&] { file.matrix("v"); }) == R"(m.gguf: has no tensor "v" among its 1)");
  CHECK(file.contains("w"));
  CHECK(!file.contains("v"));
}

TEST_CASE("versions 2 and 3, any alignment, gaps and bytes after the last tensor are read") {
  const calm::GgufFile small = open(small_file());
  CHECK(small.alignment() == 16);
  CHECK(small.matrix("scalar", 1, 1).dense<float>()(0, 0) == 1);
  CHECK(small.matrix("empty").empty());
  CHECK(has(error_in([&] { small.matrix("cube"); }), "has the shape [1, 1, 1]; a matrix or vector was expected"));
  CHECK(open(GgufBuilder().bytes()).tensors().empty());
  GgufBuilder builder;
  builder.version = 2;
  builder.add_entry("b", {1}, 0, 64);
  builder.add_entry("a", {1}, 0, 0);
  const calm::GgufFile file = open(builder.bytes() + std::string(64, '\0') + std::string(one_f32) + "more");
  CHECK(file.version() == 2);
  CHECK(file.matrix("a").dense<float>()(0, 0) == 0);
  CHECK(file.matrix("b").dense<float>()(0, 0) == 1);
  CHECK(file.tensors().front().name == "a");
}

TEST_CASE("a value that is missing or of another kind is an error that names the file and the key") {
  const calm::GgufFile file = open(small_file());
  const auto& metadata = file.metadata();
  CHECK(metadata.get_integers("kinds", -1) == std::vector<Index>{3, -1, 1});
  CHECK(metadata.get_integers("none").empty());
  CHECK(metadata.get_integer_or("x", 7) == 7);
  CHECK(metadata.get_integer_or("general.alignment", 7) == 16);
  CHECK(metadata.get_number_or("x", 0.5) == 0.5);
  CHECK(metadata.get_boolean_or("x", true));
  CHECK(metadata.get_string_or("x", "y") == "y");
  CHECK(error_in([&] { metadata.get_integer("x"); }) == R"(m.gguf: the metadata key "x" is missing)");
  CHECK(error_in([&] { metadata.get_integer("f32"); }) ==
        R"(m.gguf: key "f32": expected an integer, found a number with a fraction)");
  CHECK(error_in([&] { metadata.get_integer_or("tokens", 1); }) ==
        R"(m.gguf: key "tokens": expected a single value, found an array of values, each a string)");
  CHECK(has(error_in([&] { metadata.get_integer("i8"); }), "expected an integer of at least 0, found -3"));
  CHECK(has(error_in([&] { metadata.get_integer("i8", -2, 5); }), "expected an integer from -2 to 5, found -3"));
  CHECK(has(error_in([&] { metadata.get_integer("u64"); }), "found 18446744073709551615"));
  CHECK(has(error_in([&] { metadata.get_integers("kinds"); }), "of at least 0, found -1"));
  CHECK(
      has(error_in([&] { metadata.get_integers("scores"); }), "expected an array of integers, found an array of val"));
  CHECK(has(error_in([&] { metadata.get_integers("i8"); }), "expected an array, found an integer"));
  CHECK(has(error_in([&] { metadata.get_numbers("tokens"); }), "expected an array of numbers"));
  CHECK(has(error_in([&] { metadata.get_number("yes"); }), "expected a number, found a boolean"));
  CHECK(has(error_in([&] { metadata.get_boolean("i8"); }), "expected true or false, found an integer"));
  CHECK(has(error_in([&] { metadata.get_string("i8"); }), "expected a string, found an integer"));
  CHECK(has(error_in([&] { metadata.get_strings("kinds"); }), "expected an array of strings"));
  GgufBuilder builder;
  builder.set_number("nan", GgufType::f32, std::numeric_limits<float>::quiet_NaN());
  CHECK(has(error_in([&] { open(builder.bytes()).metadata().get_number("nan"); }), "is not a finite number"));
}

TEST_CASE("a tensor without rows may claim any number of columns") {
  constexpr std::uint64_t many = std::uint64_t{1} << 62;
  GgufBuilder builder;
  builder.add_tensor("wide", {many, 0}, 0, "");
  builder.add_tensor("quantised", {many, 0}, 2, "");
  builder.add_tensor("high", {0, many}, 0, "");
  const calm::GgufFile file = open(builder.bytes());
  for (const char* name : {"wide", "quantised", "high"}) CHECK(file.matrix(name).stored_bytes() == 0);
}

TEST_CASE("a tensor of a type that calm does not read hinders nobody until it is read") {
  const calm::GgufFile file = open(small_file());
  CHECK(file.entry("ternary").type->name == "TQ2_0");
  CHECK(has(error_in([&] { file.matrix("ternary"); }),
            R"(m.gguf: tensor "ternary": values of type TQ2_0 cannot be read; calm reads F32, F16, Q4_0)"));
}

TEST_CASE("hostile files are refused with the place and the reason") {
  CHECK(has(error_of(""), R"(m.gguf: byte 0: expected "GGUF", found "")"));
  CHECK(has(error_of("ggjt1234"), "it is no GGUF file"));
  CHECK(has(error_of("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"));
  CHECK(has(error_of(std::string("GGUF\0\0\0\3", 8) + std::string(16, '\0')), "big-endian"));
  CHECK(has(error_of(std::string("GGUF\1\0\0\0", 8) + std::string(16, '\0')), "is of version 1 of GGUF"));
  CHECK(has(error_of(std::string("GGUF\0\0\0\0", 8) + std::string(16, '\0')), "is of version 0 of GGUF"));
  CHECK(has(error_of("GGUF\3"), "byte 4: the version of the format takes 4 bytes, 1 are left"));

  GgufBuilder many;
  many.extra_tensors = std::numeric_limits<std::uint64_t>::max();
  CHECK(has(error_of(many), "the number of tensors: 18446744073709551615 do not fit into the 8 bytes"));
  many.extra_tensors = 0;
  many.extra_keys = 1;
  CHECK(has(error_of(many), "the number of metadata keys: 1 do not fit into the 0 bytes"));
  many.extra_keys = 1 << 17;
  CHECK(has(error_of(many.bytes() + std::string(13 << 17, '\0')), "131072 metadata keys; at most 65536 are read"));
  many.extra_keys = 0;
  many.extra_tensors = 1 << 19;
  CHECK(has(error_of(many.bytes() + std::string(24 << 19, '\0')), "524288 tensors; at most 262144 are read"));

  const auto with_value = [](const std::string& type_and_value) {
    GgufBuilder builder;
    builder.set_raw("k", type_and_value);
    return error_of(builder.bytes() + std::string(16, '\0'));
  };
  const auto type = GgufBuilder::type;
  const auto count = [](std::uint64_t n) { return GgufBuilder::raw(n); };
  const std::string array = type(GgufType::array);
  CHECK(has(with_value(GgufBuilder::raw(13U)), R"(m.gguf: byte 33: key "k": unknown type 13)"));
  CHECK(has(with_value(array + GgufBuilder::raw(99U)), R"(key "k": unknown type 99)"));
  CHECK(has(with_value(array + array + count(1)), R"(key "k": an array of arrays)"));
  CHECK(
      has(with_value(array + type(GgufType::u64) + count(3)), "elements of an array: 3 do not fit into the 16 bytes"));
  CHECK(has(with_value(array + type(GgufType::u64) + count(std::uint64_t{1} << 61)), "do not fit into the 16 bytes"));
  CHECK(has(with_value(array + type(GgufType::string) + count(17)), "17 do not fit into the 16 bytes"));
  CHECK(has(with_value(array + type(GgufType::string) + count(3)), "takes 8 bytes, 0 are left"));
  CHECK(has(with_value(type(GgufType::string) + count(17)), "a string: 17 do not fit into the 16 bytes"));
  CHECK(has(with_value(type(GgufType::boolean) + '\2'), R"(key "k": a boolean that is neither 0 nor 1)"));
  CHECK(has(with_value(array + type(GgufType::boolean) + count(2) + "\1\2"), "a boolean that is neither 0 nor 1"));
  CHECK(with_value(array + type(GgufType::u64) + count(2)) == "no error");

  GgufBuilder twice;
  twice.set_integer("k", 1);
  twice.set_integer("k", 1);
  CHECK(error_of(twice) == R"(m.gguf: the key "k" occurs twice)");
  for (const std::uint32_t alignment : {0U, 24U, 0x80000000U}) {
    GgufBuilder odd;
    odd.set_integer("general.alignment", alignment);
    CHECK(has(error_of(odd), R"(key "general.alignment")"));
  }
}

TEST_CASE("hostile tables of tensors are refused with the tensor and the reason") {
  const auto with_entry = [](const std::vector<std::uint64_t>& dimensions, std::uint32_t type, std::uint64_t offset) {
    GgufBuilder builder;
    builder.add_entry("t", dimensions, type, offset);
    return error_of(builder.bytes() + std::string(64, '\0'));
  };
  constexpr auto largest = static_cast<std::uint64_t>(std::numeric_limits<Index>::max());
  CHECK(with_entry({16}, 0, 0) == "no error");
  CHECK(with_entry({8}, 0, 32) == "no error");
  CHECK(has(with_entry({9}, 0, 32), R"(tensor "t": its 36 bytes from byte)"));
  CHECK(has(with_entry({1}, 0, 64), "end outside of the file"));
  CHECK(has(with_entry({17}, 0, 0), "its 68 bytes from byte 64 on end outside of the file of 128 bytes"));
  CHECK(has(with_entry({1}, 0, 4), "the offset 4 is not a multiple of the alignment, 32"));
  CHECK(has(with_entry({1}, 0, ~std::uint64_t{31}), "the offset 18446744073709551584 lies outside"));
  CHECK(has(with_entry({1}, 0, largest - 31), "lies outside of the file"));
  CHECK(has(with_entry({largest}, 0, 0), "does not fit into 63 bits"));
  CHECK(has(with_entry({largest + 1}, 0, 0), "the dimension 9223372036854775808 does not fit into 63 bits"));
  CHECK(has(with_entry({std::uint64_t{1} << 32, std::uint64_t{1} << 32}, 0, 0), "does not fit into 63 bits"));
  CHECK(has(with_entry({1, 1, 1, 1, 1}, 0, 0), "5 dimensions; GGUF has at most 4"));
  CHECK(has(with_entry({33}, 2, 0), "rows of 33 values are not whole blocks of Q4_0, which have 32"));
  CHECK(has(with_entry({128, 2}, 12, 0), "rows of 128 values are not whole blocks of Q4_K, which have 256"));
  CHECK(has(with_entry({1}, 4, 0), R"(tensor "t": unknown type 4)"));
  CHECK(has(with_entry({1}, 0xFFFFFFFFU, 0), "unknown type 4294967295"));

  GgufBuilder twice;
  twice.add_tensor("t", {1}, 0, std::string(one_f32));
  twice.add_tensor("t", {1}, 0, std::string(one_f32));
  CHECK(error_of(twice) == R"(m.gguf: two tensors are named "t")");
  GgufBuilder overlap;
  overlap.add_entry("a", {16}, 0, 0);
  overlap.add_entry("b", {1}, 0, 32);
  CHECK(
      has(error_of(overlap.bytes() + std::string(64, '\0')), R"(tensor "b": begins at byte 128 of the file, inside)"));
}

TEST_CASE("a file cut off at any byte is refused") {
  const std::string bytes = small_file();
  REQUIRE(error_of(bytes) == "no error");
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    CAPTURE(length);
    const std::string error = error_of(bytes.substr(0, length));
    CHECK(error != "no error");
    CHECK(has(error, "m.gguf: "));
  }
}

TEST_CASE("10,000 mutated files open to values that can be read, or are refused") {
  const std::string good = small_file();
  const auto header = static_cast<std::size_t>(open(good).tensors().front().offset);
  calm::Random random(2);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random.below(static_cast<Index>(n))); };
  int valid = 0;
  double sum = 0;
  for (int round = 0; round < 10000; ++round) {
    std::string bytes = good;
    for (Index i = random.below(4); i >= 0; --i) {
      const std::size_t place = below(random.below(8) == 0 ? bytes.size() : std::min(header, bytes.size()));
      const Index kind = random.below(5);
      if (kind <= 1) bytes[place] = static_cast<char>(random.below(256));
      else if (kind == 2) bytes[place] = static_cast<char>(bytes[place] ^ (1 << random.below(8)));
      else if (kind == 3) bytes.erase(place, 1 + below(9));
      else bytes.insert(place, bytes.substr(below(bytes.size()), 9));
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

}  // namespace io_gguf_test
