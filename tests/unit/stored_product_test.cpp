// Products with a weight of any storage type against those with its values, which are to have the same bits.
#include <doctest/doctest.h>
#include <calm/backend/cpu.hpp>
#include <calm/backend/cpu_stored.hpp>
#include <support/stored.hpp>
#include <support/values.hpp>

namespace stored_product_test {
using namespace calm_test;
using calm::Accumulate;
using calm::Assign;
using calm::CpuBackend;
using calm::DType;
using calm::StoredMatrix;

namespace {

const std::vector<Index> out_sizes = {1, 15, 33, 131};

/// Some lengths of rows: a block, more than a slice that is decoded at once, and what is no whole vector.
std::vector<Index> in_sizes(DType dtype) {
  const Index values = calm::block_of(dtype).values;
  if (values == 1) return {1, 3, 8, 37, 258, 517};
  return {values, 9 * 256 / values / 2 * values, 3 * 256};
}

void check_products(DType dtype, Index out, Index in, calm::MakeProducts products) {
  CAPTURE(calm::name_of(dtype));
  CAPTURE(out);
  CAPTURE(in);
  const StoredMatrix stored = random_stored(dtype, out, in, 1);
  const Matrix<float> dense = stored.dense<float>();
  CpuBackend one_thread(1, products), three_threads(3, products), dense_backend(2);
  const auto check = [&](CpuBackend& backend, Index rows, auto mode) {
    CAPTURE(&backend == &one_thread);
    CAPTURE(rows);
    const auto x = random_matrix<float>(rows, in, 2), dy = random_matrix<float>(rows, out, 3);
    Matrix<float> found = random_matrix<float>(rows, out, 4), expected = found;
    backend.multiply(backend.packed<float>(stored), constant(x), found.view(), mode);
    dense_backend.multiply(constant(dense), constant(x), expected.view(), mode);
    CHECK(same_bits(constant(found), constant(expected)));
    Matrix<float> dx = random_matrix<float>(rows, in, 5), dx_expected = dx;
    backend.multiply_input_gradient(backend.packed<float>(stored), constant(dy), dx.view(), mode);
    dense_backend.multiply_input_gradient(constant(dense), constant(dy), dx_expected.view(), mode);
    CHECK(same_bits(constant(dx), constant(dx_expected)));
  };
  // Every pair of rows, threads and mode; all three together would be twice as many products.
  for (const Index rows : {1, 9}) {
    check(one_thread, rows, Assign{});
    check(three_threads, rows, Accumulate{});
  }
  for (const Index rows : {2, 98}) {
    check(one_thread, rows, Accumulate{});
    check(three_threads, rows, Assign{});
  }
  const auto kept = static_cast<Index>(stored.packed_bytes());
  if (products == calm::stored_products) {
    CHECK(kept == 0);
  } else {  // rows are filled up to whole panels, and their last values to 16 bytes
    const Index panel = calm::cpu::panel_rows, rows = calm::ceil_divide(out, panel) * panel;
    CHECK(kept >= stored.stored_bytes());
    CHECK(kept < rows * (stored.row_bytes() + 16));
  }
}

}  // namespace

TEST_CASE("a weight of any storage type gives the bits of its values, for any shape, from its rows and interleaved") {
  for (const auto products : {calm::stored_products, calm::interleaved_products})
    for (const DType dtype : calm::all_dtypes)
      for (std::size_t out = 0; out < out_sizes.size(); ++out) {
        const std::vector<Index> in = in_sizes(dtype);
        for (std::size_t i = sanitized ? out % 2 : 0; i < in.size(); i += sanitized ? 2 : 1)
          check_products(dtype, out_sizes[out], in[i], products);
      }
}

TEST_CASE(
    "weights in bf16, and in f32 with values of bf16, are kept in 12 bits where bytes are looked up, without loss") {
  const bool compact = calm::cpu::CompactBf16::available;
  for (const Index out : {1, 32, 65, 131})
    for (const Index in : {8, 37, 264, 700}) {
      CAPTURE(out);
      CAPTURE(in);
      Matrix<float> values = random_matrix<float>(out, in, 1, 0.05);
      for (float& v : values.values()) v = calm::to_float(calm::to_bf16(v));
      values(0, 0) = 0;
      values(0, 1) = -0.0F;
      const auto kept = [&](DType dtype) {
        const auto stored = StoredMatrix::from(values, dtype), dense = StoredMatrix::from(values);
        const auto x = random_matrix<float>(40, in, 2);
        CpuBackend backend(2, calm::interleaved_products), own(1, calm::own_products);
        for (const Index rows : {1, 3, 40}) {
          Matrix<float> found(rows, out), expected(rows, out);
          backend.multiply(backend.packed<float>(stored), constant(x).middle_rows(0, rows), found.view(), Assign{});
          own.multiply(own.packed<float>(dense), constant(x).middle_rows(0, rows), expected.view(), Assign{});
          CHECK(same_bits(found, expected));
        }
        const double padded = static_cast<double>(calm::ceil_divide(out, calm::cpu::panel_rows) *
                                                  calm::cpu::panel_rows * calm::ceil_divide(in, Index{8}) * 8);
        return static_cast<double>(stored.packed_bytes()) / padded;  // bytes a value
      };
      CHECK((kept(DType::bf16) < 1.75) == compact);
      CHECK((kept(DType::f32) < 1.75) == compact);
      // Values of other exponents, in the first two, a middle and the last column, and in one panel alone; and one that
      // is no normal number.
      if (in >= 264) {
        values(out - 1, 0) = 0x1p100F;
        values(out - 1, 1) = -0x1p101F;
        values(out / 2, in / 2) = 0x1p-100F;
        values(0, in / 2 + 1) = 0x1p-130F;
        values(0, in - 1) = -0x1p60F;
        if (out > 1) CHECK(kept(DType::bf16) > 1.5);  // a single row may have few upper bytes
        CHECK((kept(DType::bf16) < 1.75) == compact);
        CHECK((kept(DType::f32) < 1.75) == compact);
      }
      values(out - 1, in - 1) = 1 + 0x1p-20F;  // of 32 bits
      CHECK(kept(DType::f32) > 3.9);
    }
}

TEST_CASE("bf16 weights of all exponents alike are kept as they are") {
  Matrix<float> values = random_matrix<float>(64, 256, 1);
  calm::Random random(3);
  for (float& v : values.values())
    v = calm::to_float(calm::to_bf16(std::ldexp(v, static_cast<int>(random.below(200)) - 100)));
  const auto stored = StoredMatrix::from(values, DType::bf16);
  CpuBackend backend(1, calm::interleaved_products);
  const auto x = random_matrix<float>(1, 256, 2);
  Matrix<float> y(1, 64);
  backend.multiply(backend.packed<float>(stored), constant(x), y.view(), Assign{});
  CHECK(stored.packed_bytes() == 2 * 64 * 256);
}

TEST_CASE("what is no number stays none in 12 bits") {
  for (const float special : {std::numeric_limits<float>::infinity(), not_a_number<float>}) {
    Matrix<float> values = random_matrix<float>(40, 300, 1);
    values(33, 77) = special;
    const auto stored = StoredMatrix::from(values, DType::bf16);
    CpuBackend backend(1, calm::interleaved_products);
    const auto x = random_matrix<float>(1, 300, 2);
    Matrix<float> y(1, 40);
    backend.multiply(backend.packed<float>(stored), constant(x), y.view(), Assign{});
    for (Index i = 0; i < 40; ++i) CHECK(std::isfinite(y(0, i)) == (i != 33));
  }
}

TEST_CASE("a quantised weight of which an interleaved copy would give other values is read as it is stored") {
  using namespace std::string_view_literals;
  const bool fused = calm::cpu::fused_multiply_add;
  const auto check = [&](DType dtype, std::string_view last, bool interleaved) {
    CAPTURE(calm::name_of(dtype));
    for (const Index out : {70, 78, 90}) {  // the last row in the first and the second half of a panel
      CAPTURE(out);
      const StoredMatrix stored = random_stored(dtype, out, 512, 7, last);
      const auto x = random_matrix<float>(9, 512, 8);
      CpuBackend backend(2, calm::interleaved_products), dense_backend(1);
      for (const Index rows : {1, 9}) {
        Matrix<float> found(rows, out), expected(rows, out);
        backend.multiply(backend.packed<float>(stored), constant(x).middle_rows(0, rows), found.view(), Assign{});
        dense_backend.multiply(constant(stored.dense<float>()), constant(x).middle_rows(0, rows), expected.view(),
                               Assign{});
        for (Index i = 0; i < rows; ++i) {
          const bool number = std::isfinite(expected(i, out - 1));
          CHECK(std::isnan(found(i, out - 1)) == std::isnan(expected(i, out - 1)));
          const Index columns = number ? out : out - 1;
          CHECK(same_bits(constant(found).middle_rows(i, 1).middle_cols(0, columns),
                          constant(expected).middle_rows(i, 1).middle_cols(0, columns)));
        }
      }
      CHECK((stored.packed_bytes() > 0) == interleaved);
    }
  };
  const auto far_apart = "\x01\x3A\x01\x00"sv, apart_in_last_group = "\x01\x3A\x01\x00\0\0\0\0\0\0\0\0\0\0\0\x11"sv;
  for (const DType dtype : {DType::q4_1, DType::q5_1, DType::q4_k, DType::q5_k}) {
    const bool exact = !fused || (calm::cpu::vector_bytes == 64 && (dtype == DType::q4_1 || dtype == DType::q4_k));
    check(dtype, far_apart, exact);             // 0.75 and the smallest f16
    check(dtype, "\x01\x00\x01\x78"sv, exact);  // the smallest, and 32,800
    check(dtype, "\x00\x7C\x00\x00"sv, exact);  // infinity
    check(dtype, "\x00\x3C\x00\xC8"sv, true);   // 1 and -8
    if (calm::block_of(dtype).values == 256) check(dtype, apart_in_last_group, exact);
  }
  for (const DType dtype : {DType::q8_0, DType::q4_0, DType::q5_0, DType::q6_k}) {
    const bool exact = !fused || (calm::cpu::vector_bytes == 64 && dtype == DType::q4_0);
    check(dtype, "\x00\x7C"sv, exact);  // infinity
    check(dtype, "\x01\x7E"sv, exact);  // no number
    check(dtype, "\xFF\x7B"sv, true);   // 65,504, the largest
    check(dtype, "\x01\x80"sv, true);   // -2^-24
  }
}

TEST_CASE("weights that are multiplied together give the bits that each gives alone") {
  const StoredMatrix weights[] = {random_stored(DType::q8_0, 70, 512, 1), random_stored(DType::bf16, 1, 512, 2),
                                  random_stored(DType::q6_k, 1000, 512, 3), random_stored(DType::f32, 33, 512, 4)};
  for (const auto products : {calm::own_products, calm::stored_products, calm::interleaved_products})
    for (const int threads : {1, 3})
      for (const Index rows : {0, 1, 5}) {
        CAPTURE(threads);
        CAPTURE(rows);
        CpuBackend backend(threads, products), dense_backend(1);
        const auto x = random_matrix<float>(rows, 512, 5);
        std::vector<Matrix<float>> found;
        for (const auto& weight : weights) found.push_back(random_matrix<float>(rows, weight.rows(), 6));
        std::vector<calm::FrozenProduct<float>> together;
        for (std::size_t i = 0; i < found.size(); ++i) together.push_back({&weights[i], found[i].view()});
        backend.multiply_each(constant(x), std::span<const calm::FrozenProduct<float>>(together));
        for (std::size_t i = 0; i < found.size(); ++i) {
          Matrix<float> expected(rows, weights[i].rows());
          dense_backend.multiply(constant(weights[i].dense<float>()), constant(x), expected.view(), Assign{});
          CHECK(same_bits(constant(found[i]), constant(expected)));
        }
      }
}

TEST_CASE("a row that is multiplied alone has the bits that it has among others") {
  for (const auto products : {calm::stored_products, calm::interleaved_products}) {
    CpuBackend backend(2, products);
    for (const DType dtype : calm::all_dtypes) {
      CAPTURE(calm::name_of(dtype));
      const StoredMatrix stored = random_stored(dtype, 70, 512, 7);
      const auto x = random_matrix<float>(780, 512, 8);
      Matrix<float> all(780, 70), alone(1, 70);
      backend.multiply(backend.packed<float>(stored), constant(x), all.view(), Assign{});
      for (const Index row : {0, 7, 64, 139, 779}) {
        backend.multiply(backend.packed<float>(stored), constant(x).middle_rows(row, 1), alone.view(), Assign{});
        CHECK(same_bits(constant(alone), constant(all).middle_rows(row, 1)));
      }
    }
  }
}

}  // namespace stored_product_test
