#include <calm/io/safetensors.hpp>

#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const calm::SafetensorsFile file(calm::FileMap::of_bytes("f.safetensors", fuzz::text_of(data, size)));
    for (const auto& tensor : file.tensors()) {
      if (!calm::dtype_of_safetensors_name(tensor.dtype) || tensor.shape.size() > 2) continue;
      const calm::StoredMatrix stored = file.matrix(tensor.name);
      if (stored.empty()) continue;  // a matrix of no values may have any number of rows
      const calm::Matrix<double> values = stored.dense<double>();
      for (const double x : values.values()) fuzz::use(x);
    }
  } catch (const calm::FormatError&) {
  }
  return 0;
}
