// Pretrained models as people have them, a Hugging Face folder or a .gguf file: what a path holds, and the model itself
// as the type that it turns out to be.
//
//   calm::visit_model("SmolLM2", [](auto model) { use(*model); });      // std::shared_ptr<const Transformer<...>>
#pragma once

#include <calm/io/folder.hpp>
#include <calm/io/gguf_model.hpp>
#include <calm/io/hugging_face.hpp>
#include <calm/model/transformer.hpp>

#include <variant>

namespace calm::inline CALM_ABI {

/// An opened path: its files are mapped, its configuration read.
class Pretrained {
 public:
  /// A folder with config.json, or one .gguf file. Throws IoError or FormatError.
  explicit Pretrained(const std::filesystem::path& path) : path_(path), files_(open(path)) {
    config_ = std::visit(
        [&](const auto& files) {
          if constexpr (requires { files->metadata(); }) return read_gguf_config(*files);
          else return read_config_json(path / "config.json");
        },
        files_);
  }

  const std::filesystem::path& path() const { return path_; }
  const std::string& model_type() const { return config_.model_type; }
  const ModelSpec& spec() const { return config_.spec; }
  /// The file, where the path is a .gguf.
  const GgufFile* gguf() const {
    const auto* file = std::get_if<std::shared_ptr<const GgufFile>>(&files_);
    return file ? file->get() : nullptr;
  }

  /// The model, whose architecture the caller knows. Its weights stay mapped.
  template <class Model>
  std::shared_ptr<const Model> open_as() const {
    using Architecture = typename Model::Architecture;
    require<FormatError>(Architecture::model_type == config_.model_type, path_.string(), ": the model is of type ",
                         in_quotes(config_.model_type), ", expected \"", Architecture::model_type, "\"");
    return std::visit(
        [&](const auto& files) -> std::shared_ptr<const Model> {
          const auto make = [&](auto source) {
            auto model = std::make_shared<const Model>(config_.spec, source);
            source.check_all_used();
            return model;
          };
          if constexpr (requires { files->metadata(); }) return make(GgufWeights<Architecture>(*files, config_.spec));
          else return make(HuggingFaceWeights<Architecture>(*files, config_.spec));
        },
        files_);
  }

  /// visitor(std::shared_ptr<const Transformer<Architecture>>) for the architecture that the path holds.
  template <class Visitor>
  auto visit(Visitor&& visitor) const {
    return zoo::All::visit(config_.model_type,
                           [&](auto architecture) { return visitor(open_as<Transformer<decltype(architecture)>>()); });
  }

 private:
  using Files = std::variant<std::shared_ptr<const Checkpoint>, std::shared_ptr<const GgufFile>>;

  static Files open(const std::filesystem::path& path) {
    require<IoError>(is_there(path), path.string(), ": there is no such folder or file");
    if (is_folder(path)) return std::make_shared<const Checkpoint>(path);
    return std::make_shared<const GgufFile>(path);
  }

  std::filesystem::path path_;
  Files files_;
  ModelConfig config_;
};

/// Opens a path and calls visitor with its model.
template <class Visitor>
auto visit_model(const std::filesystem::path& path, Visitor&& visitor) {
  return Pretrained(path).visit(visitor);
}

}  // namespace calm::inline CALM_ABI
