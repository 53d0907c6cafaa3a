#include <doctest/doctest.h>
#include <calm/backend/cpu.hpp>
#include <calm/backend/reference.hpp>
#include <calm/nn/activation.hpp>
#include <support/values.hpp>

#include <array>
#include <limits>

namespace backend_test {
using namespace calm_test;
using calm::Accumulate;
using calm::Assign;
using calm::CpuBackend;
using calm::HeadShape;
using calm::ReferenceBackend;
using calm::VisibleRange;

namespace {

template <class S>
constexpr double tolerance = std::is_same_v<S, float> ? 2e-5 : 1e-12;

template <class S>
std::span<const S> row_of(const Matrix<S>& m) {
  return m.values();
}

std::vector<TokenId> random_ids(Index count, Index bound, std::uint64_t seed) {
  calm::Random random(seed);
  std::vector<TokenId> ids;
  for (Index i = 0; i < count; ++i) ids.push_back(static_cast<TokenId>(random.below(bound)));
  return ids;
}

/// Runs `operation(backend, output)` on both backends, whose outputs begin with the same values, and compares these.
template <class S>
void check_output(const Strided<S>& start, auto&& operation) {
  CpuBackend cpu(2);
  ReferenceBackend reference;
  Strided<S> found = start, expected = start;
  operation(cpu, found.view());
  operation(reference, expected.view());
  CHECK(relative_difference(found.in(), expected.in()) < tolerance<S>);
  CHECK(found.framed());
  CHECK(expected.framed());
}

/// Assign over NaN, and Accumulate onto random values.
template <class S>
void check_both_modes(Index rows, Index cols, auto&& operation) {
  check_output(Strided<S>(rows, cols), [&](auto& backend, MatrixView<S> y) { operation(backend, y, Assign{}); });
  check_output(Strided<S>(rows, cols, 91),
               [&](auto& backend, MatrixView<S> y) { operation(backend, y, Accumulate{}); });
}

struct Shape {
  Index rows, in, out;
};

// One row, primes, exactly one tile, and one more and one less than the tiles of 64, 128 and 256; the last is deep
// enough, in rows that lie far enough apart, for panels that are copied.
const std::vector<Shape> product_shapes = {{1, 1, 1},      {1, 7, 13},     {1, 300, 65},   {2, 3, 5},
                                           {13, 31, 17},   {64, 64, 64},   {63, 127, 129}, {128, 256, 128},
                                           {129, 257, 65}, {131, 517, 70}, {257, 40, 131}, {260, 272, 264}};

/// Ragged sequences with every kind of visible range.
template <class S>
struct AttentionProblem {
  struct Sequence {
    Index queries, keys;
    bool causal;
  };

  HeadShape heads;
  std::vector<Index> query_offsets{0}, key_offsets{0};
  std::vector<VisibleRange> visible;
  Strided<S> q{0, 0}, k{0, 0}, v{0, 0}, dy{0, 0};

  AttentionProblem(HeadShape head_shape, const std::vector<Sequence>& list, std::uint64_t seed) : heads(head_shape) {
    calm::Random random(seed);
    for (const Sequence& sequence : list) {
      for (Index t = 0; t < sequence.queries; ++t) {
        if (sequence.causal) {
          visible.push_back({0, t + 1 + sequence.keys - sequence.queries});
        } else {  // any range, also empty ones and ones that end before they begin
          const Index a = random.below(sequence.keys + 1), b = random.below(sequence.keys + 1);
          visible.push_back(t % 5 == 4 ? VisibleRange{a, a} : VisibleRange{std::min(a, b), std::max(a, b)});
        }
      }
      query_offsets.push_back(query_offsets.back() + sequence.queries);
      key_offsets.push_back(key_offsets.back() + sequence.keys);
    }
    q = Strided<S>(query_offsets.back(), heads.query_heads * heads.width, seed + 1);
    k = Strided<S>(key_offsets.back(), heads.kv_heads * heads.width, seed + 2);
    v = Strided<S>(key_offsets.back(), heads.kv_heads * heads.width, seed + 3);
    dy = Strided<S>(query_offsets.back(), heads.query_heads * heads.width, seed + 4);
  }

  std::vector<calm::AttentionSequence<S>> sequences(MatrixView<S> dk = {}, MatrixView<S> dv = {}) const {
    std::vector<calm::AttentionSequence<S>> result;
    for (std::size_t s = 0; s + 1 < query_offsets.size(); ++s)
      result.push_back({.first_query = query_offsets[s],
                        .queries = query_offsets[s + 1] - query_offsets[s],
                        .keys = k.in().row(key_offsets[s]),
                        .values = v.in().row(key_offsets[s]),
                        .stride = k.in().stride,
                        .key_count = key_offsets[s + 1] - key_offsets[s],
                        .key_gradients = dk.data ? dk.row(key_offsets[s]) : nullptr,
                        .value_gradients = dv.data ? dv.row(key_offsets[s]) : nullptr});
    return result;
  }

