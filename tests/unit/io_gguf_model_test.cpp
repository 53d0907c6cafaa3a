#include <calm/io/gguf_model.hpp>

#include <doctest/doctest.h>
#include <support/gguf_builder.hpp>

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
