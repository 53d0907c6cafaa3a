// What composition costs: bridges, taps, a training step against the sum of its parts, decoding against the models
// alone; the matrix products below them, and the choice of a token. --calm_threads=N sets the threads (one for each
// core unless given).
#include <calm/compose.hpp>
#include <calm/generate/generate.hpp>
#include <calm/train/trainer.hpp>

#include <benchmark/benchmark.h>

#include <chrono>
#include <cstdlib>

namespace {

using Model = calm::Transformer<calm::zoo::Llama>;
using Composed = calm::ComposedModel<Model, Model>;
using Ctx = calm::Context<calm::CpuBackend>;
using View = calm::MatrixView<float>;
using ConstView = calm::MatrixView<const float>;
using calm::Index;

int threads = 0;

calm::Matrix<float> random_matrix(Index rows, Index cols, std::uint64_t stream) {
  calm::Matrix<float> m(rows, cols);
  calm::Random random(0, stream);
  for (float& x : m.values()) x = static_cast<float>(random.normal());
  return m;
}

/// Reports work of the given size an iteration as billions of operations a second.
void count_flops(benchmark::State& state, Index flops) {
  state.counters["FLOP/s"] =
      benchmark::Counter(static_cast<double>(flops), benchmark::Counter::kIsIterationInvariantRate);
}
void count_tokens(benchmark::State& state, Index tokens) {
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(tokens), benchmark::Counter::kIsIterationInvariantRate);
}

class Stopwatch {
 public:
  /// Seconds since the last call.
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    return std::chrono::duration<double>(now - std::exchange(start_, now)).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Matrix products: arguments T, in, out.

enum class Product { forward_frozen, forward_trained, input_gradient, weight_gradient };

void matrix_product(benchmark::State& state, Product product) {
  const Index rows = state.range(0), in = state.range(1), out = state.range(2);
  calm::CpuBackend backend(threads);
  const calm::Matrix<float> x = random_matrix(rows, in, 1), dy = random_matrix(rows, out, 2),
                            w = random_matrix(out, in, 3);
  const calm::StoredMatrix stored = calm::StoredMatrix::from(w);
  calm::Matrix<float> y(rows, out), dx(rows, in), dw(out, in);
  for (auto _ : state) {
    switch (product) {
      case Product::forward_frozen:
        backend.multiply(backend.packed<float>(stored), x.view(), y.view(), calm::Assign{});
        break;
      case Product::forward_trained: backend.multiply(w.view(), x.view(), y.view(), calm::Assign{}); break;
      case Product::input_gradient:
        backend.multiply_input_gradient(w.view(), dy.view(), dx.view(), calm::Assign{});
        break;
      case Product::weight_gradient: backend.multiply_weight_gradient(dy.view(), x.view(), dw.view()); break;
    }
    benchmark::ClobberMemory();
  }
  count_flops(state, 2 * rows * in * out);
}

void product_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "in", "out"})->UseRealTime();
  b->Args({4096, 128, 128})
      ->Args({4096, 128, 344})
      ->Args({4096, 344, 128})
      ->Args({1024, 768, 768})
      ->Args({1024, 768, 2048});
}
void decoding_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "in", "out"})->UseRealTime();
  b->Args({1, 768, 768})->Args({8, 768, 768});
}
BENCHMARK_CAPTURE(matrix_product, forward_frozen, Product::forward_frozen)
    ->Apply(product_shapes)
    ->Apply(decoding_shapes);
BENCHMARK_CAPTURE(matrix_product, forward_trained, Product::forward_trained)->Apply(product_shapes);
BENCHMARK_CAPTURE(matrix_product, input_gradient, Product::input_gradient)->Apply(product_shapes);
BENCHMARK_CAPTURE(matrix_product, weight_gradient, Product::weight_gradient)->Apply(product_shapes);

// One bridge: arguments D_A, D_B, tokens, in sequences of 32 with one tokenizer; heads of width 16, norms, rotary.