  struct Result {
    Strided<S> y, log_sum_exp, dq, dk, dv;
  };

  /// Forward and backward into poisoned buffers.
  Result run(auto& backend) const {
    Result r{Strided<S>(q.in().rows, q.in().cols), Strided<S>(q.in().rows, heads.query_heads),
             Strided<S>(q.in().rows, q.in().cols), Strided<S>(k.in().rows, k.in().cols),
             Strided<S>(k.in().rows, k.in().cols)};
    const auto list = sequences(r.dk.view(), r.dv.view());
    const std::span<const calm::AttentionSequence<S>> span(list);
    const std::span<const VisibleRange> ranges(visible);
    backend.attention(q.in(), span, ranges, heads, r.y.view(), r.log_sum_exp.view());
    backend.attention_backward(q.in(), span, ranges, heads, r.y.in(), r.log_sum_exp.in(), dy.in(), r.dq.view());
    return r;
  }
};

template <class S>
std::vector<AttentionProblem<S>> attention_problems() {
  return {
      {{1, 1, 1}, {{1, 1, true}}, 1},
      {{2, 1, 3}, {{5, 5, true}, {0, 0, true}, {1, 1, true}, {0, 4, true}, {7, 7, true}}, 2},
      {{4, 2, 8}, {{65, 65, true}, {3, 130, true}, {131, 131, true}}, 3},  // with keys from before, as with a cache
      {{3, 3, 5}, {{13, 7, false}, {5, 0, false}, {1, 300, false}, {70, 90, false}}, 4},
      {{6, 1, 16}, {{129, 67, false}, {2, 2, true}}, 5},
      {{9, 3, 8}, {{1, 40, true}, {1, 1, true}, {1, 131, false}, {1, 0, false}, {0, 3, true}}, 6},  // one query each
  };
}

/// All outputs of all operations on shapes of several tiles, behind each other.
template <class S>
std::vector<S> everything(CpuBackend& backend) {
  std::vector<S> all;
  const auto keep = [&](const Matrix<S>& m) { all.insert(all.end(), m.values().begin(), m.values().end()); };
  const Index rows = 333, in = 301, out = 187;
  const auto x = random_matrix<S>(rows, in, 1), w = random_matrix<S>(out, in, 2), dy = random_matrix<S>(rows, out, 3);
  Matrix<S> y(rows, out), dx(rows, in), dw(out, in);
  backend.multiply(constant(w), constant(x), y.view(), Assign{});
  backend.multiply_input_gradient(constant(w), constant(dy), dx.view(), Assign{});
  backend.multiply_weight_gradient(constant(dy), constant(x), dw.view());
  keep(y), keep(dx), keep(dw);

  const auto ids = random_ids(rows, 40, 4);
  Matrix<S> table(40, in), gathered(rows, in);
  backend.scatter_add(std::span<const TokenId>(ids), constant(x), table.view());
  backend.gather(constant(table), std::span<const TokenId>(ids), gathered.view());
  keep(table), keep(gathered);

  const auto weight = random_matrix<S>(1, in, 5);
  Matrix<S> normed(rows, in), inverse(1, rows), dnorm(rows, in), dweight(1, in);
  backend.rms_norm(constant(x), row_of(weight), 1e-6, normed.view(), inverse.values());
  backend.rms_norm_input_gradient(constant(dx), constant(x), row_of(weight), row_of(inverse), dnorm.view(), Assign{});
  backend.rms_norm_weight_gradient(constant(dx), constant(x), row_of(inverse), dweight.values());
  keep(normed), keep(inverse), keep(dnorm), keep(dweight);

  Matrix<S> hidden(rows, in), dgate(rows, in), dup(rows, in), probabilities(rows, in), losses(1, rows);
  backend.template gated_activation<calm::Silu>(constant(x), constant(dx), hidden.view());
  backend.template gated_activation_backward<calm::Silu>(constant(normed), constant(x), constant(dx), dgate.view(),
                                                         dup.view());
  backend.cross_entropy(constant(x), std::span<const TokenId>(ids), 0.5, losses.values(), probabilities.view());
  keep(hidden), keep(dgate), keep(dup), keep(probabilities), keep(losses);

  for (const auto& problem : attention_problems<S>()) {
    auto r = problem.run(backend);
    keep(copy_of(r.y.in())), keep(copy_of(r.log_sum_exp.in())), keep(copy_of(r.dq.in()));
    keep(copy_of(r.dk.in())), keep(copy_of(r.dv.in()));
  }

  Matrix<S> scaled(rows, in), sums(1, in);
  backend.scale_columns(constant(x), row_of(weight), scaled.view(), Assign{});
  backend.add_column_products(constant(x), constant(dx), sums.values());
  keep(scaled), keep(sums);

  const auto gate = random_matrix<S>(1, 1, 6);
  Matrix<S> ddelta(rows, in), dgate_value(1, 1), m(out, in), v(out, in), values = w;
  backend.gate_gradient(row_of(gate), constant(x), constant(dx), ddelta.view(), dgate_value.values());
  const double factor = 0.5;
  backend.adamw(values.values(), row_of(dw), m.values(), v.values(), calm::AdamWStep{}, &factor);
  double squares = 0;
  backend.sum_of_squares(row_of(dw), &squares);
  keep(ddelta), keep(dgate_value), keep(values), keep(m), keep(v);
  all.push_back(static_cast<S>(squares));
  return all;
}

}  // namespace

TEST_CASE_TEMPLATE("products are those of the reference, for every shape and for rows that lie apart", S, float,
                   double) {
  for (const Shape& shape : product_shapes) {
    const Index rows = shape.rows, in = shape.in, out = shape.out;
    CAPTURE(rows);
    CAPTURE(in);
    CAPTURE(out);
    const Strided<S> x(rows, in, 1), w(out, in, 2), dy(rows, out, 3);
    check_both_modes<S>(rows, out,
                        [&](auto& backend, MatrixView<S> y, auto mode) { backend.multiply(w.in(), x.in(), y, mode); });
    check_both_modes<S>(rows, in, [&](auto& backend, MatrixView<S> dx, auto mode) {
      backend.multiply_input_gradient(w.in(), dy.in(), dx, mode);
    });
    check_output(Strided<S>(out, in, 4),
                 [&](auto& backend, MatrixView<S> dw) { backend.multiply_weight_gradient(dy.in(), x.in(), dw); });
  }
}

TEST_CASE("the reference multiplies as one does by hand") {
  ReferenceBackend backend;
  const double w[] = {1, 2, 3, 4, 5, 6}, x[] = {1, 10, 100}, dy[] = {7, 8};
  double y[2], dx[3], dw[6] = {1, 1, 1, 1, 1, 1};
  const MatrixView<const double> weights(w, 2, 3), input(x, 1, 3), gradient(dy, 1, 2);
  backend.multiply(weights, input, MatrixView<double>(y, 1, 2), Assign{});
  CHECK(y[0] == 321);
  CHECK(y[1] == 654);
  backend.multiply_input_gradient(weights, gradient, MatrixView<double>(dx, 1, 3), Assign{});
  CHECK(dx[0] == 7 + 32);
  CHECK(dx[2] == 21 + 48);
  backend.multiply_weight_gradient(gradient, input, MatrixView<double>(dw, 2, 3));
  CHECK(dw[2] == 701);
  CHECK(dw[3] == 9);
}

TEST_CASE("a product of no rows touches nothing") {
  CpuBackend backend(2);
  const Strided<float> w(3, 4, 1), x(0, 4, 2);
  Strided<float> y(0, 3), dw(3, 4, 3);
  const auto before = copy_of(dw.in());
  backend.multiply(w.in(), x.in(), y.view(), Assign{});
  backend.multiply_weight_gradient(MatrixView<const float>(y.in()), x.in(), dw.view());
  CHECK(same_bits(before, copy_of(dw.in())));
}

TEST_CASE_TEMPLATE("a weight in any storage type is multiplied as its values", S, float, double) {
  const Matrix<float> values = random_matrix<float>(37, 29, 1);
  const Strided<S> x(5, 29, 2);
  for (const calm::DType dtype : {calm::DType::f64, calm::DType::f32, calm::DType::bf16, calm::DType::f16}) {
    const auto stored = calm::StoredMatrix::from(values, dtype);
    const Matrix<S> dense = stored.dense<S>();
    const Strided<S> dy(5, 37, 3);
    ReferenceBackend reference;
    check_both_modes<S>(5, 37, [&](auto& backend, MatrixView<S> y, auto mode) {
      if constexpr (std::is_same_v<std::decay_t<decltype(backend)>, ReferenceBackend>)
        backend.multiply(constant(dense), x.in(), y, mode);
      else backend.multiply(backend.template packed<S>(stored), x.in(), y, mode);
    });
    check_both_modes<S>(5, 29, [&](auto& backend, MatrixView<S> dx, auto mode) {
      if constexpr (std::is_same_v<std::decay_t<decltype(backend)>, ReferenceBackend>)
        backend.multiply_input_gradient(constant(dense), dy.in(), dx, mode);
      else backend.multiply_input_gradient(backend.template packed<S>(stored), dy.in(), dx, mode);
    });
    CHECK(same_bits(reference.packed<S>(stored), constant(dense)));
    if (stored.in_place<S>()) CHECK(reference.packed<S>(stored).data == stored.in_place<S>());
    const std::vector<TokenId> ids = {36, 0, 7, 7};
    check_output(Strided<S>(4, 29),
                 [&](auto& backend, MatrixView<S> y) { backend.gather(stored, std::span<const TokenId>(ids), y); });
  }
}

TEST_CASE_TEMPLATE("rows are gathered and scattered as by the reference, with ids that repeat", S, float, double) {
  for (const Index rows : {1, 31, 200}) {
    for (const Index cols : {1, 63, 130}) {
      const auto ids = random_ids(rows, 9, 5);
      const Strided<S> table(9, cols, 1), dy(rows, cols, 2);
      check_output(Strided<S>(rows, cols), [&](auto& backend, MatrixView<S> y) {
        backend.gather(table.in(), std::span<const TokenId>(ids), y);
      });
      check_output(Strided<S>(9, cols, 3), [&](auto& backend, MatrixView<S> dtable) {
        backend.scatter_add(std::span<const TokenId>(ids), dy.in(), dtable);
      });
      std::vector<Index> distinct;
      for (Index i = 0; i < rows; ++i) distinct.push_back((rows - 1 - i) * 2);
      const Strided<S> from(2 * rows, cols, 4);
      check_output(Strided<S>(rows, cols), [&](auto& backend, MatrixView<S> to) {
        backend.gather_rows(from.in(), std::span<const Index>(distinct), to);
      });
      check_output(Strided<S>(2 * rows, cols, 5), [&](auto& backend, MatrixView<S> to) {
        backend.scatter_rows(dy.in(), std::span<const Index>(distinct), to);
      });
    }
  }
}

TEST_CASE_TEMPLATE("RMS norms and their gradients are those of the reference", S, float, double) {
  for (const Index rows : {1, 33, 131}) {
    for (const Index cols : {3, 15, 64, 257}) {
      const Strided<S> x(rows, cols, 1), dy(rows, cols, 2);
      const Matrix<S> weight = random_matrix<S>(1, cols, 3);
      Matrix<S> inverse = poisoned<S>(1, rows), expected = poisoned<S>(1, rows);
      check_output(Strided<S>(rows, cols), [&](auto& backend, MatrixView<S> y) {
        const bool is_reference = std::is_same_v<std::decay_t<decltype(backend)>, ReferenceBackend>;
        backend.rms_norm(x.in(), row_of(weight), 1e-3, y, (is_reference ? expected : inverse).values());
      });
      CHECK(relative_difference(inverse, expected) < tolerance<S>);
      check_both_modes<S>(rows, cols, [&](auto& backend, MatrixView<S> dx, auto mode) {
        backend.rms_norm_input_gradient(dy.in(), x.in(), row_of(weight), row_of(expected), dx, mode);
      });
      Matrix<S> dweight = random_matrix<S>(1, cols, 4), dweight_expected = dweight;
      CpuBackend(2).rms_norm_weight_gradient(dy.in(), x.in(), row_of(expected), dweight.values());
      ReferenceBackend().rms_norm_weight_gradient(dy.in(), x.in(), row_of(expected), dweight_expected.values());
      CHECK(relative_difference(dweight, dweight_expected) < tolerance<S>);
    }
  }
}

TEST_CASE_TEMPLATE("rotary positions turn as by the reference, and back", S, float, double) {
  for (const Index rows : {1, 67}) {
    for (const auto& sizes : {std::pair<Index, Index>{1, 1}, {3, 5}, {2, 16}}) {
      const Index heads = sizes.first, half = sizes.second;
      std::vector<Index> positions;
      for (Index t = 0; t < rows; ++t) positions.push_back(t * 37 % 101);
      std::vector<S> frequencies;
      for (Index i = 0; i < half; ++i)
        frequencies.push_back(static_cast<S>(std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half))));
      Strided<S> cosines(rows, half), sines(rows, half);
      CpuBackend(2).rotary_angles(std::span<const Index>(positions), std::span<const S>(frequencies), cosines.view(),
                                  sines.view());
      check_output(Strided<S>(rows, half), [&](auto& backend, MatrixView<S> c) {
        Strided<S> s(rows, half);
        backend.rotary_angles(std::span<const Index>(positions), std::span<const S>(frequencies), c, s.view());
        CHECK(relative_difference(s.in(), sines.in()) < tolerance<S>);
      });
      const Index cols = heads * 2 * half;
      const Strided<S> x(rows, cols, 7);
      for (const int direction : {1, -1})
        check_output(
            x, [&](auto& backend, MatrixView<S> y) { backend.rotate(y, cosines.in(), sines.in(), heads, direction); });
      Strided<S> turned = x;
      CpuBackend backend(2);
      backend.rotate(turned.view(), cosines.in(), sines.in(), heads, 1);
      backend.rotate(turned.view(), cosines.in(), sines.in(), heads, -1);
      CHECK(relative_difference(turned.in(), x.in()) < tolerance<S>);
    }
  }
}

