// Adapters and model folders: what is saved is what is loaded, and whatever else lies there is a typed error.
#include <doctest/doctest.h>
#include <calm/io/adapter.hpp>
#include <support/models.hpp>
#include <support/mutation.hpp>
#include <support/temporary_folder.hpp>

#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>

namespace adapter_test {
using namespace calm_test;
using calm::BridgeOptions;
using calm::FormatError;
using calm::Json;

namespace {

using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, float>;
using Composed = calm::ComposedModel<Llama, Llama, Llama>;
using Pointer = std::shared_ptr<const Llama>;

calm::ModelSpec anchor_spec() {
  return {.vocabulary = 13, .width = 16, .hidden = 24, .blocks = 2, .heads = {2, 1, 8}, .context = 32};
}
calm::ModelSpec augment_spec() {
  return {.vocabulary = 13, .width = 12, .hidden = 16, .blocks = 2, .heads = {2, 2, 6}, .context = 32};
}
calm::ModelSpec wide_spec() {
  return {.vocabulary = 13, .width = 20, .hidden = 16, .blocks = 1, .heads = {2, 2, 10}, .context = 32};
}
Pointer make(const calm::ModelSpec& spec, std::uint64_t seed) {
  return std::make_shared<const Llama>(spec, TestWeights{seed, calm::DType::f32});
}

struct Bases {
  Pointer anchor = make(anchor_spec(), 1), augment = make(augment_spec(), 2), wide = make(wide_spec(), 3);
};

Composed make_composed(const Bases& bases, const BridgeOptions& options = {}, std::uint64_t seed = 9,
                       const calm::Links& links = {{0, 0, 0}, {0, 1, 1}, {1, 0, 1}}) {
  Composed model(bases.anchor, {bases.augment, bases.wide}, links, options);
  randomise(model, seed);
  return model;
}

Composed load(const std::filesystem::path& folder, const Bases& bases) {
  return calm::load_adapter(folder, bases.anchor, bases.augment, bases.wide);
}

Matrix<float> weights_in(const Composed& model) {
  Matrix<float> all(1, calm::count_parameters(model));
  Index at = 0;
  calm::for_each_parameter(model, [&](const std::string&, const auto& parameter) {
    std::copy_n(parameter.value.data(), parameter.value.size(), all.data() + at);
    at += parameter.value.size();
  });
  return all;
}

template <class Model>
Matrix<float> logits_of(const Model& model) {
  Cpu ctx(1);
  return forward_logits(model, ctx, random_batch({{7, 3}, {1, 0}}, 13, 5));
}

struct Folder : calm_test::TemporaryFolder {
  std::filesystem::path config() const { return path / "adapter_config.json"; }
  std::filesystem::path weights() const { return path / "adapter_model.safetensors"; }
};

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
void write(const std::filesystem::path& path, const std::string& bytes) {
  std::filesystem::remove(path);  // some file systems wait for the disk where a file is cut to nothing first
  std::ofstream(path, std::ios::binary) << bytes;
}

/// Rewrites a JSON file as change(document) leaves it.
void edit(const std::filesystem::path& path, auto&& change) {
  Json document = Json::parse(read(path));
  change(document);
  write(path, document.dump(2));
}

/// Files of at most `bytes` bytes while `call` runs, as on a disk that is full.
void with_full_disk(std::size_t bytes, auto&& call) {
  ::rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  ::rlimit small = before;
  small.rlim_cur = bytes;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  const std::string error = message_of<calm::IoError>(call);
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
  CHECK(contains(error, "File too large"));
}

const std::vector<BridgeOptions> all_options = {
    {}, calm::preset::paper(), {.gate = calm::Gate::tanh}, {.rotary = true}, {.heads = 4, .rank = 3}};

}  // namespace

TEST_CASE("an adapter that is saved and loaded has the same weights and logits, bit for bit") {
  const Bases bases;
  for (const BridgeOptions& options : all_options) {
    const Folder folder;
    const Composed model = make_composed(bases, options);
    calm::save_adapter(model, folder.path / "new" / "folder");
    const Composed loaded = load(folder.path / "new" / "folder", bases);
    CHECK(loaded.links() == model.links());
    CHECK(loaded.options().heads == (options.heads == 0 ? 2 : options.heads));
    CHECK(loaded.options().norms == options.norms);
    CHECK(loaded.options().gate == options.gate);
    CHECK(loaded.options().rotary == options.rotary);
    CHECK(loaded.options().rank == options.rank);
    CHECK(same_bits(weights_in(loaded), weights_in(model)));
    CHECK(same_bits(logits_of(loaded), logits_of(model)));
    CHECK(!same_bits(logits_of(loaded), logits_of(*bases.anchor)));
  }
}

TEST_CASE("the tensors of an adapter have the names and shapes that the format says") {
  using Shape = std::vector<Index>;
  const Bases bases;
  const auto tensors_of = [&](const BridgeOptions& options) {
    const Folder folder;
    calm::save_adapter(make_composed(bases, options), folder.path);
    std::map<std::string, Shape> shapes;
    const calm::SafetensorsFile file(folder.weights());
    for (const calm::SafetensorsEntry& tensor : file.tensors()) {
      CHECK(tensor.dtype == "F32");
      shapes[tensor.name] = tensor.shape;
    }
    return shapes;
  };
  std::map<std::string, Shape> expected, with_gate, low_rank, paper;
  const std::vector<Index> widths = {12, 12, 20};  // of the augment of each link
  for (std::size_t k = 0; k < 3; ++k) {
    const std::string link = "links." + std::to_string(k) + '.';
    for (const char* map : {"q_proj", "k_proj", "v_proj", "o_proj"}) paper[link + map + ".weight"] = {16, 16};
    paper[link + "projection.weight"] = {16, widths[k]};
    expected[link + "norm_anchor.weight"] = {16};
    expected[link + "norm_augment.weight"] = {widths[k]};
  }
  expected.insert(paper.begin(), paper.end());
  with_gate = low_rank = expected;
  for (std::size_t k = 0; k < 3; ++k) {
    const std::string link = "links." + std::to_string(k) + '.';
    with_gate[link + "gate"] = {1};
    low_rank.erase(link + "projection.weight");
    low_rank[link + "projection.down.weight"] = {3, widths[k]};
    low_rank[link + "projection.up.weight"] = {16, 3};
  }
  CHECK(tensors_of({}) == expected);
  CHECK(tensors_of({.gate = calm::Gate::tanh}) == with_gate);
  CHECK(tensors_of({.rank = 3}) == low_rank);
  CHECK(tensors_of(calm::preset::paper()) == paper);
}

TEST_CASE("adapter_config.json says what the bridges are and which models they stand on") {
  const Bases bases;
  const Folder folder;
  calm::save_adapter(make_composed(bases, {.gate = calm::Gate::tanh, .rank = 3}), folder.path);
  const Json config = Json::parse(read(folder.config()));
  CHECK(config["peft_type"] == "CALM");
  CHECK(config["format_version"] == 1);
  CHECK(config["options"]["heads"] == 2);
  CHECK(config["options"]["norms"] == true);
  CHECK(config["options"]["gate"] == "tanh");
  CHECK(config["options"]["rotary"] == false);
  CHECK(config["options"]["rank"] == 3);
  CHECK(config["links"][2] == Json{{"augment", 1}, {"tap", 0}, {"write", 1}});
  REQUIRE(config["bases"].size() == 3);
  CHECK(config["bases"][0]["role"] == "anchor");
  CHECK(config["bases"][2]["role"] == "augment");
  CHECK(config["bases"][1]["architecture"] == "llama");
  CHECK(config["bases"][1]["content_hash"] == calm::hash_of_weights(*bases.augment));
  CHECK(config["bases"][1]["tokenizer"].is_null());
}

TEST_CASE("an adapter of other models is refused, with both named") {
  const Bases bases;
  const Folder folder;
  calm::save_adapter(make_composed(bases), folder.path);
  const std::string original = read(folder.config());
  const auto error = [&](const Bases& given) { return message_of<FormatError>([&] { load(folder.path, given); }); };
  const auto names = [&](const std::string& text, const std::string& one, const std::string& other) {
    CAPTURE(text);
    CHECK(contains(text, folder.config().string()));
    CHECK(contains(text, one));
    CHECK(contains(text, other));
  };
  Bases other = bases;
  calm::ModelSpec larger = anchor_spec();
  larger.hidden = 32;
  other.anchor = make(larger, 1);
  names(error(other), "the anchor of the adapter has the sizes \"vocabulary 13, width 16, hidden 24", "hidden 32");
  other = bases;
  other.wide = make(wide_spec(), 4);
  names(error(other), "augment 1 of the adapter has the content hash \"" + calm::hash_of_weights(*bases.wide),
        calm::hash_of_weights(*other.wide));
  other = bases;
  std::swap(other.augment, other.wide);
  names(error(other), "augment 0", "width 20");
  edit(folder.config(), [](Json& config) { config["bases"][0]["architecture"] = "mistral"; });
  names(error(bases), "\"mistral\"", "\"llama\"");
  write(folder.config(), original);
  edit(folder.config(), [](Json& config) { config["bases"][0]["tokenizer"] = "0123"; });
  names(error(bases), "tokenizer", "\"0123\"");
  write(folder.config(), original);
  edit(folder.config(), [](Json& config) { config["bases"].erase(2); });
  names(error(bases), "stands on 2 models", "3 were given");
}

TEST_CASE("an adapter over a composition is refused over one that joins the same models otherwise") {
  using Inner = calm::ComposedModel<Llama, Llama>;
  const Bases bases;
  const auto inner = [&](const calm::Links& links, const BridgeOptions& options) {
    Inner model(bases.anchor, {bases.augment}, links, options);
    randomise(model, 5);
    return std::make_shared<const Inner>(std::move(model));
  };
  const calm::Links links = {{0, 0, 0}, {0, 1, 1}};
  const BridgeOptions options{.heads = 2};
  auto outer = calm::compose(inner(links, options), {{0, 0, 1}}, {}, bases.wide);
  randomise(outer, 6);
  const Folder folder;
  calm::save_adapter(outer, folder.path);
  CHECK_NOTHROW(calm::load_adapter(folder.path, inner(links, options), bases.wide));
  const auto refused = [&](const calm::Links& other_links, const BridgeOptions& other_options) {
    CHECK(contains(message_of<FormatError>(
                       [&] { calm::load_adapter(folder.path, inner(other_links, other_options), bases.wide); }),
                   "the anchor of the adapter has the content hash"));
  };
  refused({{0, 1, 0}, {0, 0, 1}}, options);
  refused(links, {.heads = 4});
  refused(links, {.heads = 2, .rotary = true});
}

TEST_CASE("weights that are not finite are neither saved nor loaded") {
  const Bases bases;
  const Folder folder;
  const Composed good = make_composed(bases);
  calm::save_adapter(good, folder.path);
  Composed bad = make_composed(bases);
  calm::for_each_parameter(bad, [&](const std::string& name, auto& parameter) {
    if (name == "links.1.q_proj.weight") parameter.value(0, 1) = std::numeric_limits<float>::quiet_NaN();
  });
  CHECK(contains(message_of<calm::NumericError>([&] { calm::save_adapter(bad, folder.path); }),
                 "links.1.q_proj.weight is nan"));
  CHECK(same_bits(weights_in(load(folder.path, bases)), weights_in(good)));
  std::string bytes = read(folder.weights());
  std::fill(bytes.end() - 4, bytes.end(), '\xff');  // the last value is a NaN
  write(folder.weights(), bytes);
  CHECK(contains(message_of<FormatError>([&] { load(folder.path, bases); }), " is "));
}

TEST_CASE("a configuration that is not understood is refused by the key") {
  const Bases bases;
  const Folder folder;
  calm::save_adapter(make_composed(bases), folder.path);
  const std::string original = read(folder.config());
  const auto refused = [&](const std::string& part, auto&& change) {
    write(folder.config(), original);
    edit(folder.config(), change);
    const std::string error = message_of<calm::Error>([&] { load(folder.path, bases); });
    CAPTURE(error);
    CHECK(!error.empty());
    CHECK(contains(error, part));
  };
  refused("\"LORA\"", [](Json& c) { c["peft_type"] = "LORA"; });
  refused("peft_type", [](Json& c) { c.erase("peft_type"); });
  refused("format_version", [](Json& c) { c["format_version"] = 2; });
  refused("\"gate\" is \"sigmoid\"", [](Json& c) { c["options"]["gate"] = "sigmoid"; });
  refused("heads", [](Json& c) { c["options"]["heads"] = 0; });
  refused("3 heads", [](Json& c) { c["options"]["heads"] = 3; });
  refused("rank", [](Json& c) { c["options"]["rank"] = 13; });
  refused("norms", [](Json& c) { c["options"]["norms"] = 1; });
  refused("options", [](Json& c) { c.erase("options"); });
  refused("\"alignment\" is \"letters\"", [](Json& c) { c["alignment"] = "letters"; });
  refused("links", [](Json& c) { c["links"] = Json::object(); });
  refused("0:2>1", [](Json& c) { c["links"][0] = {{"augment", 0}, {"tap", 2}, {"write", 1}}; });
  refused("2:0>1", [](Json& c) { c["links"][0] = {{"augment", 2}, {"tap", 0}, {"write", 1}}; });
  refused("0:1>1", [](Json& c) { c["links"][0] = c["links"][1]; });
  refused("tap", [](Json& c) { c["links"][0]["tap"] = -1; });
  refused("", [](Json& c) { c["links"] = Json::array(); });
  write(folder.config(), original);
  std::filesystem::remove(folder.weights());
  CHECK_THROWS_AS(load(folder.path, bases), calm::IoError);
  CHECK_THROWS_AS(load(folder.path / "nowhere", bases), calm::IoError);
}

TEST_CASE("missing, unknown and mis-shaped tensors are refused by name") {
  const Bases bases;
  const Folder folder;
  calm::save_adapter(make_composed(bases), folder.path);
  const std::string original = read(folder.weights());
  const auto rewritten = [&](const std::string& without, const std::string& extra, std::vector<Index> shape) {
    write(folder.weights(), original);
    const Folder other;
    {
      const calm::SafetensorsFile file(folder.weights());
      calm::SafetensorsWriter writer;
      for (const calm::SafetensorsEntry& tensor : file.tensors())
        if (tensor.name != without) writer.add(tensor.name, tensor.shape, file.matrix(tensor.name));
      Index values = 1;
      for (const Index n : shape) values *= n;
      const Matrix<float> added(1, values);
      if (!extra.empty()) writer.add(extra, shape, added.values());
      for (const auto& [key, value] : file.metadata()) writer.set_metadata(key, value);
      writer.write(other.weights());
    }
    write(folder.weights(), read(other.weights()));
    return message_of<FormatError>([&] { load(folder.path, bases); });
  };
  CHECK(rewritten("", "", {}).empty());
  CHECK(contains(rewritten("links.1.v_proj.weight", "", {}), "links.1.v_proj.weight"));
  CHECK(contains(rewritten("", "links.3.v_proj.weight", {16, 16}), "22 tensors"));
  const std::string shape = rewritten("links.2.projection.weight", "links.2.projection.weight", {20, 16});
  CHECK(contains(shape, "links.2.projection.weight"));
  CHECK(contains(shape, "[20, 16]"));
  CHECK(contains(shape, "[16, 20]"));
  CHECK(contains(rewritten("links.2.norm_anchor.weight", "links.2.norm_anchor.weight", {4, 4}), "[4, 4]"));
}

TEST_CASE("any bytes for a configuration give a valid adapter or a typed error") {
  const Bases bases;
  const Folder folder;
  calm::save_adapter(make_composed(bases), folder.path);
  const std::string original = read(folder.config());
  const auto loads = [&](const std::string& text) {
    write(folder.config(), text);
    try {
      const Composed loaded = load(folder.path, bases);
      return calm::count_parameters(loaded) > 0;
    } catch (const calm::Error&) {  // any other exception ends the test
      return false;
    }
  };
  for (std::size_t size = 0; size + 2 <= original.size(); ++size) {
    CAPTURE(size);
    REQUIRE(!loads(original.substr(0, size)));
  }
  CHECK(loads(original));
  calm::Random random(1);
  int loaded = 0;
  for (int round = 0; round < 2000; ++round) {
    CAPTURE(round);
    loaded += loads(mutated(original, random)) ? 1 : 0;
  }
  CHECK(loaded > 0);     // some changes touch nothing that matters
  CHECK(loaded < 1000);  // most do
}

TEST_CASE("a full disk leaves the old adapter, whichever of its files no longer fits") {
  const Bases bases;
  const Folder folder;
  const Composed old_model = make_composed(bases), new_model = make_composed(bases, {}, 10);
  calm::save_adapter(old_model, folder.path);
  REQUIRE(std::filesystem::file_size(folder.weights()) > std::filesystem::file_size(folder.config()) + 100);
  for (const std::size_t bytes :
       {std::size_t{100}, static_cast<std::size_t>(std::filesystem::file_size(folder.config())) + 50}) {
    CAPTURE(bytes);
    // Of other bridges too: neither file may be replaced.
    for (const Composed& model : {new_model, make_composed(bases, {.rotary = true})}) {
      with_full_disk(bytes, [&] { calm::save_adapter(model, folder.path); });
      CHECK(same_bits(weights_in(load(folder.path, bases)), weights_in(old_model)));
    }
  }
  with_full_disk(100, [&] { calm::save_adapter_weights(new_model, folder.path); });
  CHECK(same_bits(weights_in(load(folder.path, bases)), weights_in(old_model)));
  calm::save_adapter_weights(new_model, folder.path);
  CHECK(same_bits(weights_in(load(folder.path, bases)), weights_in(new_model)));
}

TEST_CASE(
    "a kill between the two files leaves the old weights of the same bridges, and never a mixture of two adapters") {
  const Bases bases;
  const Composed old_model = make_composed(bases);
  const auto after_kill = [&](const Composed& new_model) {  // the configuration is written first
    const Folder folder, other;
    calm::save_adapter(old_model, folder.path);
    calm::save_adapter(new_model, other.path);
    write(folder.config(), read(other.config()));
    return weights_in(load(folder.path, bases));
  };
  CHECK(same_bits(after_kill(make_composed(bases, {}, 10)), weights_in(old_model)));
  // The same tensors, but they mean something else.
  CHECK_THROWS_AS(after_kill(make_composed(bases, {.rotary = true})), FormatError);
  CHECK_THROWS_AS(after_kill(make_composed(bases, {.heads = 4})), FormatError);
  CHECK_THROWS_AS(after_kill(make_composed(bases, {}, 9, {{0, 1, 0}, {0, 0, 1}, {1, 0, 1}})), FormatError);
}

TEST_CASE("an adapter whose augments read by aligners of their own says so, and is not opened without them") {
  const Bases bases;
  const Folder folder;
  const auto aligner = std::make_shared<const UnevenAligner>(bases.augment->spec().vocabulary);
  Composed model(bases.anchor, {bases.augment, bases.wide}, calm::Links{{0, 0, 0}, {1, 0, 1}}, {}, {aligner, aligner});
  CHECK(contains(message_of<calm::ConfigError>([&] { calm::save_adapter(model, folder.path); }), "name the alignment"));
  CHECK(!std::filesystem::exists(folder.path / "adapter_config.json"));
  const auto described = calm::describe_bases(*bases.anchor, *bases.augment, *bases.wide);
  CHECK_THROWS_AS(calm::save_adapter(model, folder.path, described, "identity"), calm::ConfigError);
  calm::save_adapter(model, folder.path, described, "bytes");
  CHECK(contains(message_of<calm::FormatError>([&] { load(folder.path, bases); }), "load_adapter_weights"));
  randomise(model, 77);
  const Matrix<float> before = weights_in(model);
  calm::save_adapter_weights(model, folder.path);
  randomise(model, 78);
  calm::load_adapter_weights(model, folder.path, calm::read_adapter_config(folder.path));
  CHECK(same_bits(constant(weights_in(model)), constant(before)));
}

TEST_CASE("weights without the mark of their configuration load, as PyTorch writes them") {
  const Bases bases;
  const Folder folder;
  const Composed model = make_composed(bases);
  calm::save_adapter(model, folder.path);
  calm::SafetensorsWriter writer;
  calm::for_each_parameter(model, [&](const std::string& name, const auto& parameter) {
    writer.add(name, parameter.shape(), parameter.value.values());
  });
  writer.write(folder.weights());
  CHECK(same_bits(weights_in(load(folder.path, bases)), weights_in(model)));
}

TEST_CASE("a model that is saved and loaded is the same, or rounded as it was asked") {
  for (const bool tied : {false, true}) {
    CAPTURE(tied);
    calm::ModelSpec spec = anchor_spec();
    spec.tied_embeddings = tied;
    spec.norm_epsilon = 1e-6;
    spec.rotary_base = 500000;
    const Pointer model = make(spec, 1);
    const Folder folder;
    calm::save_model(*model, folder.path);
    const Llama loaded = calm::load_model<Llama>(folder.path);
    CHECK(calm::hash_of_weights(loaded) == calm::hash_of_weights(*model));
    CHECK(calm::describe(loaded) == calm::describe(*model));
    CHECK(same_bits(logits_of(loaded), logits_of(*model)));
    CHECK(loaded.spec().tied_embeddings == tied);
    CHECK(loaded.spec().norm_epsilon == 1e-6);
    CHECK(loaded.spec().rotary_base == 500000);
    CHECK(loaded.spec().context == 32);

    calm::save_model(*model, folder.path, calm::DType::bf16);
    const Llama rounded = calm::load_model<Llama>(folder.path);
    const auto exact = calm::weights_of(*model);
    calm::for_each_weight(rounded, [&](const std::string& name, const calm::StoredMatrix& weight) {
      CAPTURE(name);
      CHECK(weight.dtype() == calm::DType::bf16);
      const Matrix<float> expected =
          calm::StoredMatrix::from(exact(name, weight.rows(), weight.cols()).template dense<double>(),
                                   calm::DType::bf16)
              .template dense<float>();
      CHECK(same_bits(weight.template dense<float>(), expected));
    });
    CHECK(calm::hash_of_weights(rounded) != calm::hash_of_weights(*model));
    CHECK(relative_difference(logits_of(rounded), logits_of(*model)) < 0.1);
    calm::save_model(rounded, folder.path, calm::DType::bf16);  // over the file that it is mapped from
    CHECK(calm::hash_of_weights(calm::load_model<Llama>(folder.path)) == calm::hash_of_weights(rounded));
  }
}

TEST_CASE("a config.json that this architecture does not cover is refused by the key") {
  const Folder folder;
  calm::save_model(*make(anchor_spec(), 1), folder.path);
  const auto path = folder.path / "config.json";
  const std::string original = read(path);
  const auto refused = [&](const std::string& part, auto&& change) {
    write(path, original);
    edit(path, change);
    const std::string error = message_of<calm::Error>([&] { calm::load_model<Llama>(folder.path); });
    CAPTURE(error);
    CHECK(!error.empty());
    CHECK(contains(error, part));
  };
  refused("\"qwen3\", expected \"llama\"", [](Json& c) { c["model_type"] = "qwen3"; });
  refused("\"mamba\" are not known here; these are: llama, ", [](Json& c) { c["model_type"] = "mamba"; });
  refused("n_embd", [](Json& c) { c["model_type"] = "gpt2"; });
  refused("\"attention_bias\": biases", [](Json& c) { c["attention_bias"] = true; });
  refused("\"mlp_bias\": biases", [](Json& c) { c["mlp_bias"] = true; });
  refused("\"gelu\"", [](Json& c) { c["hidden_act"] = "gelu"; });
  refused("\"yarn\"", [](Json& c) { c["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4}}; });
  refused("\"factor\" is missing", [](Json& c) { c["rope_scaling"] = {{"type", "linear"}}; });
  refused("at least 1", [](Json& c) { c["rope_scaling"] = {{"type", "linear"}, {"factor", 0.5}}; });
  refused("low_freq_factor", [](Json& c) { c["rope_parameters"] = {{"rope_type", "llama3"}, {"factor", 8}}; });
  refused("rope_parameters", [](Json& c) { c["rope_parameters"] = 3; });
  refused("vocab_size", [](Json& c) { c.erase("vocab_size"); });
  refused("num_hidden_layers", [](Json& c) { c["num_hidden_layers"] = 0; });
  refused("head_dim", [](Json& c) { c["head_dim"] = std::int64_t{1} << 31; });
  refused("heads", [](Json& c) { c["num_key_value_heads"] = 3; });
  refused("config.json: the epsilon of the norms", [](Json& c) { c["rms_norm_eps"] = -1e-5; });
  refused("config.json: a rotary base", [](Json& c) { c["rope_theta"] = 0; });
  refused("model.layers.0.mlp", [](Json& c) { c["intermediate_size"] = 25; });
  refused("model.layers.2", [](Json& c) { c["num_hidden_layers"] = 3; });
  refused("model.layers.1.input_layernorm.weight\" belongs to no weight", [](Json& c) { c["num_hidden_layers"] = 1; });
  write(path, original);
  edit(path, [](Json& c) {  // as transformers 5 writes it
    c.erase("rope_theta");
    c["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 777.0}};
  });
  CHECK(calm::load_model<Llama>(folder.path).spec().rotary_base == 777);
}

TEST_CASE("a model folder that was cut off anywhere is a typed error") {
  const Folder folder;
  calm::save_model(*make(anchor_spec(), 1), folder.path);
  const auto path = folder.path / "config.json", weights = folder.path / "model.safetensors";
  const std::string config = read(path), bytes = read(weights);
  for (std::size_t size = 0; size + 2 <= config.size(); ++size) {
    write(path, config.substr(0, size));
    REQUIRE_THROWS_AS(calm::load_model<Llama>(folder.path), calm::Error);
  }
  write(path, config);
  for (std::size_t size = 0; size < bytes.size(); size += size < 100 ? 1 : 97) {
    write(weights, bytes.substr(0, size));
    REQUIRE_THROWS_AS(calm::load_model<Llama>(folder.path), calm::Error);
  }
}

}  // namespace adapter_test
