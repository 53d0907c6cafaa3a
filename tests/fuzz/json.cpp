// JSON of others, and the configuration of a model that is read from it.
#include <calm/io/config_json.hpp>
#include <calm/io/json.hpp>
#include <calm/model/zoo/llama.hpp>

#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const fuzz::Folder folder;
  try {
    const std::string_view text = fuzz::text_of(data, size);
    const calm::Json document = calm::parse_json(text, "f.json");
    if (!document.is_object()) return 0;
    const calm::ModelSpec spec =
        calm::read_config_json(folder.write("config.json", text), calm::zoo::Llama::model_type);
    fuzz::use(static_cast<double>(spec.width));
  } catch (const calm::FormatError&) {
  } catch (const calm::ConfigError&) {  // sizes that do not fit together
  }
  return 0;
}