TEST_CASE("rotary positions pair the halves of a head and turn counter-clockwise") {
  ReferenceBackend backend;
  double x[] = {1, 0, 0, 2}, c[2], s[2];
  const std::vector<Index> position = {3};
  const std::vector<double> frequencies = {0.5, 0.1};
  backend.rotary_angles(std::span<const Index>(position), std::span<const double>(frequencies),
                        MatrixView<double>(c, 1, 2), MatrixView<double>(s, 1, 2));
  backend.rotate(MatrixView<double>(x, 1, 4), MatrixView<const double>(c, 1, 2), MatrixView<const double>(s, 1, 2), 1,
                 1);
  CHECK(x[0] == doctest::Approx(std::cos(1.5)));
  CHECK(x[2] == doctest::Approx(std::sin(1.5)));
  CHECK(x[1] == doctest::Approx(-2 * std::sin(0.3)));
  CHECK(x[3] == doctest::Approx(2 * std::cos(0.3)));
}

TEST_CASE_TEMPLATE("attention and its gradients are those of the reference: ragged, grouped, empty, from any begin", S,
                   float, double) {
  CpuBackend cpu(2);
  ReferenceBackend reference;
  for (const auto& problem : attention_problems<S>()) {
    CAPTURE(problem.q.in().rows);
    auto found = problem.run(cpu), expected = problem.run(reference);
    CHECK(relative_difference(found.y.in(), expected.y.in()) < tolerance<S>);
    CHECK(relative_difference(found.dq.in(), expected.dq.in()) < tolerance<S>);
    CHECK(relative_difference(found.dk.in(), expected.dk.in()) < tolerance<S>);
    CHECK(relative_difference(found.dv.in(), expected.dv.in()) < tolerance<S>);
    for (const auto* result : {&found, &expected})
      for (const auto* buffer : {&result->y, &result->log_sum_exp, &result->dq, &result->dk, &result->dv})
        CHECK(buffer->framed());
    for (Index t = 0; t < problem.q.in().rows; ++t) {
      const VisibleRange& range = problem.visible[static_cast<std::size_t>(t)];
      for (Index j = 0; j < problem.q.in().cols; ++j) {
        if (range.begin < range.end) break;
        CHECK(found.y.in()(t, j) == 0);
        CHECK(expected.y.in()(t, j) == 0);
        CHECK(found.dq.in()(t, j) == 0);
        CHECK(expected.dq.in()(t, j) == 0);
      }
      for (Index h = 0; h < problem.heads.query_heads && range.begin < range.end; ++h)
        CHECK(found.log_sum_exp.in()(t, h) == doctest::Approx(expected.log_sum_exp.in()(t, h)).epsilon(1e-4));
    }
  }
}

