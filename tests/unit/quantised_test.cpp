#include <doctest/doctest.h>
#include <calm/backend/cpu.hpp>
#include <calm/backend/reference.hpp>
#include <calm/core/random.hpp>
#include <calm/io/safetensors.hpp>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

namespace quantised_test {

namespace {

using calm::DType;
using calm::Index;
using calm::Matrix;
using calm::StoredMatrix;

constexpr std::array quantised_types{DType::q8_0, DType::q4_0, DType::q4_1, DType::q5_0,
                                     DType::q5_1, DType::q4_k, DType::q5_k, DType::q6_k};
constexpr std::array encodable_types{DType::q8_0, DType::q4_0, DType::q4_1, DType::q5_0, DType::q5_1};

/// What the package gguf computed (tests/golden/make_quantised_goldens.py).
const calm::SafetensorsFile& golden() {
  static const calm::SafetensorsFile file(std::filesystem::path(CALM_TEST_DATA) / "quantised" / "golden.safetensors");
  return file;
}

std::string named(DType dtype, const std::string& tensor) { return std::string(calm::name_of(dtype)) + "." + tensor; }

const std::byte* bytes_of_tensor(const std::string& name) {
  return golden().file()->data() + golden().entry(name).offset;
}

Matrix<float> random_values(Index rows, Index cols) {
  Matrix<float> m(rows, cols);
  calm::Random random(3);
  for (float& x : m.values()) x = static_cast<float>(random.normal());
  return m;
}

}  // namespace

TEST_CASE("a block has as many values and bytes as GGUF says") {
  const auto is = [](DType dtype, Index values, Index bytes) {
    return calm::block_of(dtype).values == values && calm::block_of(dtype).bytes == bytes;
  };
  CHECK(is(DType::f64, 1, 8));
  CHECK(is(DType::bf16, 1, 2));
  CHECK(is(DType::q8_0, 32, 34));
  CHECK(is(DType::q4_0, 32, 18));
  CHECK(is(DType::q4_1, 32, 20));
  CHECK(is(DType::q5_0, 32, 22));
  CHECK(is(DType::q5_1, 32, 24));
  CHECK(is(DType::q4_k, 256, 144));
  CHECK(is(DType::q5_k, 256, 176));
  CHECK(is(DType::q6_k, 256, 210));
  static_assert(calm::bytes_of(DType::q4_0, 96) == 54);
  for (const DType dtype : calm::all_dtypes)
    CHECK(calm::is_encodable(dtype) == (calm::name_of(dtype).find('k') == std::string::npos));
}

TEST_CASE("blocks are read as gguf reads them, bit for bit") {
  for (const DType dtype : quantised_types) {
    CAPTURE(calm::name_of(dtype));
    const auto& entry = golden().entry(named(dtype, "blocks"));
    const Matrix<float> expected = golden().matrix(named(dtype, "values")).dense<float>();
    REQUIRE(entry.shape[1] == calm::block_of(dtype).bytes);
    REQUIRE(expected.cols() == calm::block_of(dtype).values);
    REQUIRE(expected.rows() >= 10);
    const StoredMatrix stored(golden().file(), bytes_of_tensor(entry.name), dtype, expected.rows(), expected.cols());
    CHECK(stored.stored_bytes() == entry.bytes);
    CHECK(std::memcmp(stored.dense<float>().data(), expected.data(), sizeof(float) * expected.values().size()) == 0);
    const Matrix<double> wide = stored.dense<double>();
    for (Index i = 0; i < wide.size(); ++i) CHECK(wide.data()[i] == static_cast<double>(expected.data()[i]));
    std::vector<float> row(static_cast<std::size_t>(expected.cols()));
    stored.read_rows(7, 1, row.data());
    CHECK(std::equal(row.begin(), row.end(), expected.data() + 7 * expected.cols()));
  }
}

TEST_CASE("values are quantised as gguf quantises them, bit for bit") {
  const Matrix<float> source = golden().matrix("source").dense<float>();
  const Index block = 32;
  for (const DType dtype : encodable_types) {
    CAPTURE(calm::name_of(dtype));
    const auto& entry = golden().entry(named(dtype, "encoded"));
    const StoredMatrix stored = StoredMatrix::from(source, dtype);
    REQUIRE(stored.stored_bytes() == entry.bytes);
    for (Index row = 0; row < source.rows(); ++row) {
      CAPTURE(row);
      const Index bytes = calm::bytes_of(dtype, block);
      CHECK(std::memcmp(stored.data() + row * bytes, bytes_of_tensor(entry.name) + row * bytes,
                        static_cast<std::size_t>(bytes)) == 0);
    }
  }
}

TEST_CASE("a quantised value is near the value that it was made of") {
  const Matrix<float> values = random_values(5, 96);
  for (const DType dtype : encodable_types) {
    CAPTURE(calm::name_of(dtype));
    const Matrix<float> read = StoredMatrix::from(values, dtype).dense<float>();
    const double levels = dtype == DType::q8_0 ? 254 : dtype == DType::q4_0 || dtype == DType::q4_1 ? 15 : 31;
    float largest = 0;
    for (const float x : values.values()) largest = std::max(largest, std::abs(x));
    for (Index i = 0; i < values.size(); ++i)
      CHECK(std::abs(read.data()[i] - values.data()[i]) <= 2.1 * static_cast<double>(largest) / levels);
  }
}

TEST_CASE("values that are not numbers are quantised without harm") {
  Matrix<float> values = random_values(4, 32);
  values(0, 3) = std::numeric_limits<float>::quiet_NaN();
  values(1, 4) = std::numeric_limits<float>::infinity();
  values(2, 5) = std::numeric_limits<float>::max();
  values(2, 6) = std::numeric_limits<float>::lowest();
  for (Index i = 0; i < 32; ++i) values(3, i) *= std::numeric_limits<float>::denorm_min();
  for (const DType dtype : encodable_types) CHECK(StoredMatrix::from(values, dtype).dense<float>().size() == 128);
}

TEST_CASE("a row that is not whole blocks is refused") {
  const Matrix<float> values = random_values(32, 40);
  for (const DType dtype : quantised_types) {
    CHECK_THROWS_AS(StoredMatrix::from(values, dtype), calm::ShapeError);
    CHECK_THROWS_AS(StoredMatrix(nullptr, nullptr, dtype, 64, 40), calm::ShapeError);
    float target[40];
    CHECK_THROWS_AS(calm::decode(dtype, nullptr, 40, target), calm::ShapeError);
    CHECK(StoredMatrix(nullptr, nullptr, dtype, 0, 0).empty());
  }
  try {
    (void)calm::bytes_of(DType::q6_k, 40);
    FAIL("no error");
  } catch (const calm::ShapeError& error) {
    CHECK(std::string(error.what()) == "40 values of type q6_k are not whole blocks of 256");
  }
}

TEST_CASE("types that can only be read say so when values are to be made") {
  for (const DType dtype : {DType::q4_k, DType::q5_k, DType::q6_k})
    CHECK_THROWS_AS(StoredMatrix::from(random_values(1, 256), dtype), calm::ConfigError);
}

TEST_CASE("safetensors has no quantised types") {
  const Matrix<float> values = random_values(2, 32);
  calm::SafetensorsWriter writer;
  CHECK_THROWS_AS(writer.add("w", values, DType::q8_0), calm::ConfigError);
  CHECK_THROWS_AS(writer.add("w", {2, 32}, StoredMatrix::from(values, DType::q8_0)), calm::ConfigError);
}

TEST_CASE("a quantised weight is multiplied and gathered as its values") {
  const Matrix<float> values = random_values(37, 64), x = random_values(5, 64);
  for (const DType dtype : encodable_types) {
    const StoredMatrix stored = StoredMatrix::from(values, dtype);
    const Matrix<float> dense = stored.dense<float>();
    const auto run = [&](auto backend, const StoredMatrix& weight) {
      Matrix<float> y(5, 37), rows(2, 64);
      backend.multiply(backend.template packed<float>(weight), calm::MatrixView<const float>(x.view()), y.view(),
                       calm::Assign{});
      const std::vector<calm::TokenId> ids = {36, 7};
      backend.gather(weight, std::span<const calm::TokenId>(ids), rows.view());
      CHECK(std::equal(rows.data(), rows.data() + 64, dense.data() + 36 * 64));
      return y;
    };
    const auto same = [](const Matrix<float>& a, const Matrix<float>& b) {
      return std::equal(a.values().begin(), a.values().end(), b.values().begin());
    };
    CHECK(same(run(calm::ReferenceBackend(), stored), run(calm::ReferenceBackend(), StoredMatrix::from(dense))));
    CHECK(same(run(calm::CpuBackend(1), stored), run(calm::CpuBackend(1), StoredMatrix::from(dense))));
  }
}

}  // namespace quantised_test
