// Products in bf16 (bf16_products): their error against f32, and the promises that hold in f32.
#include <doctest/doctest.h>
#include <calm/backend/cpu_bf16.hpp>
#include <calm/tensor/half.hpp>
#include <support/models.hpp>

using namespace calm_test;

namespace {

Matrix<float> random_matrix(Index rows, Index cols, std::uint64_t seed) {
  Matrix<float> m(rows, cols);
  calm::Random random(seed);
  for (float& x : m.values()) x = static_cast<float>(random.normal());
  return m;
}

calm::MatrixView<const float> view(const Matrix<float>& m) { return m.view(); }

/// y, dx and dw of one linear map, with a frozen and with a trained weight.
struct Products {
  Matrix<float> y, y_trained, dx, dx_trained, dw;

  Products(Cpu& ctx, const Matrix<float>& w, const Matrix<float>& x, const Matrix<float>& dy)
      : y(x.rows(), w.rows()), y_trained(y), dx(x.rows(), w.cols()), dx_trained(dx), dw(w.rows(), w.cols()) {
    const auto stored = calm::StoredMatrix::from(w);
    const auto frozen = ctx.backend.packed<float>(stored);
    ctx.backend.multiply(frozen, view(x), y.view(), calm::Assign{});
    ctx.backend.multiply(view(w), view(x), y_trained.view(), calm::Assign{});
    ctx.backend.multiply_input_gradient(frozen, view(dy), dx.view(), calm::Assign{});
    ctx.backend.multiply_input_gradient(view(w), view(dy), dx_trained.view(), calm::Assign{});
    ctx.backend.multiply_weight_gradient(view(dy), view(x), dw.view());
  }
  std::vector<const Matrix<float>*> all() const { return {&y, &y_trained, &dx, &dx_trained, &dw}; }
};

double largest(const Matrix<float>& m) {
  double most = 0;
  for (const float x : m.values()) most = std::max(most, std::abs(static_cast<double>(x)));
  return most;
}

}  // namespace

TEST_CASE("products in bf16 differ from those in f32 by the rounding of what is multiplied, and not by nothing") {
  Cpu f32(1), bf16(1, calm::bf16_products);
  for (const auto& [tokens, out, in] : {std::tuple<Index, Index, Index>{7, 33, 19}, {130, 64, 300}, {1, 96, 96}}) {
    const auto w = random_matrix(out, in, 1), x = random_matrix(tokens, in, 2), dy = random_matrix(tokens, out, 3);
    const Products exact(f32, w, x, dy), rounded(bf16, w, x, dy);
    for (std::size_t i = 0; i < 5; ++i) {
      const Matrix<float>&a = *exact.all()[i], &b = *rounded.all()[i];
      double error = 0;
      for (Index k = 0; k < a.size(); ++k)
        error = std::max(error, std::abs(static_cast<double>(a.data()[k] - b.data()[k])));
      CHECK(error < 0.01 * largest(a));  // 2^-8 each for two operands, at random
      CHECK(error > 0);
    }
  }
}

TEST_CASE("products in bf16 are those of operands that were rounded before, to the precision of f32 sums") {
  Cpu f32(1), bf16(1, calm::bf16_products);
  auto w = random_matrix(45, 77, 4), x = random_matrix(21, 77, 5), dy = random_matrix(21, 45, 6);
  for (auto* m : {&w, &x, &dy})
    for (float& value : m->values()) value = calm::to_float(calm::to_bf16(value));
  const Products exact(f32, w, x, dy), rounded(bf16, w, x, dy);
  for (std::size_t i = 0; i < 5; ++i) {
    const Matrix<float>&a = *exact.all()[i], &b = *rounded.all()[i];
    for (Index k = 0; k < a.size(); ++k) CHECK(std::abs(a.data()[k] - b.data()[k]) < 2e-6 * largest(a));
  }
}

TEST_CASE("in bf16 the bits of a row depend neither on threads nor on the rows around it") {
  const auto w = random_matrix(70, 90, 7), x = random_matrix(150, 90, 8), dy = random_matrix(150, 70, 9);
  Cpu one(1, calm::bf16_products);
  const Products expected(one, w, x, dy);
  for (const int threads : {2, 3, 4}) {
    Cpu ctx(threads, calm::bf16_products);
    const Products found(ctx, w, x, dy);
    for (std::size_t i = 0; i < 5; ++i)
      CHECK(std::equal(found.all()[i]->values().begin(), found.all()[i]->values().end(),
                       expected.all()[i]->values().begin()));
  }
  const auto stored = calm::StoredMatrix::from(w);
  for (const Index row : {0, 77, 149}) {
    Matrix<float> y(1, 70), dx(1, 90);
    one.backend.multiply(one.backend.packed<float>(stored), view(x).middle_rows(row, 1), y.view(), calm::Assign{});
    one.backend.multiply_input_gradient(one.backend.packed<float>(stored), view(dy).middle_rows(row, 1), dx.view(),
                                        calm::Assign{});
    for (Index j = 0; j < 70; ++j) CHECK(y(0, j) == expected.y(row, j));
    for (Index j = 0; j < 90; ++j) CHECK(dx(0, j) == expected.dx(row, j));
  }
}

TEST_CASE("models in double are never rounded") {
  calm::Context<calm::CpuBackend> ctx(1, calm::bf16_products), exact(1);
  Matrix<double> w(9, 11), x(5, 11), a(5, 9), b(5, 9);
  calm::Random random(10);
  for (auto* m : {&w, &x})
    for (double& value : m->values()) value = random.normal();
  const auto run = [&](auto& context, Matrix<double>& y) {
    context.backend.multiply(std::as_const(w).view(), std::as_const(x).view(), y.view(), calm::Assign{});
  };
  run(ctx, a);
  run(exact, b);
  CHECK(std::equal(a.values().begin(), a.values().end(), b.values().begin()));
}
