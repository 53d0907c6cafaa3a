#include <calm/io/gguf.hpp>

#include "fuzz.hpp"

namespace {

/// Getters of another kind refuse the value.
template <class Function>
void attempt(const Function& function) {
  try {
    function();
  } catch (const calm::FormatError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const calm::GgufFile file(calm::FileMap::of_bytes("m.gguf", fuzz::text_of(data, size)));
    const calm::GgufMetadata& metadata = file.metadata();
    for (const auto& entry : metadata.entries()) {
      attempt([&] { fuzz::use(static_cast<double>(metadata.get_integer(entry.key))); });
      attempt([&] { fuzz::use(metadata.get_number(entry.key)); });
      attempt([&] { fuzz::use(metadata.get_boolean(entry.key)); });
      attempt([&] {
        for (const char c : metadata.get_string(entry.key)) fuzz::use(c);
      });
      attempt([&] {
        for (const calm::Index x : metadata.get_integers(entry.key)) fuzz::use(static_cast<double>(x));
      });
      attempt([&] {
        for (const double x : metadata.get_numbers(entry.key)) fuzz::use(x);
      });
      attempt([&] {
        for (const std::string_view text : metadata.get_strings(entry.key))
          for (const char c : text) fuzz::use(c);
      });
    }
    for (const calm::GgufEntry& tensor : file.tensors()) {
      attempt([&] {
        const calm::StoredMatrix stored = file.matrix(tensor.name);
        if (stored.empty()) return;  // a matrix of no values may have any number of rows
        const calm::Matrix<float> values = stored.dense<float>();
        for (const float x : values.values()) fuzz::use(static_cast<double>(x));
      });
    }
  } catch (const calm::FormatError&) {
  }
  return 0;
}
