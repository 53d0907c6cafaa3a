// Each module by itself, in double: gradients by finite differences, what is overwritten and what is added to.
#include <doctest/doctest.h>
#include <calm/backend/reference.hpp>
#include <calm/compose/cross_attention_bridge.hpp>
#include <calm/model/zoo/llama.hpp>
#include <calm/train/gradient_check.hpp>
#include <support/models.hpp>

namespace nn_test {
using namespace calm_test;
using calm::Accumulate;
using calm::Assign;
using calm::Frozen;
using calm::Gradients;
using calm::Lora;
using calm::ReferenceBackend;
using calm::Trainable;
using View = MatrixView<double>;
using In = MatrixView<const double>;
using Reference = calm::Context<ReferenceBackend>;

namespace {

calm::LoraWeights<TestWeights> source{TestWeights{1}, 3, 0.7, 2};

/// The sum of y * g, for a fixed g: a scalar whose gradient by y is g.
double weighted(In y, const Matrix<double>& g) {
  double total = 0;
  for (Index t = 0; t < y.rows; ++t)
    for (Index j = 0; j < y.cols; ++j) total += y(t, j) * g(t, j);
  return total;
}

/// What a test knows of a module, on rows of `in` values that it turns into rows of `out` values:
/// forward(ctx, x, y, cache) and backward(ctx, x, dy, dx, cache, grads...).
template <class Module, class CacheType>
struct Trial {
  using Cache = CacheType;
  Module& module;
  Index rows, in, out;
  bool adds_to_y;  // forward adds to y, else it overwrites y
};

/// Checks the gradients of all weights and of x, that dx is overwritten (it begins as NaN), that weight gradients are
/// added to what was there, and that dx has the same bits with and without them.
template <class Ctx>
void check_module(auto trial, const auto& forward, const auto& backward) {
  Ctx ctx(2);
  auto& module = trial.module;
  using Cache = typename decltype(trial)::Cache;
  Matrix<double> x = random_matrix<double>(trial.rows, trial.in, 11);
  const Matrix<double> g = random_matrix<double>(trial.rows, trial.out, 12);
  const Matrix<double> start =
      trial.adds_to_y ? random_matrix<double>(trial.rows, trial.out, 13) : poisoned<double>(trial.rows, trial.out);
  const auto loss = [&] {
    ctx.arena.reset();
    Cache cache;
    Matrix<double> y = start;
    forward(ctx, In(x.view()), y.view(), cache);
    return weighted(y.view(), g);
  };

  ctx.arena.reset();
  Cache cache;
  Matrix<double> y = start, dx = poisoned<double>(trial.rows, trial.in);
  forward(ctx, In(x.view()), y.view(), cache);
  if (trial.adds_to_y) {
    Matrix<double> zero(trial.rows, trial.out);
    Cache other;
    forward(ctx, In(x.view()), zero.view(), other);
    for (Index i = 0; i < y.size(); ++i) CHECK(y.data()[i] == doctest::Approx(start.data()[i] + zero.data()[i]));
  }
  backward(ctx, In(x.view()), constant(g), dx.view(), cache);
  calm::GradientCheckResult result;
  if constexpr (std::decay_t<decltype(module)>::trainable) {
    Gradients<double> grads(module), twice(module);
    Matrix<double> with = poisoned<double>(trial.rows, trial.in);
    backward(ctx, In(x.view()), constant(g), with.view(), cache, grads);
    CHECK(same_bits(with, dx));
    for (int i = 0; i < 2; ++i) backward(ctx, In(x.view()), constant(g), with.view(), cache, twice);
    for (std::size_t i = 0; i < grads.values().size(); ++i)
      CHECK(twice.values()[i] == doctest::Approx(2 * grads.values()[i]).epsilon(1e-12));
    result = calm::check_parameter_gradients(module, grads, loss);  // overwrites what the cache points to
  }
  calm::check_gradient("x", x.view(), constant(dx), loss, result);
  INFO(calm::to_string(result));
  CHECK(result.worst_error < 1e-6);
}

void check_on_both(auto trial, const auto& forward, const auto& backward) {
  check_module<Reference>(trial, forward, backward);
  check_module<Cpu>(trial, forward, backward);
}

struct NoCache {};

template <class Weights>
void check_linear() {
  calm::Linear<Weights, double> linear("linear", 5, 4, source);
  randomise(linear, 3);  // also LoRA's B, which begins as zero
  check_on_both(
      Trial<decltype(linear), NoCache>{linear, 3, 4, 5, false},
      [&](auto& ctx, In x, View y, NoCache&) { linear.forward(ctx, x, y, Assign{}); },
      [&](auto& ctx, In x, In dy, View dx, const NoCache&, auto&... grads) {
        linear.backward(ctx, x, dy, dx, Assign{}, grads...);
      });
  check_on_both(
      Trial<decltype(linear), NoCache>{linear, 3, 4, 5, true},
      [&](auto& ctx, In x, View y, NoCache&) { linear.forward(ctx, x, y, Accumulate{}); },
      [&](auto& ctx, In x, In dy, View dx, const NoCache&, auto&... grads) {
        linear.backward(ctx, x, dy, dx, Assign{}, grads...);
      });

  // Accumulate adds to dx, and an empty dx is not computed while the weights' gradients are.
  Cpu ctx(1);
  const auto x = random_matrix<double>(3, 4, 1), dy = random_matrix<double>(3, 5, 2),
             before = random_matrix<double>(3, 4, 3);
  Matrix<double> assigned(3, 4), added = before;
  linear.backward(ctx, constant(x), constant(dy), assigned.view(), Assign{});
  linear.backward(ctx, constant(x), constant(dy), added.view(), Accumulate{});
  for (Index i = 0; i < added.size(); ++i)
    CHECK(added.data()[i] == doctest::Approx(before.data()[i] + assigned.data()[i]));
  linear.backward(ctx, constant(x), constant(dy), View{}, Assign{});
  if constexpr (Weights::trainable) {
    Gradients<double> with(linear), without(linear);
    linear.backward(ctx, constant(x), constant(dy), assigned.view(), Assign{}, with);
    linear.backward(ctx, constant(x), constant(dy), View{}, Assign{}, without);
    CHECK(std::equal(with.values().begin(), with.values().end(), without.values().begin()));
  }
}

/// Ragged sequences, one of them empty, and the angles of their positions.
template <class Ctx>
calm::AttentionPlan<double> causal_plan(Ctx& ctx, const calm::Rotary<double>& rotary) {
  static const std::vector<Index> offsets = {0, 4, 4, 5, 8};
  static const std::vector<Index> positions = {0, 1, 2, 3, 0, 0, 1, 2};
  static const std::vector<calm::VisibleRange> visible = {{0, 1}, {0, 2}, {0, 3}, {0, 4},
                                                          {0, 1}, {0, 1}, {0, 2}, {0, 3}};
  return {.tokens = {offsets, visible, rotary.angles(ctx, positions)}};
}

template <class Weights>
void check_attention() {
  calm::SelfAttention<calm::zoo::Llama, Weights, double> attention("attention", {.width = 6, .heads = {4, 2, 2}},
                                                                   source);
  randomise(attention, 3);
  const calm::Rotary<double> rotary(2, 100);
  using Cache = typename decltype(attention)::Cache;
  check_on_both(
      Trial<decltype(attention), Cache>{attention, 8, 6, 6, true},
      [&](auto& ctx, In x, View y, Cache& cache) { attention.forward(ctx, causal_plan(ctx, rotary), x, y, cache); },
      [&](auto& ctx, In x, In dy, View dx, const Cache& cache, auto&... grads) {
        attention.backward(ctx, causal_plan(ctx, rotary), x, dy, dx, cache, grads...);
      });
}

template <class Architecture, class Weights>
void check_block() {
  using Block = calm::TransformerBlock<Architecture, Weights, double>;
  Block block("block", {6, 5, {2, 1, 4}, 1e-5}, source);
  randomise(block, 3);
  const calm::Rotary<double> rotary(4, 100);
  using Cache = typename Block::Cache;
  check_on_both(
      Trial<Block, Cache>{block, 8, 6, 6, false},
      [&](auto& ctx, In x, View y, Cache& cache) { block.forward(ctx, causal_plan(ctx, rotary), x, y, cache); },
      [&](auto& ctx, In, In dy, View dx, const Cache& cache, auto&... grads) {
        ctx.backend.scale(dy, 1, dx);  // backward works in place
        block.backward(ctx, causal_plan(ctx, rotary), dx, cache, grads...);
      });
}

void check_mlp(auto module) {
  using Module = decltype(module);
  using Cache = typename Module::Cache;
  randomise(module, 3);
  check_on_both(
      Trial<Module, Cache>{module, 3, 4, 4, true},
      [&](auto& ctx, In x, View y, Cache& cache) { module.forward(ctx, x, y, cache); },
      [&](auto& ctx, In x, In dy, View dx, const Cache& cache, auto&... grads) {
        module.backward(ctx, x, dy, dx, cache, grads...);
      });
}

}  // namespace

TEST_CASE("Linear: frozen, trainable and with LoRA") {
  check_linear<Frozen>();
  check_linear<Trainable>();
  check_linear<Lora>();
}

TEST_CASE("Linear is y = x W^T, and LoRA adds scale (x A^T) B^T") {
  calm::Linear<Lora, double> linear("linear", 5, 4, source);
  randomise(linear, 3);
  const Matrix<double> w = TestWeights{1}("linear.weight", 5, 4).dense<double>(), x = random_matrix<double>(1, 4, 2);
  Matrix<double> a, b;
  calm::for_each_parameter(
      linear, [&](const std::string& name, const auto& p) { (contains(name, "lora_A") ? a : b) = p.value; });
  CHECK(a.rows() == 3);
  CHECK(b.cols() == 3);
  Cpu ctx(1);
  Matrix<double> y = poisoned<double>(1, 5);
  linear.forward(ctx, constant(x), y.view(), Assign{});
  for (Index i = 0; i < 5; ++i) {
    double expected = 0;
    for (Index j = 0; j < 4; ++j) {
      double weight = w(i, j);
      for (Index r = 0; r < 3; ++r) weight += 0.7 * b(i, r) * a(r, j);
      expected += weight * x(0, j);
    }
    CHECK(y(0, i) == doctest::Approx(expected));
  }
}

TEST_CASE("a frozen Linear computes on bf16 weights as on the values that they round to") {
  const Matrix<double> w = random_matrix<double>(5, 4, 1), x = random_matrix<double>(2, 4, 2);
  const auto stored = calm::StoredMatrix::from(w, calm::DType::bf16);
  const calm::Linear<Frozen, double> rounded("a", 5, 4, [&](const std::string&, Index, Index) { return stored; });
  const calm::Linear<Trainable, double> dense(stored.dense<double>());
  Cpu ctx(1);
  Matrix<double> a(2, 5), b(2, 5);
  rounded.forward(ctx, constant(x), a.view(), Assign{});
  dense.forward(ctx, constant(x), b.view(), Assign{});
  CHECK(same_bits(a, b));
}

TEST_CASE("RmsNorm: frozen and trainable") {
  const auto check = [&]<class Weights>(Weights) {
    calm::RmsNorm<Weights, double> norm("norm", 5, 1e-2, source);
    using Cache = typename decltype(norm)::Cache;
    check_on_both(
        Trial<decltype(norm), Cache>{norm, 3, 5, 5, false},
        [&](auto& ctx, In x, View y, Cache& cache) { norm.forward(ctx, x, y, cache); },
        [&](auto& ctx, In x, In dy, View dx, const Cache& cache, auto&... grads) {
          norm.backward(ctx, x, dy, dx, Assign{}, cache, grads...);
        });
  };
  check(Frozen{});
  check(Trainable{});
}

TEST_CASE("RmsNorm divides by the root of the mean square") {
  const calm::RmsNorm<Frozen, double> norm(2, 0.0);
  Matrix<double> x(1, 2), y(1, 2);
  x(0, 0) = 3, x(0, 1) = 4;
  Cpu ctx(1);
  calm::RmsNorm<Frozen, double>::Cache cache;
  norm.forward(ctx, constant(x), y.view(), cache);
  CHECK(y(0, 0) == doctest::Approx(3 / std::sqrt(12.5)));
  CHECK(y(0, 1) == doctest::Approx(4 / std::sqrt(12.5)));
}

TEST_CASE("Embedding: its table's gradient, also where the table is the output head") {
  calm::Embedding<Trainable, double> embedding("embedding", 6, 4, source);
  const std::vector<TokenId> ids = {5, 0, 2, 2, 5};
  const Matrix<double> g = random_matrix<double>(5, 4, 1), g_out = random_matrix<double>(5, 6, 2);
  const auto check = [&](auto& ctx, bool tied) {
    const auto loss = [&] {
      Matrix<double> y = poisoned<double>(5, 4), logits = poisoned<double>(5, 6);
      embedding.forward(ctx, ids, y.view());
      embedding.as_linear().forward(ctx, constant(y), logits.view(), Assign{});
      return weighted(y.view(), g) + (tied ? weighted(logits.view(), g_out) : 0);
    };
    Gradients<double> grads(embedding);
    Matrix<double> y(5, 4), dy = g;
    embedding.forward(ctx, ids, y.view());
    if (tied) embedding.as_linear().backward(ctx, constant(y), constant(g_out), dy.view(), Accumulate{}, grads);
    embedding.backward(ctx, ids, constant(dy), grads);
    const auto result = calm::check_parameter_gradients(embedding, grads, loss);
    INFO(calm::to_string(result));
    CHECK(result.worst_error < 1e-6);
  };
  Cpu cpu(2);
  Reference reference;
  for (const bool tied : {false, true}) check(cpu, tied), check(reference, tied);
}

TEST_CASE("GatedMlp and Mlp, with every policy of weights and both activations") {
  check_mlp(calm::GatedMlp<calm::Silu, Frozen, double>("mlp", 4, 5, source));
  check_mlp(calm::GatedMlp<calm::Silu, Trainable, double>("mlp", 4, 5, source));
  check_mlp(calm::GatedMlp<calm::Silu, Lora, double>("mlp", 4, 5, source));
  check_mlp(calm::GatedMlp<calm::GeluTanh, Trainable, double>("mlp", 4, 5, source));
  check_mlp(calm::Mlp<calm::GeluTanh, false, Frozen, double>("mlp", 4, 5, source));
  check_mlp(calm::Mlp<calm::GeluTanh, false, Trainable, double>("mlp", 4, 5, source));
  check_mlp(calm::Mlp<calm::Silu, true, Lora, double>("mlp", 4, 5, source));
}

TEST_CASE("SelfAttention: grouped heads, rotary positions, ragged sequences") {
  check_attention<Frozen>();
  check_attention<Trainable>();
  check_attention<Lora>();
}

TEST_CASE("rotary attention depends on distances alone") {
  // The same tokens further on in the text: all positions shifted by 17.
  const calm::SelfAttention<calm::zoo::Llama, Frozen, double> attention("attention", {.width = 6, .heads = {2, 2, 4}},
                                                                        source);
  const calm::Rotary<double> rotary(4, 100);
  const Matrix<double> x = random_matrix<double>(4, 6, 1);
  Cpu ctx(1);
  const std::vector<Index> offsets = {0, 4};
  const std::vector<calm::VisibleRange> visible = {{0, 1}, {0, 2}, {0, 3}, {0, 4}};
  const auto run = [&](const std::vector<Index>& positions) {
    Matrix<double> y(4, 6);
    decltype(attention)::Cache cache;
    attention.forward(ctx, {{offsets, visible, rotary.angles(ctx, positions)}}, constant(x), y.view(), cache);
    return y;
  };
  CHECK(relative_difference(run({17, 18, 19, 20}), run({0, 1, 2, 3})) < 1e-12);
  CHECK(relative_difference(run({0, 2, 4, 6}), run({0, 1, 2, 3})) > 1e-3);
}

TEST_CASE("TransformerBlock, with every policy of weights and for two architectures") {
  check_block<calm::zoo::Llama, Frozen>();
  check_block<calm::zoo::Llama, Trainable>();
  check_block<calm::zoo::Llama, Lora>();
  check_block<PlainArchitecture, Trainable>();
}

TEST_CASE("a bridge adds to the stream's total, and its input gradient to what is there") {
  for (const calm::BridgeOptions& options :
       {calm::BridgeOptions{.heads = 2}, {.heads = 1, .norms = false, .gate = calm::Gate::tanh}}) {
    calm::CrossAttentionBridge<double> bridge("bridge", 4, 5, options);
    randomise(bridge, 3);
    const auto check = [&](auto& ctx) {
      const std::vector<Index> queries = {0, 3, 5}, keys = {0, 4, 4};  // nothing to see for the second sequence
      const std::vector<calm::VisibleRange> visible = {{0, 0}, {0, 2}, {0, 4}, {0, 0}, {0, 0}};
      const calm::BridgePlan<double> plan{{queries, visible, {}}, keys, {}};
      const Matrix<double> a = random_matrix<double>(4, 5, 1), g = random_matrix<double>(5, 4, 2),
                           start = random_matrix<double>(5, 4, 3);
      Matrix<double> x = random_matrix<double>(5, 4, 4);
      const auto loss = [&] {
        ctx.arena.reset();
        typename decltype(bridge)::Cache cache;
        Matrix<double> total = start;
        bridge.forward(ctx, plan, constant(a), constant(x), total.view(), cache);
        return weighted(total.view(), g);
      };
      ctx.arena.reset();
      typename decltype(bridge)::Cache cache;
      Matrix<double> total = start, dx = start;
      bridge.forward(ctx, plan, constant(a), constant(x), total.view(), cache);
      for (Index j = 0; j < 4; ++j) {
        for (const Index t : {0, 3, 4}) CHECK(total(t, j) == start(t, j));
        CHECK(total(1, j) != start(1, j));
      }
      Gradients<double> grads(bridge);
      bridge.backward(ctx, plan, constant(a), constant(x), constant(g), dx.view(), cache, grads);
      for (Index i = 0; i < dx.size(); ++i) dx.data()[i] -= start.data()[i];

      Gradients<double> without(bridge);
      bridge.backward(ctx, plan, constant(a), constant(x), constant(g), View{}, cache, without);
      CHECK(std::equal(grads.values().begin(), grads.values().end(), without.values().begin()));
      Matrix<double> alone(5, 4);
      bridge.backward(ctx, plan, constant(a), constant(x), constant(g), alone.view(), cache);
      CHECK(relative_difference(alone, dx) < 1e-10);

      auto result = calm::check_parameter_gradients(bridge, grads, loss);
      calm::check_gradient("x", x.view(), constant(dx), loss, result);
      INFO(calm::to_string(result));
      CHECK(result.worst_error < 1e-6);
    };
    Cpu cpu(2);
    Reference reference;
    check(cpu), check(reference);
  }
}

namespace {

/// A module whose weights are those of a KeyValueMap.
struct AllMaps {
  static void visit(auto& self, const std::string& prefix, auto&& fn) {
    using Map = calm::KeyValueMap<double>;
    Map::visit_projection(self.maps, prefix, fn);
    Map::visit_maps(self.maps, prefix, fn);
    Map::visit_norm(self.maps, prefix, fn);
  }
  calm::KeyValueMap<double>& maps;
};

}  // namespace

TEST_CASE("keys and values on folded weights, and their gradients, are those map by map") {
  for (const bool norm : {false, true}) {
    CAPTURE(norm);
    calm::KeyValueMap<double> maps("maps", 6, 7, norm, 0, 1);
    AllMaps module{maps};
    randomise(module, 2);
    const auto check = [&](auto& ctx) {
      constexpr Index rows = 40, piece = 5;  // folding pays from 2 * 36 * 7 / (72 - 42) = 16 rows on
      const Matrix<double> a = random_matrix<double>(rows, 7, 3), dk = random_matrix<double>(rows, 6, 4),
                           dv = random_matrix<double>(rows, 6, 5);
      Matrix<double> k(rows, 6), v(rows, 6), k_apart(rows, 6), v_apart(rows, 6);
      Gradients<double> grads(module), apart(module);
      const auto run = [&](Index first, Index count, Matrix<double>& keys, Matrix<double>& values, auto& into) {
        ctx.arena.reset();
        const auto part = [&](const Matrix<double>& m) { return constant(m).middle_rows(first, count); };
        typename calm::KeyValueMap<double>::Cache cache;
        maps.forward(ctx, count, part(a), keys.view().middle_rows(first, count),
                     values.view().middle_rows(first, count), cache);
        CHECK(cache.folded == (count == rows));
        maps.backward(ctx, part(a), part(dk), part(dv), cache, into);
      };
      run(0, rows, k, v, grads);
      for (Index t = 0; t < rows; t += piece) run(t, piece, k_apart, v_apart, apart);
      CHECK(relative_difference(k, k_apart) < 1e-12);
      CHECK(relative_difference(v, v_apart) < 1e-12);
      double worst = 0, largest = 0;
      for (std::size_t i = 0; i < grads.values().size(); ++i) {
        worst = std::max(worst, std::abs(grads.values()[i] - apart.values()[i]));
        largest = std::max(largest, std::abs(apart.values()[i]));
      }
      CHECK(worst < 1e-12 * largest);
    };
    Cpu cpu(2);
    Reference reference;
    check(cpu), check(reference);
  }
}

TEST_CASE("weights of another shape or none are refused by name") {
  const calm::Linear<Trainable, double> module("known", 2, 3, source);
  const auto give = calm::weights_of(module);
  CHECK(contains(message_of<calm::ConfigError>([&] { give("unknown", 2, 3); }), "unknown"));
  CHECK(contains(message_of<calm::ShapeError>([&] { give(".weight", 3, 2); }), "[2, 3] but [3, 2]"));
  CHECK(contains(message_of<calm::ConfigError>([] {
                   calm::Linear<Lora, double>("thin", 2, 3, calm::LoraWeights<TestWeights>{TestWeights{}, 0});
                 }),
                 "thin"));
}

}  // namespace nn_test
