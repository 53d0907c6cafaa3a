// Products with a frozen weight: CpuBackend's own beside oneDNN's on one thread, both with weights packed beforehand
// and activations as f32 rows, which bf16 products round at each call. Arguments: tokens, in, out; those of
// SmolLM2-135M and Gemma 3 270M. Run with OMP_NUM_THREADS=1, which is the threads of oneDNN.
#include <calm/backend/cpu.hpp>
#include <calm/backend/cpu_bf16.hpp>
#include <calm/core/random.hpp>

#include <benchmark/benchmark.h>
#include <dnnl.hpp>

namespace {

using calm::Index;
using Type = dnnl::memory::data_type;
using Tag = dnnl::memory::format_tag;

calm::Matrix<float> random_matrix(Index rows, Index cols, std::uint64_t stream) {
  calm::Matrix<float> m(rows, cols);
  calm::Random random(1, stream);
  for (float& x : m.values()) x = static_cast<float>(random.normal());
  return m;
}

void count_operations(benchmark::State& state) {
  const double each = 2.0 * static_cast<double>(state.range(0) * state.range(1) * state.range(2));
  state.counters["FLOP/s"] = {each * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate};
}

void calm_product(benchmark::State& state, calm::MakeProducts products) {
  calm::CpuBackend backend(1, products);
  const auto weight = calm::StoredMatrix::from(random_matrix(state.range(2), state.range(1), 1));
  const calm::Matrix<float> x = random_matrix(state.range(0), state.range(1), 2);
  calm::Matrix<float> y(state.range(0), state.range(2));
  backend.multiply(backend.packed<float>(weight), x.view(), y.view(), calm::Assign{});  // packs the weight
  for (auto _ : state) {
    backend.multiply(backend.packed<float>(weight), x.view(), y.view(), calm::Assign{});
    benchmark::ClobberMemory();
  }
  count_operations(state);
}

/// The weight in the form that oneDNN chooses, x rounded by its reorder where the product is in bf16.
void onednn_product(benchmark::State& state, Type type) {
  const Index tokens = state.range(0), in = state.range(1), out = state.range(2);
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const dnnl::memory::desc rows({tokens, in}, type, Tag::ab), result({tokens, out}, Type::f32, Tag::ab);
  const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(rows, {{in, out}, type, Tag::any}, result), engine);
  const dnnl::matmul product(description);
  calm::Matrix<float> weight = random_matrix(out, in, 1), x = random_matrix(tokens, in, 2), y(tokens, out);
  dnnl::memory plain_weight({{in, out}, Type::f32, Tag::ba}, engine, weight.data());
  dnnl::memory packed_weight(description.weights_desc(), engine),
      plain_x({{tokens, in}, Type::f32, Tag::ab}, engine, x.data());
  dnnl::memory x_of_type = type == Type::f32 ? plain_x : dnnl::memory(rows, engine), y_memory(result, engine, y.data());
  dnnl::reorder(plain_weight, packed_weight).execute(stream, plain_weight, packed_weight);
  const dnnl::reorder round(plain_x, x_of_type);
  for (auto _ : state) {
    if (type != Type::f32) round.execute(stream, plain_x, x_of_type);
    product.execute(stream, {{DNNL_ARG_SRC, x_of_type}, {DNNL_ARG_WEIGHTS, packed_weight}, {DNNL_ARG_DST, y_memory}});
    stream.wait();
  }
  count_operations(state);
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"tokens", "in", "out"});
  for (const std::pair<Index, Index>& map :
       {std::pair<Index, Index>{576, 576}, {576, 1536}, {1536, 576}, {640, 2048}, {2048, 640}, {576, 49152}})
    for (const Index tokens : {32, 128}) b->Args({tokens, map.first, map.second});
}
BENCHMARK_CAPTURE(calm_product, f32, nullptr)->Apply(sizes);
BENCHMARK_CAPTURE(onednn_product, f32, Type::f32)->Apply(sizes);
BENCHMARK_CAPTURE(calm_product, bf16, calm::bf16_products)->Apply(sizes);
BENCHMARK_CAPTURE(onednn_product, bf16, Type::bf16)->Apply(sizes);

}  // namespace

BENCHMARK_MAIN();