TEST_CASE_TEMPLATE("keys that come to a cache bit by bit are met as keys that lie in rows, to the bit", S, float,
                   double) {
  const auto check = [](auto& backend) {
    for (const auto& problem : attention_problems<S>()) {
      CAPTURE(problem.q.in().rows);
      auto sequences = problem.sequences();
      const std::span<const VisibleRange> visible(problem.visible);
      Strided<S> expected(problem.q.in().rows, problem.q.in().cols), found = expected;
      Strided<S> log_sum_exp(problem.q.in().rows, problem.heads.query_heads);
      const auto attend = [&](Strided<S>& y) {
        backend.attention(problem.q.in(), std::span<const calm::AttentionSequence<S>>(sequences), visible,
                          problem.heads, y.view(), log_sum_exp.view());
      };
      attend(expected);
      std::vector<Matrix<S>> caches;
      for (auto& sequence : sequences) {
        const Index width = problem.k.in().cols,
                    capacity = (sequence.key_count / calm::cache_step + 1) * calm::cache_step;
        Matrix<S>& keys = caches.emplace_back(capacity, width);  // what no key is written to spoils what reads it
        std::fill(keys.values().begin(), keys.values().end(), std::numeric_limits<S>::quiet_NaN());
        const MatrixView<const S> rows(sequence.keys, sequence.key_count, width, sequence.stride);
        for (Index first = 0, count = 1; first < rows.rows; first += count, count = 2 * count + 3) {
          count = std::min(count, rows.rows - first);
          backend.append_keys(rows.middle_rows(first, count), first, keys.view());
        }
        Matrix<S>& values = caches.emplace_back(capacity, width);
        std::fill(values.values().begin(), values.values().end(), std::numeric_limits<S>::quiet_NaN());
        for (Index i = 0; i < rows.rows; ++i)
          std::copy_n(sequence.values + i * sequence.stride, width, values.view().row(i));
        sequence.keys = caches[caches.size() - 2].data();
        sequence.values = caches.back().data();
        sequence.stride = width;
        sequence.cached = true;
      }
      attend(found);
      CHECK(same_bits(found.in(), expected.in()));
      CHECK(found.framed());
    }
  };
  CpuBackend cpu(3);
  ReferenceBackend reference;
  check(cpu);
  check(reference);
}

