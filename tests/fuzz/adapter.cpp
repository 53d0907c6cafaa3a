// adapter_config.json, a byte 0 (which no JSON has), adapter_model.safetensors.
#include "adapter.hpp"
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const fuzz::Folder folder;
  static const auto anchor = fuzz::anchor(), augment = fuzz::augment();
  const std::string_view text = fuzz::text_of(data, size);
  const std::size_t end = std::min(text.find('\0'), text.size());
  folder.write("adapter_config.json", text.substr(0, end));
  folder.write("adapter_model.safetensors", text.substr(std::min(end + 1, text.size())));
  try {
    const auto model = calm::load_adapter(folder.path(), anchor, augment);
    calm::for_each_parameter(model, [](const std::string&, const auto& parameter) {
      for (const float x : parameter.value.values()) fuzz::use(static_cast<double>(x));
    });
  } catch (const calm::FormatError&) {
  } catch (const calm::ConfigError&) {  // links and options that do not fit the models
  }
  return 0;
}
