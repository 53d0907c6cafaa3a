// Products by oneDNN against calm's own: the values, the bits that must not depend on threads, what is refused. The
// other tests meet them as the default of a build with CALM_WITH_ONEDNN.
#include <doctest/doctest.h>
#include <calm/backend/cpu_onednn.hpp>
#include <calm/calm.hpp>
#include <support/models.hpp>
#include <support/stored.hpp>
#include <support/values.hpp>

#include <tuple>

namespace onednn_test {
using namespace calm_test;
using calm::Accumulate;
using calm::Assign;
using calm::CpuBackend;
using calm::StoredMatrix;

namespace {

/// Values that are exact in bf16: products of them are exact in f32.
Matrix<float> coarse_matrix(Index rows, Index cols, std::uint64_t seed) {
  auto m = random_matrix<float>(rows, cols, seed);
  for (float& x : m.values()) x = calm::to_float(calm::to_bf16(x));
  return m;
}

/// bf16 products by oneDNN need AVX-512; elsewhere they are refused by a sentence that says what to use.
std::vector<calm::MakeProducts> all_products() {
  try {
    CpuBackend(1, calm::onednn_bf16_products);
  } catch (const calm::ConfigError& error) {
    CHECK(contains(error.what(), "use calm::bf16_products"));
    return {calm::onednn_products};
  }
  return {calm::onednn_products, calm::onednn_bf16_products};
}

template <class Mode>
void check_products(calm::MakeProducts products, Index rows, Index in, Index out, Mode mode) {
  CAPTURE(rows);
  CAPTURE(in);
  CAPTURE(out);
  const auto weight = StoredMatrix::from(coarse_matrix(out, in, 1));
  const auto rounded = [](Strided<float> m) {
    for (Index i = 0; i < m.view().rows; ++i)
      for (Index j = 0; j < m.view().cols; ++j) m.view()(i, j) = calm::to_float(calm::to_bf16(m.view()(i, j)));
    return m;
  };
  const auto x = rounded(Strided<float>(rows, in, 2)), dy = rounded(Strided<float>(rows, out, 3));
  CpuBackend own(1, calm::own_products);
  Strided<float> y(rows, out, 4), dx(rows, in, 5);
  own.multiply(own.packed<float>(weight), x.in(), y.view(), mode);
  own.multiply_input_gradient(own.packed<float>(weight), dy.in(), dx.view(), mode);
  Matrix<float> first_y, first_dx;
  for (const int threads : {1, 2, 3}) {
    CpuBackend backend(threads, products);
    for (int repetition = 0; repetition < 2; ++repetition) {
      Strided<float> found_y(rows, out, 4), found_dx(rows, in, 5);
      backend.multiply(backend.packed<float>(weight), x.in(), found_y.view(), mode);
      backend.multiply_input_gradient(backend.packed<float>(weight), dy.in(), found_dx.view(), mode);
      CHECK(found_y.framed());
      CHECK(found_dx.framed());
      CHECK(relative_difference(found_y.in(), y.in()) < 1e-5);
      CHECK(relative_difference(found_dx.in(), dx.in()) < 1e-5);
      if (first_y.rows() == 0 && rows > 0) first_y = copy_of(found_y.in()), first_dx = copy_of(found_dx.in());
      CHECK(same_bits(found_y.in(), constant(first_y)));
      CHECK(same_bits(found_dx.in(), constant(first_dx)));
    }
  }
}

}  // namespace

TEST_CASE("oneDNN's products are those of calm, for rows that lie apart, with the same bits on any number of threads") {
  for (const auto products : all_products()) {
    const bool in_bf16 = products == calm::onednn_bf16_products;
    CAPTURE(in_bf16);
    for (const auto& [rows, in, out] : {std::tuple<Index, Index, Index>{1, 1, 1},
                                        {1, 64, 300},
                                        {3, 37, 129},
                                        {7, 5, 128},
                                        {130, 258, 33},
                                        {263, 96, 128},
                                        {40, 61, 8400},
                                        {1100, 16, 8400}}) {  // more than 64 pieces of columns, more than 1,024 rows
      check_products(products, rows, in, out, Assign{});
      check_products(products, rows, in, out, Accumulate{});
    }
  }
}

TEST_CASE("oneDNN's products of nothing: no columns to add up leave zeros, or what was there") {
  for (const auto products : all_products()) {
    CpuBackend backend(2, products);
    const auto weight = StoredMatrix::from(Matrix<float>(5, 0));
    const Matrix<float> x(3, 0);
    auto y = random_matrix<float>(3, 5, 1);
    const Matrix<float> before = y;
    backend.multiply(backend.packed<float>(weight), constant(x), y.view(), Accumulate{});
    CHECK(same_bits(y, before));
    backend.multiply(backend.packed<float>(weight), constant(x), y.view(), Assign{});
    CHECK(same_bits(y, Matrix<float>(3, 5)));
  }
}

TEST_CASE("a weight of any storage type has oneDNN's products of its values, and two packed forms that are counted") {
  if (!calm::onednn_keeps_bits()) return;  // calm's own products
  CpuBackend backend(2, calm::onednn_products);
  const auto x = random_matrix<float>(9, 512, 1), dy = random_matrix<float>(9, 160, 2);
  for (const auto dtype : calm::all_dtypes) {
    CAPTURE(calm::name_of(dtype));
    const auto stored = random_stored(dtype, 160, 512, 3);
    const auto dense = StoredMatrix::from(stored.dense<float>());
    Matrix<float> y(9, 160), expected_y(9, 160), dx(9, 512), expected_dx(9, 512);
    CHECK(stored.packed_bytes() == 0);
    backend.multiply(backend.packed<float>(stored), constant(x), y.view(), Assign{});
    CHECK(stored.packed_bytes() >= 160 * 512 * sizeof(float));
    backend.multiply_input_gradient(backend.packed<float>(stored), constant(dy), dx.view(), Assign{});
    CHECK(stored.packed_bytes() >= 2 * 160 * 512 * sizeof(float));
    backend.multiply(backend.packed<float>(dense), constant(x), expected_y.view(), Assign{});
    backend.multiply_input_gradient(backend.packed<float>(dense), constant(dy), expected_dx.view(), Assign{});
    CHECK(same_bits(y, expected_y));
    CHECK(same_bits(dx, expected_dx));
  }
}

TEST_CASE("by oneDNN too a row has the bits that it has among others") {
  for (const auto& [products, in] : [] {
         std::vector<std::pair<calm::MakeProducts, Index>> all;
         for (const auto products : all_products()) all.emplace_back(products, 576), all.emplace_back(products, 11008);
         return all;
       }()) {
    CAPTURE(in);
    CpuBackend backend(2, products);
    const auto weight = StoredMatrix::from(random_matrix<float>(200, in, 1));
    const auto x = random_matrix<float>(300, in, 2), dy = random_matrix<float>(300, 200, 3);
    Matrix<float> y(300, 200), dx(300, in), one_y(1, 200), one_dx(1, in);
    backend.multiply(backend.packed<float>(weight), constant(x), y.view(), Assign{});
    backend.multiply_input_gradient(backend.packed<float>(weight), constant(dy), dx.view(), Assign{});
    for (const Index row : {0, 5, 127, 128, 257, 299}) {
      backend.multiply(backend.packed<float>(weight), constant(x).middle_rows(row, 1), one_y.view(), Assign{});
      backend.multiply_input_gradient(backend.packed<float>(weight), constant(dy).middle_rows(row, 1), one_dx.view(),
                                      Assign{});
      CHECK(same_bits(constant(one_y), constant(y).middle_rows(row, 1)));
      CHECK(same_bits(constant(one_dx), constant(dx).middle_rows(row, 1)));
    }
  }
}

TEST_CASE("weights that change are multiplied as without oneDNN") {
  const auto w = random_matrix<float>(70, 90, 1), x = random_matrix<float>(50, 90, 2),
             dy = random_matrix<float>(50, 70, 3);
  using Pair = std::pair<calm::MakeProducts, calm::MakeProducts>;
  for (const auto& [with, without] :
       {Pair{calm::onednn_products, calm::own_products}, Pair{calm::onednn_bf16_products, calm::bf16_products}}) {
    if (with == calm::onednn_bf16_products && all_products().size() < 2) continue;
    const auto products_of = [&](calm::MakeProducts products) {
      CpuBackend backend(2, products);
      std::tuple<Matrix<float>, Matrix<float>, Matrix<float>> all{{50, 70}, {50, 90}, {70, 90}};
      backend.multiply(constant(w), constant(x), std::get<0>(all).view(), Assign{});
      backend.multiply_input_gradient(constant(w), constant(dy), std::get<1>(all).view(), Assign{});
      backend.multiply_weight_gradient(constant(dy), constant(x), std::get<2>(all).view());
      return all;
    };
    const auto found = products_of(with), expected = products_of(without);
    CHECK(same_bits(std::get<0>(found), std::get<0>(expected)));
    CHECK(same_bits(std::get<1>(found), std::get<1>(expected)));
    CHECK(same_bits(std::get<2>(found), std::get<2>(expected)));
  }
}

TEST_CASE("a program that is built with CALM_WITH_ONEDNN multiplies by oneDNN unless it is told otherwise") {
  const bool is_default = CpuBackend(1).options() == CpuBackend(2, calm::onednn_products).options();
  CHECK(is_default);
}

}  // namespace onednn_test
