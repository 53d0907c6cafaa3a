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
  write("adapter", "default", adapter({}));
  write("adapter", "low_rank", adapter({.rank = 2}));
  return 0;
}
