// After the first step, training and decoding ask the system for no memory: neither calm nor Eigen nor the standard
// library. With products by oneDNN (CALM_WITH_ONEDNN) that is held of calm: what oneDNN allocates at each call is its
// own.
#include <doctest/doctest.h>
#include <calm/backend/cpu_bf16.hpp>
#include <calm/generate/generate.hpp>
#include <calm/train/muon.hpp>
#include <calm/train/trainer.hpp>
#include <support/models.hpp>

#include <atomic>
#include <cerrno>
#include <cstdlib>

// malloc and its family are replaced by ones that count. operator new, Eigen and the C++ library all end in them. The
// sanitizers bring an allocator of their own, which cannot be replaced: there this file tests nothing.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CALM_TEST_COUNTS_MALLOC 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define CALM_TEST_COUNTS_MALLOC 0
#endif
#endif
#if !defined(CALM_TEST_COUNTS_MALLOC) && defined(__GLIBC__)
#define CALM_TEST_COUNTS_MALLOC 1
#elif !defined(CALM_TEST_COUNTS_MALLOC)
#define CALM_TEST_COUNTS_MALLOC 0
#endif

namespace {

std::atomic<long> allocations{0};
constexpr bool counts = CALM_TEST_COUNTS_MALLOC;

}  // namespace

#if CALM_TEST_COUNTS_MALLOC

extern "C" {

void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t size) noexcept {
  ++allocations;
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) noexcept {
  ++allocations;
  return __libc_calloc(count, size);
}
void* realloc(void* p, std::size_t size) noexcept {
  ++allocations;
  return __libc_realloc(p, size);
}
void* memalign(std::size_t alignment, std::size_t size) noexcept {
  ++allocations;
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  ++allocations;
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** p, std::size_t alignment, std::size_t size) noexcept {
  ++allocations;
  *p = __libc_memalign(alignment, size);
  return *p ? 0 : ENOMEM;
}

}  // extern "C"

#endif

#ifdef CALM_WITH_ONEDNN
/// In place of oneDNN's own, which it calls: what that allocates is not counted. For one thread.
extern "C" dnnl_status_t dnnl_primitive_execute(const_dnnl_primitive_t primitive, dnnl_stream_t stream, int count,
                                                const dnnl_exec_arg_t* arguments) {
  static auto* const execute =
      reinterpret_cast<decltype(&dnnl_primitive_execute)>(dlsym(RTLD_NEXT, "dnnl_primitive_execute"));
  const long before = allocations;
  const dnnl_status_t status = execute(primitive, stream, count, arguments);
  allocations = before;
  return status;
}
#endif

using namespace calm_test;

namespace {

using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, float>;
using Composed = calm::ComposedModel<Llama, Llama, Llama>;

/// Products of several tiles in every direction: more than 256 deep, more than 128 rows and columns, and ragged.
calm::ModelSpec large_spec() {
  return {.vocabulary = 151, .width = 144, .hidden = 300, .blocks = 2, .heads = {4, 2, 36}, .context = 600};
}
calm::ModelSpec small_spec() {
  return {.vocabulary = 151, .width = 40, .hidden = 70, .blocks = 2, .heads = {2, 2, 20}, .context = 600};
}

Composed make_model(const calm::BridgeOptions& options, bool uneven) {
  std::vector<std::shared_ptr<const calm::Aligner>> aligners;
  if (uneven) aligners.assign(2, std::make_shared<UnevenAligner>(151));
  // bf16 weights are packed at the first step.
  const auto model_of = [](const calm::ModelSpec& spec, std::uint64_t seed) {
    return std::make_shared<const Llama>(spec, TestWeights{seed, calm::DType::bf16});
  };
  Composed model(model_of(large_spec(), 1), {model_of(large_spec(), 2), model_of(small_spec(), 3)},
                 {{0, 0, 0}, {0, 1, 1}, {1, 1, 1}}, options, aligners);
  randomise(model, 5);
  return model;
}

/// Threads, and what computes the products: f32 or bf16.
using Settings = std::pair<int, calm::MakeProducts>;
const std::vector<Settings> all_settings = {
    {1, calm::own_products},    {2, calm::own_products}, {1, calm::bf16_products}, {2, calm::bf16_products},
#ifdef CALM_WITH_ONEDNN
    {1, calm::onednn_products},
#endif
};

std::vector<double> kept;  // what a compiler cannot know to be unused

long allocations_of(auto&& call) {
  const long before = allocations;
  call();
  return allocations - before;
}

}  // namespace

TEST_CASE("the counter counts what malloc, operator new and Eigen ask for" * doctest::skip(!counts)) {
  CHECK(allocations_of([] {
          void* volatile p = std::malloc(1000);
          std::free(p);
        }) > 0);
  CHECK(allocations_of([] { std::vector<double>(1000).swap(kept); }) > 0);
  CHECK(allocations_of([] { Matrix<float>(10, 10); }) > 0);
  // A product whose packed operands do not fit on the stack.
  const Eigen::MatrixXf a = Eigen::MatrixXf::Ones(600, 600);
  Eigen::MatrixXf b(600, 600);
  CHECK(allocations_of([&] { b.noalias() = a * a; }) > 0);
  CHECK(allocations_of([] {}) == 0);
}