/// Tokens in equal sequences, and what identity alignment makes of them.
struct Tokens {
  std::vector<calm::TokenId> ids;
  std::vector<Index> offsets{0}, positions;
  calm::AlignedBatch aligned;

  Tokens(Index tokens, Index length) {
    calm::Random random(7);
    aligned.clear();
    for (Index t = 0; t < tokens; t += length) {
      const Index count = std::min(length, tokens - t);
      for (Index i = 0; i < count; ++i) {
        ids.push_back(static_cast<calm::TokenId>(random.below(41)));
        positions.push_back(i);
      }
      offsets.push_back(t + count);
      calm::AlignmentState start;
      aligned.append(calm::IdentityAligner{}, start, std::span(ids).subspan(static_cast<std::size_t>(t)), 0);
    }
  }
  calm::TokenBatch batch() const { return {ids, offsets, {}, {}}; }
};

calm::ModelSpec sizes(Index width, Index blocks, Index heads) {
  return {.vocabulary = 41,
          .width = width,
          .hidden = width * 43 / 16,
          .blocks = blocks,
          .heads = {heads, heads, width / heads}};
}

void bridge(benchmark::State& state, bool backward) {
  const Index augment_width = state.range(0), anchor_width = state.range(1), count = state.range(2);
  Ctx ctx(threads);
  calm::LinkSet<float> links({{0, 0, 0}}, sizes(anchor_width, 1, anchor_width / 16),
                             {sizes(augment_width, 1, augment_width / 16)}, {.zero_output = false, .rotary = true});
  const auto& bridge = links.bridges().front();
  calm::Gradients<float> grads(links);
  const Tokens tokens(count, 32);
  const auto a = random_matrix(count, augment_width, 1), x = random_matrix(count, anchor_width, 2),
             dtotal = random_matrix(count, anchor_width, 3);
  calm::Matrix<float> total(count, anchor_width), dx(count, anchor_width);
  calm::CrossAttentionBridge<float>::Cache cache;
  Stopwatch watch;
  for (auto _ : state) {
    ctx.arena.reset();
    const auto plan = links.plan(ctx, tokens.batch(), tokens.aligned, tokens.positions);
    watch.lap();
    bridge.forward(ctx, plan, a.view(), x.view(), total.view(), cache);
    if (backward) {
      watch.lap();
      bridge.backward(ctx, plan, a.view(), x.view(), dtotal.view(), dx.view(), cache, grads);
    }
    state.SetIterationTime(watch.lap());
  }
  // The maps alone; backward has a product for the input (all but the projection's are needed, and its norm's) and the
  // weight.
  count_flops(state, (backward ? 2 : 1) * 2 * count * (4 * anchor_width * anchor_width + augment_width * anchor_width));
  count_tokens(state, count);
}

void bridge_sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"D_A", "D_B", "tokens"})->UseManualTime();
  b->Args({128, 128, 4096})
      ->Args({128, 128, 512})
      ->Args({256, 512, 2048})
      ->Args({768, 768, 1024})
      ->Args({768, 2048, 512});
}
BENCHMARK_CAPTURE(bridge, forward, false)->Apply(bridge_sizes);
BENCHMARK_CAPTURE(bridge, backward, true)->Apply(bridge_sizes);

// A tap: the forward pass of a model that nobody observes, and with its last two blocks tapped. Argument: tokens.

std::shared_ptr<const Model> augment_of(Index width) {
  return std::make_shared<const Model>(sizes(width, 3, width / 32), calm::RandomWeights{.seed = 1});
}
std::shared_ptr<const Model> anchor_of(Index width) {
  return std::make_shared<const Model>(sizes(width, 4, width / 16), calm::RandomWeights{.seed = 2});
}

