#include <calm/io/gguf_model.hpp>
#include <calm/model/transformer.hpp>
#include <calm/model/zoo/llama.hpp>

#include <doctest/doctest.h>
#include <support/gguf_builder.hpp>

#include <limits>

namespace io_gguf_model_test {
using namespace calm;

namespace {

constexpr std::uint32_t f32 = 0;

/// What read_gguf_config reads of a model of this architecture with 6 blocks and heads of 8 values.
GgufBuilder model_of(const std::string& name) {
  GgufBuilder file;
  file.set_string("general.architecture", name);
  file.set_integer(name + ".embedding_length", 32);
  file.set_integer(name + ".feed_forward_length", 48);
  file.set_integer(name + ".block_count", 6);
  file.set_integer(name + ".context_length", 64);
  file.set_integer(name + ".attention.head_count", 4);
  return file;
}

void add_table(GgufBuilder& file) { file.add_tensor("token_embd.weight", {32, 2}, f32, std::string(32 * 2 * 4, '\0')); }

ModelConfig config_of(const GgufBuilder& file) {
  return read_gguf_config(GgufFile(FileMap::of_bytes("model.gguf", file.bytes())));
}

}  // namespace

TEST_CASE("the pattern of Gemma 3's windows is the file's, or every sixth block sees all") {
  GgufBuilder plain = model_of("gemma3");
  plain.set_integer("gemma3.attention.sliding_window", 16);
  GgufBuilder other = plain;
  other.set_integer("gemma3.attention.sliding_window_pattern", 2);
  add_table(plain);
  add_table(other);
  CHECK(config_of(plain).spec.windowed == decltype(ModelSpec::windowed){true, true, true, true, true, false});
  CHECK(config_of(other).spec.windowed == decltype(ModelSpec::windowed){true, false, true, false, true, false});
}

TEST_CASE("an embedding table without dimensions is refused") {
  GgufBuilder file = model_of("llama");
  file.add_tensor("token_embd.weight", {}, f32, std::string(4, '\0'));
  CHECK_THROWS_AS(config_of(file), Error);
}

TEST_CASE("a head that is too wide is refused, in an architecture that stores its width or not") {
  for (const std::string name : {"llama", "gpt2"}) {
    CAPTURE(name);
    GgufBuilder file;
    file.set_string("general.architecture", name);
    file.set_integer(name + ".embedding_length", 1U << 30);
    file.set_integer(name + ".feed_forward_length", 48);
    file.set_integer(name + ".block_count", 6);
    file.set_integer(name + ".context_length", 64);
    file.set_integer(name + ".attention.head_count", 1);
    add_table(file);
    CHECK_THROWS_AS(config_of(file), FormatError);
  }
}

TEST_CASE("rotary divisors of a wrong number are refused with both numbers") {
  GgufBuilder file = model_of("llama");
  add_table(file);
  const std::vector<float> values(3, 1.0F);
  file.add_tensor("rope_freqs.weight", {3}, f32, {reinterpret_cast<const char*>(values.data()), 12});
  CHECK_THROWS_WITH_AS(config_of(file), "model.gguf: tensor \"rope_freqs.weight\" holds 3 values; expected 4",
                       FormatError);
}

TEST_CASE("rotary positions are scaled as llama.cpp does: linearly unless the file says \"none\", by either factor") {
  const auto scaling = [](const auto& set) {
    GgufBuilder file = model_of("llama");
    set(file);
    add_table(file);
    return config_of(file).spec.rotary_scaling;
  };
  using enum RotaryScaling::Kind;
  const auto factor = [](GgufBuilder& file) { file.set_number("llama.rope.scaling.factor", GgufType::f32, 4.0F); };
  CHECK(scaling([](auto&) {}).kind == none);
  CHECK(scaling(factor).kind == linear);
  CHECK(scaling(factor).factor == 4);
  CHECK(scaling([](auto& file) { file.set_number("llama.rope.scale_linear", GgufType::f32, 2.0F); }).factor == 2);
  CHECK(scaling([&](auto& file) {
          factor(file);
          file.set_string("llama.rope.scaling.type", "none");
        }).kind == none);
  CHECK(scaling([](auto& file) { file.set_number("llama.rope.scaling.factor", GgufType::f32, 1.0F); }).kind == none);
  CHECK_THROWS_WITH_AS(scaling([](auto& file) { file.set_number("llama.rope.scaling.factor", GgufType::f32, 0.5F); }),
                       "model.gguf: rope.scaling.factor: expected at least 1, found 0.5", FormatError);
  CHECK_THROWS_AS(scaling([](auto& file) { file.set_string("llama.rope.scaling.type", "yarn"); }), FormatError);
}

TEST_CASE("a head of which the parts that turn are no pairs is refused, and the file named") {
  GgufBuilder file = model_of("llama");
  file.set_integer("llama.rope.dimension_count", 7);
  add_table(file);
  CHECK_THROWS_WITH_AS(config_of(file), "model.gguf: 7 values of each head cannot turn in pairs", FormatError);
}

TEST_CASE("an epsilon or a rotary base that is no number to compute with is refused, and the file named") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const auto refused = [](const std::string& key, float value) {
    GgufBuilder file = model_of("llama");
    file.set_number(key, GgufType::f32, value);
    add_table(file);
    try {
      config_of(file);
      return false;
    } catch (const Error& error) {
      return std::string_view(error.what()).find("model.gguf") != std::string_view::npos;
    }
  };
  const std::string epsilon = "llama.attention.layer_norm_rms_epsilon", base = "llama.rope.freq_base";
  for (const float value : {nan, infinity, -1e-5F}) CHECK(refused(epsilon, value));
  for (const float value : {nan, infinity, -1.0F, 0.0F}) CHECK(refused(base, value));
  CHECK(!refused(epsilon, 1e-6F));
  CHECK(!refused(base, 5e5F));
}

TEST_CASE("a tensor that belongs to no weight is refused by name, for it would be left out of the model") {
  GgufBuilder file = model_of("llama");
  add_table(file);
  const auto add = [](GgufBuilder& to, const std::string& name, const std::vector<std::uint64_t>& dimensions) {
    std::uint64_t count = 4;
    for (const std::uint64_t n : dimensions) count *= n;
    to.add_tensor(name, dimensions, f32, std::string(count, '\0'));
  };
  add(file, "output_norm.weight", {32});
  for (int i = 0; i < 6; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    for (const std::string name : {"attn_norm", "ffn_norm"}) add(file, block + name + ".weight", {32});
    for (const std::string name : {"attn_q", "attn_k", "attn_v", "attn_output"})
      add(file, block + name + ".weight", {32, 32});
    for (const std::string name : {"ffn_gate", "ffn_up"}) add(file, block + name + ".weight", {32, 48});
    add(file, block + "ffn_down.weight", {48, 32});
  }
  const auto open = [](const GgufBuilder& builder) {
    const GgufFile gguf(FileMap::of_bytes("model.gguf", builder.bytes()));
    const ModelSpec spec = read_gguf_config(gguf).spec;
    GgufWeights<zoo::Llama> weights(gguf, spec);
    const Transformer<zoo::Llama> model(spec, weights);
    weights.check_all_used();
  };
  open(file);
  GgufBuilder biased = file;
  add(biased, "blk.0.attn_q.bias", {32});
  CHECK_THROWS_WITH_AS(open(biased),
                       "model.gguf: tensor \"blk.0.attn_q.bias\" belongs to no weight of a model of type llama",
                       FormatError);
}

}  // namespace io_gguf_model_test