TEST_CASE("the reference attends as one does by hand") {
  ReferenceBackend backend;
  // One head of width 4 over two keys: scores 2 / sqrt(4) = 1 and 0.
  const double q[] = {2, 0, 0, 0}, k[] = {1, 0, 0, 0, 0, 1, 0, 0}, v[] = {1, 2, 3, 4, 5, 6, 7, 8};
  double y[4], log_sum_exp[1];
  const std::vector<calm::AttentionSequence<double>> sequence = {
      {.first_query = 0, .queries = 1, .keys = k, .values = v, .stride = 4, .key_count = 2}};
  const std::vector<VisibleRange> visible = {{0, 2}};
  backend.attention(MatrixView<const double>(q, 1, 4), std::span<const calm::AttentionSequence<double>>(sequence),
                    std::span<const VisibleRange>(visible), {1, 1, 4}, MatrixView<double>(y, 1, 4),
                    MatrixView<double>(log_sum_exp, 1, 1));
  const double p = std::exp(1) / (std::exp(1) + 1);
  for (int i = 0; i < 4; ++i) CHECK(y[i] == doctest::Approx(p * (1 + i) + (1 - p) * (5 + i)));
  CHECK(log_sum_exp[0] == doctest::Approx(std::log(std::exp(1) + 1)));
}