TEST_CASE("a training step of a composed model allocates nothing after the first" * doctest::skip(!counts)) {
  for (const calm::BridgeOptions& options :
       {calm::BridgeOptions{}, {.gate = calm::Gate::tanh, .rotary = true, .rank = 7}}) {
    for (const Settings& settings : all_settings) {
      const int threads = settings.first;
      const calm::MakeProducts products = settings.second;
      for (const bool uneven : {false, true}) {
        CAPTURE(threads);
        CAPTURE(products == calm::bf16_products);
        CAPTURE(uneven);
        Composed model = make_model(options, uneven);
        Cpu ctx(threads, products);
        calm::Gradients<float> grads(model);
        std::vector<float> values(grads.values().size()), first(values), second(values);
        const Batch batch = random_batch({{200, 150}, {1, 0}, {90, 10}}, 151, 4);
        const calm::TokenBatch tokens = batch.view();
        const auto targets = random_tokens(tokens.tokens(), 151, 6);
        Composed::States states;
        Composed::Tape tape;
        Composed::HeadCache head;
        const auto pass = [&] {
          ctx.arena.reset();
          grads.set_zero();
          model.prepare(ctx, tokens, states);
          const auto x = model.forward(ctx, tokens, states, &tape);
          const auto logits = ctx.arena.matrix<float>(x.rows, 151), dx = ctx.arena.matrix<float>(x.rows, x.cols);
          const auto losses = ctx.arena.vector<float>(x.rows);
          model.head(ctx, MatrixView<const float>(x), logits, head);
          ctx.backend.cross_entropy(MatrixView<const float>(logits), std::span<const TokenId>(targets), 1e-2, losses,
                                    logits);
          model.head_backward(ctx, MatrixView<const float>(x), MatrixView<const float>(logits), dx, head);
          model.backward(ctx, tokens, states, tape, dx, grads);
          double squares = 0;
          ctx.backend.sum_of_squares(std::span<const float>(grads.values()), &squares);
          ctx.backend.adamw(std::span<float>(values), std::span<const float>(grads.values()), std::span<float>(first),
                            std::span<float>(second), calm::AdamWStep{}, &squares);
        };
        CHECK(allocations_of(pass) > 0);
        pass();  // the arena joins its pieces at the second reset
        for (int i = 0; i < 3; ++i) CHECK(allocations_of(pass) == 0);
      }
    }
  }
}

TEST_CASE("a step of Muon allocates nothing after the first" * doctest::skip(!counts)) {
  for (const Settings& settings : all_settings) {
    CAPTURE(settings.first);
    CAPTURE(settings.second != nullptr);
    calm::Transformer<calm::zoo::Llama, calm::Trainable, float> model(small_spec(), TestWeights{1, calm::DType::f32});
    Cpu ctx(settings.first, settings.second);
    calm::Gradients<float> grads(model);
    std::fill(grads.values().begin(), grads.values().end(), 0.5F);
    calm::Muon<float> muon(static_cast<Index>(grads.values().size()), {});
    Index step = 0;
    const auto update = [&] { muon.update(ctx, grads, 1.0, 1e-3, ++step); };
    CHECK(allocations_of(update) > 0);
    update();
    for (int i = 0; i < 3; ++i) CHECK(allocations_of(update) == 0);
  }
}

TEST_CASE("decoding allocates nothing after the first step" * doctest::skip(!counts)) {
  for (const Settings& settings : all_settings) {
    const int threads = settings.first;
    const calm::MakeProducts products = settings.second;
    for (const bool uneven : {false, true}) {
      CAPTURE(threads);
      CAPTURE(products == calm::bf16_products);
      CAPTURE(uneven);
      const Composed model = make_model({.rotary = true}, uneven);
      Cpu ctx(threads, products);
      auto session = model.make_session(ctx, 3, 300);
      const Batch prompt = random_batch({{150, 150}, {1, 1}, {40, 40}}, 151, 4);
      Batch next;
      for (const TokenId id : {5, 6, 8}) next.add({id});
      const auto advance = [&](const Batch& batch) {
        ctx.arena.reset();
        calm::next_logits(ctx, model, session, batch.cached());
      };
      const auto begin = [&] {
        for (const Index slot : {0, 1, 2}) session.clear(slot);
        advance(prompt);
      };
      begin();
      advance(next);
      for (int i = 0; i < 20; ++i) CHECK(allocations_of([&] { advance(next); }) == 0);
      CHECK(allocations_of(begin) == 0);
    }
  }
}

TEST_CASE("a pass over a smaller batch allocates nothing" * doctest::skip(!counts)) {
  const Composed model = make_model({}, true);
  Cpu ctx(2, calm::own_products);
  Composed::States states;
  const Batch large = random_batch({{200, 150}, {90, 10}}, 151, 4), small = random_batch({{100, 9}, {33, 10}}, 151, 5);
  const auto pass = [&](const Batch& batch) {
    ctx.arena.reset();
    model.prepare(ctx, batch.view(), states);
    model.forward(ctx, batch.view(), states, nullptr);
  };
  pass(large), pass(large);
  CHECK(allocations_of([&] { pass(small); }) == 0);
}

TEST_CASE("a step in shares allocates nothing after the first" * doctest::skip(!counts)) {
  std::vector<calm::Example> examples;
  for (std::uint64_t i = 0; i < 12; ++i)
    examples.push_back({random_tokens(20, 151, i), random_tokens(130, 151, 100 + i)});
  const calm::PackedBatch batch(examples);
  REQUIRE(batch.pieces().size() > 4);
  const std::vector<calm::TrainingBatch<Composed>> batches = {{&batch, nullptr}};
  for (const int threads : {1, 2, 3}) {
    CAPTURE(threads);
    Composed model = make_model({}, false);
    Cpu ctx(threads, calm::own_products);
    calm::Trainer trainer(ctx, model, calm::CosineSchedule{.peak = 1e-3, .warmup = 0, .steps = 9});
    for (int i = 0; i < 2; ++i) trainer.step(std::span(batches));  // the second joins the pieces of the arenas
    CHECK(allocations_of([&] { trainer.step(std::span(batches)); }) == 0);
  }
}