template <bool tapped>
void forward_pass(benchmark::State& state) {
  Ctx ctx(threads);
  const auto model = augment_of(128);
  const Tokens tokens(state.range(0), 32);
  calm::TappedStates<float> taps({1, 2});
  for (auto _ : state) {
    ctx.arena.reset();
    View x = model->embed(ctx, tokens.batch());
    const Index blocks = model->spec().blocks;
    if constexpr (tapped) model->run(ctx, tokens.batch(), {}, x, 0, blocks, nullptr, calm::LayerTap<float>(taps));
    else model->run(ctx, tokens.batch(), {}, x, 0, blocks, nullptr, calm::NullObserver{});
    benchmark::ClobberMemory();
  }
  count_tokens(state, state.range(0));
}
BENCHMARK(forward_pass<false>)
    ->Name("forward_pass/NullObserver")
    ->ArgName("tokens")
    ->Arg(512)
    ->Arg(4096)
    ->UseRealTime();
BENCHMARK(forward_pass<true>)->Name("forward_pass/LayerTap")->ArgName("tokens")->Arg(512)->Arg(4096)->UseRealTime();

// A training step against the sum of its parts, measured in turn. Argument: the width of both models. The time is that
// of the step; the counters give the parts in milliseconds, and the step over their sum.

Composed composition(Index width) {
  return calm::compose(anchor_of(width), {{0, 1, 2}, {0, 2, 3}}, {.rotary = true}, augment_of(width));
}

/// Sequences of 20 to 48 tokens with prompts of 6 to 16.
calm::PackedBatch ragged_batch(Index sequences) {
  calm::Random random(3);
  calm::PackedBatch batch;
  const auto draw = [&](Index n) {
    std::vector<calm::TokenId> ids;
    for (Index i = 0; i < n; ++i) ids.push_back(static_cast<calm::TokenId>(random.below(41)));
    return ids;
  };
  for (Index s = 0; s < sequences; ++s) {
    const Index length = 20 + random.below(29), prompt = 6 + random.below(11);
    batch.add({draw(prompt), draw(length - prompt)});
  }
  return batch;
}

/// What a step consists of, each through the public functions of the part alone.
class Parts {
 public:
  Parts(Ctx& ctx, Composed& model, const calm::PackedBatch& batch)
      : ctx_(ctx), model_(model), batch_(batch), grads_(model),
        optimizer_(static_cast<Index>(grads_.values().size()), calm::AdamWOptions{}),
        links_(calm::Links(model.links()), model.spec(), {model.augment<0>().spec()}, model.options()),
        link_grads_(links_) {
    model.prepare(ctx, calm::scored_tokens(batch), states_);
  }

  /// The augment up to its highest tap, and the anchor up to the lowest link.
  void frozen_forward() {
    ctx_.arena.reset();
    const calm::TokenBatch tokens = calm::scored_tokens(batch_), all = batch_.tokens();
    View a = model_.augment<0>().embed(ctx_, all);
    model_.augment<0>().run(ctx_, all, {}, a, 0, taps_.depth(), nullptr, calm::LayerTap<float>(taps_));
    View x = model_.anchor().embed(ctx_, tokens);
    model_.anchor().run(ctx_, tokens, {}, x, 0, model_.lowest_write() + 1, nullptr, calm::NullObserver{});
  }

  /// The blocks above the lowest link, the head and the loss, forward and backward.
  void anchor() {
    ctx_.arena.reset();
    const calm::TokenBatch tokens = calm::scored_tokens(batch_);
    const Index first = model_.lowest_write() + 1, last = model_.spec().blocks;
    View x = ctx_.arena.matrix<float>(tokens.tokens(), model_.spec().width);
    ctx_.backend.scale(ConstView(states_.lower.view()), 1, x);
    model_.anchor().run(ctx_, tokens, {}, x, first, last, &tape_, calm::NullObserver{});
    const View logits = ctx_.arena.matrix<float>(x.rows, model_.spec().vocabulary);
    View dx = ctx_.arena.matrix<float>(x.rows, x.cols);
    const auto losses = ctx_.arena.vector<float>(x.rows);
    Model::HeadCache head;
    model_.anchor().head(ctx_, x, logits, head);
    ctx_.backend.cross_entropy(ConstView(logits), batch_.targets(), 1.0 / static_cast<double>(x.rows), losses, logits);
    model_.anchor().head_backward(ctx_, x, logits, dx, head);
    model_.anchor().run_backward(ctx_, tokens, {}, tape_, dx, first, last, calm::NullObserver{});
  }

