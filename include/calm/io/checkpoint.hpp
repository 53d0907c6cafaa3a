// Checkpoint: the tensors of a Hugging Face folder, in model.safetensors or in the files that
// model.safetensors.index.json names.
#pragma once

#include <calm/io/folder.hpp>
#include <calm/io/safetensors.hpp>

namespace calm::inline CALM_ABI {

class Checkpoint {
 public:
  explicit Checkpoint(const std::filesystem::path& folder) : path_(folder.string()) {
    const auto index = folder / "model.safetensors.index.json";
    if (!is_there(folder / "model.safetensors") && is_there(index)) {
      open_index(folder, index);
    } else {
      require<IoError>(is_there(folder / "model.safetensors"), path_,
                       ": holds neither model.safetensors nor model.safetensors.index.json; expected the folder of a "
                       "model as transformers' save_pretrained writes it (which also turns a pytorch_model.bin into "
                       "safetensors), or a .gguf file");
      files_.push_back(std::make_shared<const SafetensorsFile>(folder / "model.safetensors"));
      for (const SafetensorsEntry& entry : files_[0]->tensors()) file_of_.emplace(entry.name, files_[0].get());
    }
  }

  const std::string& path() const { return path_; }
  std::size_t size() const { return file_of_.size(); }
  bool contains(const std::string& name) const { return file_of_.contains(name); }

  StoredMatrix matrix(const std::string& name) const {
    const auto found = file_of_.find(name);
    require<FormatError>(found != file_of_.end(), path_, ": has no tensor ", in_quotes(name), " among its ",
                         file_of_.size());
    return found->second->matrix(name);
  }

  /// Every tensor by name.
  template <class Fn>
  void for_each_name(Fn&& fn) const {
    for (const auto& [name, file] : file_of_) fn(name);
  }

 private:
  void open_index(const std::filesystem::path& folder, const std::filesystem::path& index) {
    const std::string where = index.string();
    const Json json = read_json(index);
    std::map<std::string, const SafetensorsFile*> opened;
    for (const auto& [tensor, file] : get_object(json, "weight_map", where).items()) {
      require<FormatError>(file.is_string(), where, ": \"weight_map\": ", in_quotes(tensor),
                           ": expected the name of a file, found ", kind_of(file));
      const auto name = file.get<std::string>();
      // Messages show the name of a file as it is: it must have no byte 0, and nothing that a terminal would obey.
      const bool is_name = !name.empty() && name != ".." && name.find_first_of("/\\") == std::string::npos &&
                           printable(name, name.size()) == name;
      require<FormatError>(is_name, where, ": \"weight_map\": ", in_quotes(name),
                           " is no name of a file in this folder");
      auto& shard = opened[name];
      if (!shard) {
        files_.push_back(std::make_shared<const SafetensorsFile>(folder / name));
        shard = files_.back().get();
      }
      require<FormatError>(shard->contains(tensor), where, ": \"weight_map\" says that ", in_quotes(name), " holds ",
                           in_quotes(tensor), ", which it does not");
      file_of_.emplace(tensor, shard);
    }
    // What the index leaves out is there nevertheless: it is read, or refused by whoever asks for all names.
    for (const auto& file : files_)
      for (const SafetensorsEntry& entry : file->tensors()) {
        const SafetensorsFile* first = file_of_.emplace(entry.name, file.get()).first->second;
        require<FormatError>(first == file.get(), file->path(), ": holds the tensor ", in_quotes(entry.name),
                             ", as does ", first->path());
      }
  }

  std::string path_;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::map<std::string, const SafetensorsFile*> file_of_;
};

}  // namespace calm::inline CALM_ABI
