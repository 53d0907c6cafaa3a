// Writes the seeds of the fuzz targets: make_corpus FOLDER
#include "support/gguf_builder.hpp"

#include "adapter.hpp"
#include "fuzz.hpp"

#include <calm/io/config_json.hpp>

namespace {

std::string slurp(const std::filesystem::path& path) { return std::string(calm::FileMap::open(path)->text()); }

std::string gguf(calm::DType dtype) {
  GgufBuilder builder;
  builder.set_string("general.architecture", "llama");
  builder.set_integer("general.alignment", 8);
  builder.alignment = 8;
  builder.set_number("a", calm::GgufType::f32, 0.5F);
  builder.set_number("b", calm::GgufType::boolean, std::uint8_t{1});
  builder.set_strings("c", {"<s>", ""});
  builder.set_numbers<std::int64_t>("d", calm::GgufType::i64, {3, -1});
  const calm::Index values = calm::block_of(dtype).values;
  const std::vector<std::byte> zeros(static_cast<std::size_t>(calm::bytes_of(dtype, values)));
  builder.add_matrix("w", calm::StoredMatrix(nullptr, zeros.data(), dtype, 1, values));
  builder.add_tensor("v", {1}, 0, std::string(4, '\1'));
  return builder.bytes();
}

std::string safetensors(calm::DType dtype) {
  calm::Matrix<float> values(2, 3);
  values(1, 2) = 1;
  calm::SafetensorsWriter writer;
  writer.add("w", values, dtype);
  writer.add<float>("none", {0, 4}, {});
  writer.set_metadata("format", "pt");
  std::string bytes;
  struct Sink {
    std::string& target;
    void write(const std::byte* data, calm::Index count) {
      target.append(reinterpret_cast<const char*>(data), static_cast<std::size_t>(count));
    }
  } sink{bytes};
  writer.write_to(sink);
  return bytes;
}

std::string adapter(const calm::BridgeOptions& options) {
  const fuzz::Folder folder;
  auto model = calm::compose(fuzz::anchor(), calm::Links{{0, 0, 1}}, options, fuzz::augment());
  calm::save_adapter(model, folder.path());
  return slurp(folder.path() / "adapter_config.json") + '\0' + slurp(folder.path() / "adapter_model.safetensors");
}

/// Byte-level BPE with an added token, a template and a normaliser.
constexpr const char* byte_level = R"({"added_tokens":[{"id":4,"content":"<s>","special":true,"lstrip":true}],
"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[
{"type":"Digits","individual_digits":true},
{"type":"Split","pattern":{"Regex":"\\s+|\\w+"},"behavior":"Isolated","invert":false},
{"type":"ByteLevel","add_prefix_space":false,"use_regex":true}]},
"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},
{"Sequence":{"id":"A","type_id":0}}],"special_tokens":{"<s>":{"id":"<s>","ids":[4],"tokens":["<s>"]}}},
"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","ignore_merges":false,
"vocab":{"l":0,"o":1,"lo":2,"\u0120":3,"\u0120lo":5},"merges":["l o",["\u0120","lo"]]}})";

/// Pieces with bytes for what is unknown, as Llama 2 and Gemma have them.
constexpr const char* pieces = R"({"added_tokens":[{"id":0,"content":"<unk>","special":true}],
"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"\u2581"},
{"type":"Replace","pattern":{"String":" "},"content":"\u2581"}]},
"pre_tokenizer":{"type":"Metaspace","replacement":"\u2581","prepend_scheme":"first","split":true},
"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"\u2581"},"content":" "},
{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
"model":{"type":"BPE","unk_token":"<unk>","fuse_unk":true,"byte_fallback":true,
"vocab":{"<unk>":0,"<0xC3>":1,"a":2,"b":3,"ab":4},"merges":["a b"]}})";

/// `file` with `by` in place of `part`.
std::string replaced(std::string file, std::string_view part, const std::string& by) {
  return file.replace(file.find(part), part.size(), by);
}

/// 40 equal steps, which together would make 2^40 bytes of one.
std::string forty(const std::string& step) {
  std::string steps = step;
  for (int i = 1; i < 40; ++i) steps += ',' + step;
  return steps;
}

std::string vocabulary(const char* model) {
  GgufBuilder builder;
  const bool is_pieces = std::string_view(model) == "llama";
  builder.set_string("tokenizer.ggml.model", model);
  builder.set_strings("tokenizer.ggml.tokens", {"<unk>", is_pieces ? "<0xC3>" : "l", "o", is_pieces ? "oo" : "lo"});
  builder.set_numbers<std::int32_t>("tokenizer.ggml.token_type", calm::GgufType::i32, {3, is_pieces ? 6 : 1, 1, 1});
  builder.set_integer("tokenizer.ggml.bos_token_id", 0);
  if (is_pieces) {
    builder.set_numbers<float>("tokenizer.ggml.scores", calm::GgufType::f32, {0, 0, -2, -1});
  } else {
    builder.set_string("tokenizer.ggml.pre", "smollm");
    builder.set_strings("tokenizer.ggml.merges", {"l o"});
  }
  return builder.bytes();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const std::filesystem::path out = argv[1];
  const auto write = [&](const char* target, const std::string& name, const std::string& bytes) {
    std::filesystem::create_directories(out / target);
    std::ofstream(out / target / name, std::ios::binary) << bytes;
  };
  for (const calm::DType dtype : calm::all_dtypes) {
    const std::string name(calm::name_of(dtype));
    if (dtype == calm::DType::q4_0 || dtype == calm::DType::q5_1 || dtype == calm::DType::q6_k ||
        dtype == calm::DType::f16)
      write("gguf", name, gguf(dtype));
    if (calm::block_of(dtype).values == 1) write("safetensors", name, safetensors(dtype));
  }
  write("json", "config", calm::config_json(fuzz::anchor()->spec(), "llama", "LlamaForCausalLM", calm::DType::f32));
  write("json", "values", R"({"a":[1,-2,3.5e6,true,false,null,"\u00e9\n\""],"b":{"c":{}}})");
  write("json", "rope", R"({"model_type":"llama","rope_scaling":{"rope_type":"default","rope_theta":1e4}})");
  write("tokenizer", "byte_level", byte_level);
  write("tokenizer", "pieces", pieces);
  const std::string doubled = forty(R"({"type":"Replace","pattern":{"Regex":"."},"content":"ll"})");
  const std::string normalizer =
      replaced(byte_level, R"({"type":"NFC"})", R"({"type":"Sequence","normalizers":[)" + doubled + "]}");
  write("tokenizer", "growing_normalizer", normalizer);
  write("tokenizer", "growing_added_token",
        replaced(normalizer, R"("special":true)", R"("special":true,"normalized":true)"));
  write("tokenizer", "growing_pre_tokenizer",
        replaced(byte_level, R"({"type":"Digits","individual_digits":true})",
                 forty(R"({"type":"Metaspace","replacement":"  ","prepend_scheme":"never","split":false})")));
  write("tokenizer", "growing_decoder",
        replaced(pieces, R"({"type":"Replace","pattern":{"String":"\u2581"},"content":" "},
{"type":"ByteFallback"})",
                 doubled + R"(,{"type":"ByteFallback"})"));
  write("tokenizer", "gguf_gpt2", vocabulary("gpt2"));
  write("tokenizer", "gguf_llama", vocabulary("llama"));
  write("adapter", "default", adapter({}));
  write("adapter", "low_rank", adapter({.rank = 2}));
  return 0;
}
