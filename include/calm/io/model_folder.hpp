// A whole model as a Hugging Face folder: config.json and model.safetensors, which transformers opens too.
#pragma once

#include <calm/compose/alignment.hpp>
#include <calm/io/config_json.hpp>
#include <calm/io/content_hash.hpp>
#include <calm/io/folder.hpp>
#include <calm/io/hugging_face.hpp>
#include <calm/io/safetensors.hpp>
#include <calm/nn/parameter.hpp>

namespace calm::inline CALM_ABI {

/// Writes every weight of a Llama, trainable or frozen, rounded to `dtype`.
template <class Model>
void save_model(const Model& model, const std::filesystem::path& folder, DType dtype = DType::f32) {
  using Architecture = typename Model::Architecture;
  static_assert(Architecture::model_type == "llama", "only models of the type llama are written");
  static_assert(!std::is_same_v<typename Model::Weights, Lora>,
                "the additions of LoRA have no place in a folder of plain weights: save_parameters() writes them");
  SafetensorsWriter writer;
  for_each_weight(model, [&](const std::string& name, const auto& weight) {
    const auto shape = [&](Index rows, Index cols) {
      const bool vector = name.find("norm") != std::string::npos || name.ends_with(".bias");
      return vector ? std::vector<Index>{cols} : std::vector<Index>{rows, cols};
    };
    if constexpr (requires { weight.offset; }) {
      writer.add(name, shape(weight.value.rows(), weight.value.cols()), weight.value.values(), dtype);
    } else {
      const StoredMatrix stored =
          weight.dtype() == dtype ? weight : StoredMatrix::from(weight.template dense<double>(), dtype);
      writer.add(name, shape(weight.rows(), weight.cols()), stored);
    }
  });
  writer.set_metadata("format", "pt");  // transformers asks for it
  make_folder(folder);
  AtomicFile<> config_file(folder / "config.json"), weights_file(folder / "model.safetensors");
  config_file.write(config_json(model.spec(), Architecture::model_type, Architecture::hugging_face_class, dtype));
  writer.write_to(weights_file);
  commit_together(config_file, weights_file);
}

/// Opens a folder as Model; the weights stay mapped. Throws FormatError where the folder holds another architecture,
/// lacks a weight, or has one that the model does not know.
template <class Model>
Model load_model(const std::filesystem::path& folder) {
  const ModelSpec spec = read_config_json(folder / "config.json", Model::Architecture::model_type);
  const Checkpoint files(folder);
  HuggingFaceWeights<typename Model::Architecture> source(files, spec);
  Model model(spec, source);
  source.check_all_used();
  return model;
}

/// What an adapter remembers of a base model.
struct BaseDescription {
  std::string architecture;
  std::string sizes;         // readable, compared as a whole
  std::string tokenizer;     // its content hash; empty: none is known
  std::string content_hash;  // XXH3-128 over the names, types and values of all weights

  friend bool operator==(const BaseDescription&, const BaseDescription&) = default;
};

/// XXH3-128 over all weights of a model, whatever file they came from.
template <class Model>
std::string hash_of_weights(const Model& model) {
  std::string all;
  for_each_weight(model, [&](const std::string& name, const auto& weight) {
    const auto add = [&](DType dtype, Index rows, Index cols, std::span<const std::byte> bytes) {
      all += message(name, ' ', name_of(dtype), ' ', rows, 'x', cols, ' ', content_hash(bytes), '\n');
    };
    if constexpr (requires { weight.offset; }) {
      using Scalar = std::remove_cvref_t<decltype(weight.value(0, 0))>;
      add(dtype_of<Scalar>, weight.value.rows(), weight.value.cols(), std::as_bytes(weight.value.values()));
    } else {
      add(weight.dtype(), weight.rows(), weight.cols(),
          {weight.data(), static_cast<std::size_t>(weight.stored_bytes())});
    }
  });
  return content_hash(all);
}

/// Describes a Transformer, or a composed model with all that it stands on.
template <class Model>
BaseDescription describe(const Model& model, const std::string& tokenizer = "") {
  if constexpr (requires { typename Model::Architecture; }) {
    const ModelSpec& s = model.spec();
    return {std::string(Model::Architecture::model_type),
            message("vocabulary ", s.vocabulary, ", width ", s.width, ", hidden ", s.hidden, ", blocks ", s.blocks,
                    ", heads ", s.heads.query_heads, "/", s.heads.kv_heads, "x", s.heads.width),
            tokenizer, hash_of_weights(model)};
  } else {
    BaseDescription result = describe(model.anchor(), tokenizer);
    std::string hashes = result.content_hash + hash_of_weights(model);
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      ((hashes += describe(model.template augment<I>()).content_hash), ...);
    }
    (std::make_index_sequence<Model::augment_count>{});
    result.architecture = "calm over " + result.architecture;
    const auto& options = model.options();
    for (const auto& link : model.links()) hashes += message(' ', link.augment, ':', link.tap, '>', link.write);
    for (const auto& aligner : model.aligners()) hashes += is_identity(*aligner) ? " as they are" : " aligned";
    hashes += message(" heads ", options.heads, ", norms ", options.norms, ", gate ", static_cast<int>(options.gate),
                      ", rotary ", options.rotary);
    result.sizes += message(", links ", model.links().size(), ", augments ", Model::augment_count);
    result.content_hash = content_hash(hashes);
    return result;
  }
}

}  // namespace calm::inline CALM_ABI