TEST_CASE_TEMPLATE("the reference's attention gradient agrees with finite differences", S, double) {
  AttentionProblem<S> problem({4, 2, 3}, {{3, 5, false}, {4, 4, true}, {2, 0, false}}, 9);
  ReferenceBackend backend;
  const auto loss = [&] {
    const auto r = problem.run(backend);
    double total = 0;
    for (Index t = 0; t < r.y.in().rows; ++t)
      for (Index j = 0; j < r.y.in().cols; ++j) total += r.y.in()(t, j) * problem.dy.in()(t, j);
    return total;
  };
  const auto analytic = problem.run(backend);
  for (const auto& [values, gradients] :
       {std::pair{&problem.q, &analytic.dq}, {&problem.k, &analytic.dk}, {&problem.v, &analytic.dv}}) {
    const MatrixView<S> m = values->view();
    for (Index i = 0; i < m.rows; ++i) {
      for (Index j = 0; j < m.cols; ++j) {
        const double h = 1e-5, before = m(i, j);
        m(i, j) = before + h;
        const double above = loss();
        m(i, j) = before - h;
        const double below = loss();
        m(i, j) = before;
        CHECK(std::abs((above - below) / (2 * h) - gradients->in()(i, j)) < 1e-8);
      }
    }
  }
}

TEST_CASE_TEMPLATE("attention is causal to the bit: what a query does not see does not change it", S, float, double) {
  CpuBackend backend(3);
  for (const Index changed : {0, 1, 63, 64, 69, 128, 140}) {
    AttentionProblem<S> problem({4, 2, 8}, {{141, 141, true}}, 3);
    const auto before = problem.run(backend);
    for (Index j = 0; j < problem.k.in().cols; ++j) {
      problem.k.view()(changed, j) += S(1000);
      problem.v.view()(changed, j) -= S(500);
    }
    for (Index j = 0; j < problem.q.in().cols; ++j) problem.q.view()(changed, j) *= S(-3);
    const auto after = problem.run(backend);
    CHECK(same_bits(before.y.in().middle_rows(0, changed), after.y.in().middle_rows(0, changed)));
    CHECK(!same_bits(before.y.in().middle_rows(changed, 1), after.y.in().middle_rows(changed, 1)));
  }
}

TEST_CASE_TEMPLATE("a row has the same bits however many rows follow it", S, float, double) {
  // Else an augment token that a later anchor token brings would change earlier logits.
  CpuBackend backend(2);
  for (const auto& [in, out] : {std::pair<Index, Index>{3, 2}, {7, 13}, {64, 64}, {128, 100}, {128, 344}, {300, 65}}) {
    const auto x = random_matrix<S>(140, in, 1), w = random_matrix<S>(out, in, 2);
    Matrix<S> all(140, out);
    backend.multiply(constant(w), constant(x), all.view(), Assign{});
    for (const Index rows : {1, 2, 3, 4, 5, 7, 15, 31, 63, 64, 65, 127, 129, 139}) {
      CAPTURE(rows);
      Matrix<S> first(rows, out);
      backend.multiply(constant(w), constant(x).middle_rows(0, rows), first.view(), Assign{});
      CHECK(same_bits(constant(first), constant(all).middle_rows(0, rows)));
    }
    const auto frozen = calm::StoredMatrix::from(w);
    backend.multiply(backend.template packed<S>(frozen), constant(x), all.view(), Assign{});
    for (const Index rows : {1, 2, 5, 63, 64, 65, 129}) {
      CAPTURE(rows);
      Matrix<S> first(rows, out);
      backend.multiply(backend.template packed<S>(frozen), constant(x).middle_rows(0, rows), first.view(), Assign{});
      CHECK(same_bits(constant(first), constant(all).middle_rows(0, rows)));
    }
  }
}

