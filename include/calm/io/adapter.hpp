// Adapters: the trained bridges of a composition as a folder, adapter_model.safetensors and adapter_config.json.
//
// The configuration names the options, the links, and for each base its architecture, sizes, tokenizer and content
// hash. An adapter for other bases is refused.
#pragma once

#include <calm/compose/composed_model.hpp>
#include <calm/io/model_folder.hpp>

namespace calm::inline CALM_ABI {

struct AdapterConfig {
  BridgeOptions options;
  std::vector<Link> links;
  std::vector<BaseDescription> bases;  // the anchor first, then the augments
  std::string alignment = {};          // "identity", "bytes", or empty where nobody said
};

/// The anchor and the augments of a composed model, in this order.
template <class Anchor, class... Augments>
std::vector<BaseDescription> describe_bases(const Anchor& anchor, const Augments&... augments) {
  return {describe(anchor), describe(augments)...};
}

namespace adapter {

inline constexpr Index format_version = 1;

inline std::string to_json(const AdapterConfig& config) {
  nlohmann::ordered_json links = nlohmann::ordered_json::array(), bases = nlohmann::ordered_json::array();
  for (const Link& link : config.links)
    links.push_back({{"augment", link.augment}, {"tap", link.tap}, {"write", link.write}});
  for (const BaseDescription& base : config.bases) {
    const nlohmann::ordered_json tokenizer =
        base.tokenizer.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(base.tokenizer);
    bases.push_back({{"role", bases.empty() ? "anchor" : "augment"},
                     {"architecture", base.architecture},
                     {"sizes", base.sizes},
                     {"tokenizer", tokenizer},
                     {"content_hash", base.content_hash}});
  }
  nlohmann::ordered_json document = {
      {"peft_type", "CALM"},
      {"format_version", format_version},
      {"options",
       {{"heads", config.options.heads},
        {"norms", config.options.norms},
        {"gate", config.options.gate == Gate::tanh ? "tanh" : "one"},
        {"rotary", config.options.rotary},
        {"rank", config.options.rank}}},
      {"links", links},
      {"bases", bases},
  };
  if (!config.alignment.empty()) document["alignment"] = config.alignment;
  return document.dump(2) + "\n";
}

/// Ties the weights to the configuration that says what they mean, since a kill may come between the two files.
inline std::string mark_of(const AdapterConfig& config) { return content_hash(to_json(config)); }

/// The weights of a model; `mark`: of the configuration that they belong to, empty where there is none.
template <class Composed>
SafetensorsWriter writer_of(const Composed& model, const std::filesystem::path& folder, const std::string& mark) {
  const std::string bad = find_not_finite(model);
  require<NumericError>(bad.empty(), folder.string(), ": not saved: ", bad);
  SafetensorsWriter writer;
  for_each_parameter(model, [&](const std::string& name, const auto& parameter) {
    writer.add(name, parameter.shape(), parameter.value.values(), DType::f32);
  });
  writer.set_metadata("format", "pt");
  if (!mark.empty()) writer.set_metadata("adapter_config", mark);
  return writer;
}

/// `other_weights`: models whose weights were stored in another type, so that their hash differs, are taken.
inline void check_bases(const std::string& where, const std::vector<BaseDescription>& stored,
                        const std::vector<BaseDescription>& given, bool other_weights = false) {
  require<FormatError>(stored.size() == given.size(), where, ": the adapter stands on ", stored.size(),
                       " models (an anchor and its augments), but ", given.size(), " were given");
  for (std::size_t i = 0; i < stored.size(); ++i) {
    const std::string role = i == 0 ? "the anchor" : message("augment ", i - 1);
    const auto same = [&](const char* what, const std::string& expected, const std::string& found,
                          const char* advice = "") {
      require<FormatError>(expected == found, where, ": ", role, " of the adapter has the ", what, " ",
                           in_quotes(expected), ", but the given one has ", in_quotes(found), advice);
    };
    same("architecture", stored[i].architecture, given[i].architecture);
    same("sizes", stored[i].sizes, given[i].sizes);
    same("tokenizer", stored[i].tokenizer, given[i].tokenizer);
    if (!other_weights)
      same("content hash", stored[i].content_hash, given[i].content_hash,
           "; the same model stored in another type is taken with --allow-requantised");
  }
}

}  // namespace adapter

/// Reads adapter_config.json; what is not of this version, or not understood, is a FormatError.
inline AdapterConfig read_adapter_config(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "adapter_config.json";
  const std::string where = path.string();
  const Json document = read_json(path);
  const std::string type = get_string(document, "peft_type", where);
  require<FormatError>(type == "CALM", where, ": \"peft_type\" is ", in_quotes(type), ", expected \"CALM\"");
  get_integer(document, "format_version", where, adapter::format_version, adapter::format_version);
  AdapterConfig config;
  const Json& options = get_object(document, "options", where);
  config.options.heads = get_integer(options, "heads", where, 1, 65536);
  config.options.norms = get_boolean(options, "norms", where);
  config.options.rotary = get_boolean(options, "rotary", where);
  config.options.rank = get_integer(options, "rank", where, 0, Index{1} << 31);
  config.alignment = get_string_or(document, "alignment", "", where);
  require<FormatError>(config.alignment.empty() || config.alignment == "identity" || config.alignment == "bytes", where,
                       ": \"alignment\" is ", in_quotes(config.alignment), ", expected \"identity\" or \"bytes\"");
  const std::string gate = get_string(options, "gate", where);
  require<FormatError>(gate == "one" || gate == "tanh", where, ": \"gate\" is ", in_quotes(gate),
                       ", expected \"one\" or \"tanh\"");
  config.options.gate = gate == "tanh" ? Gate::tanh : Gate::one;
  for (const Json& link : get_array(document, "links", where))
    config.links.push_back({get_integer(link, "augment", where, 0, 1 << 20),
                            get_integer(link, "tap", where, 0, 1 << 20),
                            get_integer(link, "write", where, 0, 1 << 20)});
  for (const Json& base : get_array(document, "bases", where))
    config.bases.push_back({get_string(base, "architecture", where), get_string(base, "sizes", where),
                            get_string_or(base, "tokenizer", "", where), get_string(base, "content_hash", where)});
  return config;
}

/// Writes the trained weights alone: what a checkpoint changes. They belong to the configuration in the folder. Throws
/// NumericError where a weight is not finite.
template <class Composed>
void save_adapter_weights(const Composed& model, const std::filesystem::path& folder) {
  std::string mark;
  if (is_there(folder / "adapter_config.json")) {
    const AdapterConfig stored = read_adapter_config(folder);
    mark = adapter::mark_of({model.options(), model.links(), stored.bases, stored.alignment});
  }
  adapter::writer_of(model, folder, mark).write(folder / "adapter_model.safetensors");
}

/// Writes the adapter of a composed model over bases that the caller has described. Throws ConfigError where augments
/// read by aligners of their own and `alignment` does not say which, and NumericError where a weight is not finite.
template <class Composed>
void save_adapter(const Composed& model, const std::filesystem::path& folder, const std::vector<BaseDescription>& bases,
                  const std::string& alignment = "") {
  for (const auto& aligner : model.aligners())
    require<ConfigError>(alignment == "bytes" || is_identity(*aligner), folder.string(),
                         ": an augment of this model does not read the anchor's tokens as they are; name the alignment "
                         "(\"bytes\"), or keep the weights alone with save_adapter_weights");
  const AdapterConfig config{model.options(), model.links(), bases, alignment};
  const SafetensorsWriter writer = adapter::writer_of(model, folder, adapter::mark_of(config));
  make_folder(folder);
  AtomicFile<> config_file(folder / "adapter_config.json"), weights_file(folder / "adapter_model.safetensors");
  config_file.write(adapter::to_json(config));
  writer.write_to(weights_file);
  commit_together(config_file, weights_file);
}

/// Writes the adapter of a composed model.
template <class Composed>
void save_adapter(const Composed& model, const std::filesystem::path& folder) {
  const auto bases = [&]<std::size_t... I>(std::index_sequence<I...>) {
    return describe_bases(model.anchor(), model.template augment<I>()...);
  }
  (std::make_index_sequence<Composed::augment_count>{});
  save_adapter(model, folder, bases);
}

/// Loads the bridges of a composition that was made as `config`, the adapter's own, says. Throws FormatError where a
/// tensor is missing, unknown or of another shape.
template <class Composed>
void load_adapter_weights(Composed& model, const std::filesystem::path& folder, const AdapterConfig& config) {
  const SafetensorsFile file(folder / "adapter_model.safetensors");
  const auto mark = file.metadata().find("adapter_config");  // absent where another program wrote the weights
  require<FormatError>(mark == file.metadata().end() || mark->second == adapter::mark_of(config), file.path(),
                       ": these weights were saved with another adapter_config.json than the one beside them; the "
                       "folder holds parts of two adapters");
  std::size_t used = 0;
  for_each_parameter(model, [&](const std::string& name, auto& parameter) {
    ++used;
    file.matrix(name, parameter.value.rows(), parameter.value.cols())
        .read_rows(0, parameter.value.rows(), parameter.value.data());
  });
  const std::string bad = find_not_finite(model);
  require<FormatError>(bad.empty(), file.path(), ": ", bad);
  require<FormatError>(used == file.tensors().size(), file.path(), ": it holds ", file.tensors().size(),
                       " tensors, but the adapter's configuration asks for ", used);
}

/// Composes the given models as an adapter says and loads its bridges. Throws FormatError where the adapter belongs to
/// other models (naming both), where a tensor is missing, unknown or of another shape, or where its augments read by
/// bytes: then compose with the aligners and load_adapter_weights.
template <class Anchor, class... Augments>
ComposedModel<Anchor, Augments...> load_adapter(const std::filesystem::path& folder,
                                                std::shared_ptr<const Anchor> anchor,
                                                std::shared_ptr<const Augments>... augments) {
  const AdapterConfig config = read_adapter_config(folder);
  adapter::check_bases((folder / "adapter_config.json").string(), config.bases, describe_bases(*anchor, *augments...));
  require<FormatError>(config.alignment != "bytes", (folder / "adapter_config.json").string(),
                       ": the augments read what the anchor writes by its bytes; compose the models with a ByteAligner "
                       "for each and call load_adapter_weights");
  ComposedModel<Anchor, Augments...> model = [&] {
    try {
      return compose(std::move(anchor), Links(config.links), config.options, std::move(augments)...);
    } catch (const ConfigError& error) {
      throw FormatError(message((folder / "adapter_config.json").string(), ": ", error.what()));
    }
  }();
  load_adapter_weights(model, folder, config);
  return model;
}

}  // namespace calm::inline CALM_ABI