  /// Every bridge, forward and backward; only those above the lowest link pass a gradient on.
  void bridges() {
    ctx_.arena.reset();
    const calm::TokenBatch tokens = calm::scored_tokens(batch_);
    const auto plans = links_.plans(ctx_, tokens, states_, nullptr);
    const ConstView lower = states_.lower.view();
    const View all_totals = ctx_.arena.matrix<float>(lower.rows, lower.cols),
               all_gradients = ctx_.arena.matrix<float>(lower.rows, lower.cols);
    for (std::size_t k = 0; k < links_.links().size(); ++k) {
      const calm::Link& link = links_.links()[k];
      const bool last = link.write == model_.spec().blocks - 1;
      const calm::BridgePlan<float>& plan = (last ? plans.last : plans.all).front();
      const Index rows = last ? tokens.final_rows() : lower.rows;
      const ConstView x = lower.middle_rows(0, rows);
      const View total = all_totals.middle_rows(0, rows), dx = all_gradients.middle_rows(0, rows);
      calm::CrossAttentionBridge<float>::Cache cache;
      const auto a = states_.tapped.front().after(link.tap);
      links_.bridges()[k].forward(ctx_, plan, a, x, total, cache);
      links_.bridges()[k].backward(ctx_, plan, a, x, x, link.write > model_.lowest_write() ? dx : View{}, cache,
                                   link_grads_);
    }
  }

  void optimizer() {
    grads_.set_zero();
    double squares = 0;
    ctx_.backend.sum_of_squares(std::span<const float>(grads_.values()), &squares);
    optimizer_.update(ctx_, grads_, std::sqrt(squares), 1e-4, 1);
  }

 private:
  Ctx& ctx_;
  Composed& model_;
  const calm::PackedBatch& batch_;
  calm::Gradients<float> grads_;
  calm::AdamW<float> optimizer_;
  calm::LinkSet<float> links_;
  calm::Gradients<float> link_grads_;
  Composed::States states_;
  calm::TappedStates<float> taps_{{1, 2}};
  Model::Tape tape_;
};

void training_step(benchmark::State& state) {
  Ctx ctx(threads);
  Composed model = composition(state.range(0));
  const calm::PackedBatch batch = ragged_batch(128);
  calm::Trainer trainer(ctx, model, calm::CosineSchedule{.peak = 1e-4, .warmup = 0, .final_fraction = 1});
  Parts parts(ctx, model, batch);
  trainer.step(batch);
  double step = 0, frozen = 0, anchor = 0, bridges = 0, optimizer = 0;
  Stopwatch watch;
  for (auto _ : state) {
    watch.lap();
    trainer.step(batch);
    const double seconds = watch.lap();
    state.SetIterationTime(seconds);
    step += seconds;
    parts.frozen_forward();
    frozen += watch.lap();
    parts.anchor();
    anchor += watch.lap();
    parts.bridges();
    bridges += watch.lap();
    parts.optimizer();
    optimizer += watch.lap();
  }
  const auto milliseconds = [&](double total) {
    return benchmark::Counter(1000 * total, benchmark::Counter::kAvgIterations);
  };
  state.counters["frozen_ms"] = milliseconds(frozen);
  state.counters["anchor_ms"] = milliseconds(anchor);
  state.counters["bridges_ms"] = milliseconds(bridges);
  state.counters["optimizer_ms"] = milliseconds(optimizer);
  state.counters["step/sum"] = step / (frozen + anchor + bridges + optimizer);
  state.counters["tokens/s"] = static_cast<double>(batch.tokens().tokens() * state.iterations()) / step;
}
BENCHMARK(training_step)
    ->ArgName("width")
    ->Arg(128)
    ->Arg(256)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->MinTime(3);