TEST_CASE_TEMPLATE("a query has the same bits however many queries and keys follow it", S, float, double) {
  CpuBackend backend(2);
  for (const Index width : {2, 8, 20}) {
    const AttentionProblem<S> all({2, 1, width}, {{141, 141, true}}, 3);
    const auto expected = all.run(backend);
    for (const Index queries : {1, 2, 3, 5, 31, 33, 63, 64, 65, 66, 100, 129, 140}) {
      CAPTURE(queries);
      AttentionProblem<S> part({2, 1, width}, {{queries, queries, true}}, 3);
      part.q = all.q, part.k = all.k, part.v = all.v, part.dy = all.dy;
      const auto found = part.run(backend);
      CHECK(same_bits(found.y.in().middle_rows(0, queries), expected.y.in().middle_rows(0, queries)));
    }
  }
}

TEST_CASE_TEMPLATE("activations and their gradients are those of the reference", S, float, double) {
  for (const Index rows : {1, 33}) {
    for (const Index cols : {1, 31, 32, 131}) {
      const Strided<S> gate(rows, cols, 1), up(rows, cols, 2), dh(rows, cols, 3);
      const auto both = [&]<class Activation>(Activation) {
        check_output(Strided<S>(rows, cols), [&](auto& backend, MatrixView<S> h) {
          backend.template gated_activation<Activation>(gate.in(), up.in(), h);
        });
        for (const bool want_gate : {true, false})
          check_output(Strided<S>(rows, cols), [&](auto& backend, MatrixView<S> d) {
            Strided<S> other(rows, cols);
            backend.template gated_activation_backward<Activation>(
                dh.in(), gate.in(), up.in(), want_gate ? d : other.view(), want_gate ? other.view() : d);
          });
        check_output(Strided<S>(rows, cols),
                     [&](auto& backend, MatrixView<S> h) { backend.template activation<Activation>(gate.in(), h); });
        check_output(Strided<S>(rows, cols), [&](auto& backend, MatrixView<S> dx) {
          backend.template activation_backward<Activation>(dh.in(), gate.in(), dx);
        });
      };
      both(calm::Silu{});
      both(calm::GeluTanh{});
    }
  }
}

TEST_CASE_TEMPLATE("the gradient of an activation may be written over the gradient of its result", S, float, double) {
  Strided<S> x(5, 70, 1), dh(5, 70, 2);
  Strided<S> expected(5, 70);
  CpuBackend backend(2);
  backend.template activation_backward<calm::GeluTanh>(dh.in(), x.in(), expected.view());
  backend.template activation_backward<calm::GeluTanh>(dh.in(), x.in(), dh.view());
  CHECK(same_bits(dh.in(), expected.in()));
}

TEST_CASE("activations have their published values") {
  CHECK(calm::Silu::value(1.0) == doctest::Approx(1 / (1 + std::exp(-1.0))));
  CHECK(calm::GeluTanh::value(1.0) == doctest::Approx(0.841192).epsilon(1e-6));  // PyTorch, gelu(approximate="tanh")
  for (const double x : {-3.0, -0.5, 0.0, 0.7, 4.0}) {
    const double h = 1e-5;
    CHECK(calm::Silu::derivative(x) ==
          doctest::Approx((calm::Silu::value(x + h) - calm::Silu::value(x - h)) / (2 * h)).epsilon(1e-7));
    CHECK(calm::GeluTanh::derivative(x) ==
          doctest::Approx((calm::GeluTanh::value(x + h) - calm::GeluTanh::value(x - h)) / (2 * h)).epsilon(1e-7));
  }
}

TEST_CASE_TEMPLATE("cross entropy and its gradient are those of the reference, also over the logits themselves", S,
                   float, double) {
  for (const Index rows : {1, 35}) {
    for (const Index cols : {2, 32, 33, 300}) {
      const Strided<S> logits(rows, cols, 1);
      const auto targets = random_ids(rows, cols, 2);
      Matrix<S> found = poisoned<S>(1, rows), expected = poisoned<S>(1, rows);
      const auto run = [&](bool in_place) {
        check_output(in_place ? logits : Strided<S>(rows, cols), [&](auto& backend, MatrixView<S> dlogits) {
          const bool is_reference = std::is_same_v<std::decay_t<decltype(backend)>, ReferenceBackend>;
          backend.cross_entropy(in_place ? MatrixView<const S>(dlogits) : logits.in(),
                                std::span<const TokenId>(targets), 0.25, (is_reference ? expected : found).values(),
                                dlogits);
        });
        CHECK(relative_difference(found, expected) < tolerance<S>);
      };
      run(false);
      run(true);
    }
  }
}

TEST_CASE("cross entropy of even logits is the logarithm of the vocabulary, and large logits do no harm") {
  for (const bool reference : {false, true}) {
    double row[4] = {700, 700, 700, 700}, gradient[4], loss = 0;
    const std::vector<TokenId> target = {2};
    const auto run = [&](auto&& backend) {
      backend.cross_entropy(MatrixView<const double>(row, 1, 4), std::span<const TokenId>(target), 2,
                            std::span<double>(&loss, 1), MatrixView<double>(gradient, 1, 4));
    };
    if (reference) run(ReferenceBackend());
    else run(CpuBackend(1));
    CHECK(loss == doctest::Approx(std::log(4.0)));
    CHECK(gradient[0] == doctest::Approx(0.5));
    CHECK(gradient[2] == doctest::Approx(-1.5));
  }
}

TEST_CASE_TEMPLATE("sums, scales and gates are those of the reference", S, float, double) {
  for (const Index rows : {1, 40}) {
    for (const Index cols : {1, 130}) {
      const Strided<S> x(rows, cols, 1), dtotal(rows, cols, 2);
      const Matrix<S> gate = random_matrix<S>(1, 1, 3);
      check_output(Strided<S>(rows, cols, 4), [&](auto& backend, MatrixView<S> y) { backend.add(x.in(), y); });
      check_output(Strided<S>(rows, cols), [&](auto& backend, MatrixView<S> y) { backend.scale(x.in(), -0.3, y); });
      check_output(Strided<S>(rows, cols, 5),
                   [&](auto& backend, MatrixView<S> y) { backend.add_gated(row_of(gate), x.in(), y); });
      const Matrix<S> factors = random_matrix<S>(1, cols, 7);
      check_both_modes<S>(rows, cols, [&](auto& backend, MatrixView<S> y, auto mode) {
        backend.scale_columns(x.in(), row_of(factors), y, mode);
      });
      check_output(Strided<S>(1, cols, 8), [&](auto& backend, MatrixView<S> sums) {
        backend.add_column_products(x.in(), dtotal.in(), calm::flat(sums));
      });
      Strided<S> dgate(1, 1, 6);
      check_output(dgate, [&](auto& backend, MatrixView<S> d) {
        Strided<S> ddelta(rows, cols);
        backend.gate_gradient(row_of(gate), x.in(), dtotal.in(), ddelta.view(), calm::flat(d));
      });
      check_output(Strided<S>(rows, cols), [&](auto& backend, MatrixView<S> ddelta) {
        backend.gate_gradient(row_of(gate), x.in(), dtotal.in(), ddelta, std::span<S>());
      });
    }
  }
}

TEST_CASE_TEMPLATE("the sum of squares and AdamW are those of the reference", S, float, double) {
  for (const Index size : {1, 17, 4096, 10007}) {
    const Matrix<S> gradients = random_matrix<S>(1, size, 1);
    double found = -1, expected = -1;
    CpuBackend(2).sum_of_squares(row_of(gradients), &found);
    ReferenceBackend().sum_of_squares(row_of(gradients), &expected);
    CHECK(found == doctest::Approx(expected).epsilon(1e-5));
    const auto run = [&](auto&& backend) {
      std::array<Matrix<S>, 3> state = {random_matrix<S>(1, size, 2), Matrix<S>(1, size), Matrix<S>(1, size)};
      const double factor = 0.7;
      for (Index step = 1; step <= 3; ++step)
        backend.adamw(state[0].values(), row_of(gradients), state[1].values(), state[2].values(),
                      calm::AdamWStep{.learning_rate = 0.01, .weight_decay = 0.1, .step = step}, &factor);
      return state;
    };
    const auto cpu = run(CpuBackend(2)), reference = run(ReferenceBackend());
    for (std::size_t i = 0; i < 3; ++i) CHECK(relative_difference(cpu[i], reference[i]) < tolerance<S>);
  }
}

TEST_CASE("the first step of AdamW moves every value by the learning rate, whatever its gradient, and decays it") {
  std::vector<double> values = {1, 1}, gradients = {1e-3, -50}, m(2), v(2);
  const double factor = 1;
  ReferenceBackend().adamw(std::span(values), std::span<const double>(gradients), std::span(m), std::span(v),
                           calm::AdamWStep{.learning_rate = 0.1, .epsilon = 0, .weight_decay = 0.5}, &factor);
  CHECK(values[0] == doctest::Approx(0.95 - 0.1));
  CHECK(values[1] == doctest::Approx(0.95 + 0.1));
}

TEST_CASE_TEMPLATE("the CPU backend gives the same bits for 1, 2, 3 and 4 threads and from run to run", S, float,
                   double) {
  CpuBackend one(1);
  const std::vector<S> expected = everything<S>(one);
  for (const int threads : {1, 2, 3, 4}) {
    CpuBackend backend(threads);
    for (int repeat = 0; repeat < (sanitized ? 1 : 3); ++repeat) {
      const std::vector<S> found = everything<S>(backend);
      REQUIRE(found.size() == expected.size());
      CHECK(std::memcmp(found.data(), expected.data(), expected.size() * sizeof(S)) == 0);
    }
  }
}

}  // namespace backend_test