// Decoding with caches: 32 new tokens after 32 others, the head included. Arguments: width of both models, sequences.

template <class AnyModel>
void decode(benchmark::State& state, const AnyModel& model) {
  constexpr Index prompt = 32, steps = 32;
  const Index sequences = state.range(1);
  Ctx ctx(threads);
  auto session = model.make_session(ctx, sequences, prompt + steps);
  std::vector<Index> slots, prompt_offsets{0}, step_offsets{0};
  for (Index s = 0; s < sequences; ++s) {
    slots.push_back(s);
    prompt_offsets.push_back((s + 1) * prompt);
    step_offsets.push_back(s + 1);
  }
  const Tokens tokens(sequences * prompt, prompt), step(sequences, 1);
  Stopwatch watch;
  for (auto _ : state) {
    for (const Index slot : slots) session.clear(slot);
    ctx.arena.reset();
    model.advance(ctx, session, {tokens.ids, prompt_offsets, {}, slots}, calm::NullObserver{});
    watch.lap();
    for (Index i = 0; i < steps; ++i) {
      ctx.arena.reset();
      calm::next_logits(ctx, model, session, {step.ids, step_offsets, {}, slots});
    }
    state.SetIterationTime(watch.lap());
  }
  count_tokens(state, steps * sequences);
}

void decode_composed(benchmark::State& state) { decode(state, composition(state.range(0))); }
void decode_anchor(benchmark::State& state) { decode(state, *anchor_of(state.range(0))); }
void decode_augment(benchmark::State& state) { decode(state, *augment_of(state.range(0))); }

void decode_sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"width", "sequences"})
      ->ArgsProduct({{128, 512}, {1, 32}})
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}
BENCHMARK(decode_composed)->Name("decode/composed")->Apply(decode_sizes);
BENCHMARK(decode_anchor)->Name("decode/anchor")->Apply(decode_sizes);
BENCHMARK(decode_augment)->Name("decode/augment")->Apply(decode_sizes);

// The choice of a token from its logits, which is added to what decoding one costs.

void sampling(benchmark::State& state, const calm::SamplerOptions& options) {
  const calm::Matrix<float> logits = random_matrix(1, state.range(0), 1);
  calm::Sampler sampler(options);
  calm::Random random(1);
  for (auto _ : state) benchmark::DoNotOptimize(sampler(std::span<const float>(logits.values()), random));
}

void vocabularies(benchmark::internal::Benchmark* b) {
  b->ArgName("vocabulary")->Arg(49152)->Arg(262144)->Unit(benchmark::kMillisecond);
}
BENCHMARK_CAPTURE(sampling, greedy, {})->Apply(vocabularies);
BENCHMARK_CAPTURE(sampling, temperature, {.temperature = 0.8})->Apply(vocabularies);
BENCHMARK_CAPTURE(sampling, top_p, {.temperature = 0.8, .top_p = 0.9})->Apply(vocabularies);
BENCHMARK_CAPTURE(sampling, top_k, {.temperature = 0.8, .top_k = 40})->Apply(vocabularies);

}  // namespace

int main(int argc, char** argv) {
  constexpr std::string_view flag = "--calm_threads=";
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    if (std::string_view(argv[i]).starts_with(flag)) threads = std::atoi(argv[i] + flag.size());
    else argv[kept++] = argv[i];
  }
  argc = kept;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("calm_threads", threads > 0 ? std::to_string(threads) : "one for each core");
  benchmark::RunSpecifiedBenchmarks();
}
