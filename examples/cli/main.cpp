// calm: looks into models, composes them, trains the bridges and uses what came out. `calm --help` says more.
#include "models.hpp"

#include <calm/model/zoo/zoo.hpp>

#include <CLI/CLI.hpp>

#include <charconv>
#include <fstream>
#include <iostream>

using namespace cli;

namespace {

/// A wrong mixture of options; the program then ends with 2.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A whole number that is not too small. (CLI11's own check names bounds of 300 digits.)
CLI::Validator at_least(Index least) {
  const auto check = [least](const std::string& text) {
    Index value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    const bool holds = error == std::errc() && end == text.data() + text.size() && value >= least;
    return holds ? std::string() : calm::message("expected a whole number of at least ", least, ", found '", text, "'");
  };
  return CLI::Validator(check, "");
}

/// A number for which a condition holds, which `expected` says in words.
CLI::Validator number(const char* expected, bool (*holds)(double)) {
  const auto check = [expected, holds](const std::string& text) {
    double value = 0;
    const bool good = CLI::detail::lexical_cast(text, value) && std::isfinite(value) && holds(value);
    return good ? std::string() : calm::message("expected a number ", expected, ", found '", text, "'");
  };
  return CLI::Validator(check, "");
}

struct CommandLine {
  CLI::App app{"Composes pretrained language models. A model is a Hugging Face folder or a .gguf file.", "calm"};
  Options o;

  CommandLine() {
    app.require_subcommand(1);
    app.option_defaults()->always_capture_default();
    inspect();
    tokenize();
    logits();
    gradients();
    init();
    train();
    generate();
    evaluate();
  }

  /// CLI11 would say that there is none.
  void expect_command(const std::string& name) {
    if (name.empty() || name.front() == '-') return;
    std::string known;
    for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; })) {
      if (sub->get_name() == name) return;
      known += (known.empty() ? "" : ", ") + sub->get_name();
    }
    throw UsageError("there is no command '" + name + "'; these are: " + known);
  }

 private:
  CLI::App* command(const char* name, Command value, const char* what, const char* example) {
    CLI::App* sub = app.add_subcommand(name, what);
    sub->footer(std::string("Example:\n  ") + example);
    sub->callback([this, sub, value] {
      o.command = value;
      const auto given = [&](const char* option) {
        const CLI::Option* found = sub->get_option_no_throw(option);
        return found != nullptr && found->count() > 0;
      };
      o.has_text = given("--text");
      o.has_ids = given("--ids");
    });
    sub->add_flag("--json", o.json, "print one JSON document");
    return sub;
  }
  void threads(CLI::App* sub) {
    sub->add_option("--threads", o.threads, "0: one a core; results do not depend on it")->check(at_least(0));
    sub->add_option("--compute", o.compute,
                    "arithmetic of matrix products; bf16 rounds what is multiplied and adds up in f32")
        ->check(CLI::IsMember({"f32", "bf16"}));
  }
  void composition(CLI::App* sub, bool adapter) {
    sub->add_option("--anchor", o.anchor, "the model that is extended");
    sub->add_option("--augment", o.augments, "a model that is tapped; may be given several times");
    if (adapter) {
      sub->add_option("--adapter", o.adapter, "folder of the trained bridges");
      sub->add_flag("--allow-requantised", o.allow_requantised,
                    "take bases whose weights are stored in another type than those the adapter was made with");
    }
    sub->add_option("--alignment", o.alignment, "how augments read the text; by the tokenizers unless given")
        ->check(CLI::IsMember({"identity", "bytes"}));
  }
  void any_model(CLI::App* sub) {
    sub->add_option("--model", o.model, "a single model");
    composition(sub, true);
  }

  void inspect() {
    auto* sub = command("inspect", Command::inspect, "architecture, sizes, parameters, stored types, memory",
                        "calm inspect SmolLM2-135M-Instruct.Q4_1.gguf");
    sub->add_option("path", o.model, "model or adapter");
    sub->add_flag(
        "--cost", o.cost,
        "instead: FLOPs and bytes a token by the sizes, and tokens a second measured here; also of a composition");
    composition(sub, true);
    sub->add_option("--tokens", o.tokens, "with --cost: of the prompt and of a training step's sequence")
        ->check(CLI::Range(2, 1 << 20));
    threads(sub);
  }
  void tokenize() {
    auto* sub = command("tokenize", Command::tokenize, "text as ids, one line for each input line",
                        "calm tokenize --model SmolLM2 --text 'Hello world'");
    sub->add_option("--model", o.model)->required();
    auto* text = sub->add_option("--text", o.text);
    sub->add_option("--file", o.file, "JSON lines of strings")->excludes(text);
    sub->add_flag("--no-special", o.no_special, "without BOS and EOS");
  }
  void text_or_ids(CLI::App* sub) {
    auto* ids = sub->add_option("--ids", o.ids, "1,2,3");
    sub->add_option("--text", o.text)->excludes(ids);
    sub->add_flag("--no-special", o.no_special, "text without BOS and EOS");
    sub->add_option("--out", o.out, "a .safetensors file")->required();
  }
  void logits() {
    auto* sub = command("logits", Command::logits, "logits [T, V] as safetensors, with --hidden each stream",
                        "calm logits --model SmolLM2 --text 'Hello' --out logits.safetensors");
    any_model(sub);
    text_or_ids(sub);
    sub->add_flag("--hidden", o.hidden, "also hidden.{i}: 0 the embeddings, i the stream after block i-1");
    threads(sub);
  }
  void gradients() {
    auto* sub = command("gradients", Command::gradients, "the loss of a text and its gradients for the bridges",
                        "calm gradients --anchor B --augment A --adapter D --ids 1,2,3 --out grads.safetensors");
    composition(sub, true);
    text_or_ids(sub);
    threads(sub);
  }
  void init() {
    auto* sub = command("init", Command::init, "fresh bridges between an anchor and its augments",
                        "calm init --anchor B --augment A --links '0:3>7,0:7>14' --out adapter");
    composition(sub, false);
    auto* links = sub->add_option("--links", o.links, "augment:tap block>write block, counted from 0");
    sub->add_option("--links-count", o.links_count, "evenly spaced links for each augment")
        ->excludes(links)
        ->check(at_least(1));
    sub->add_option("--heads", o.heads, "of the bridges; 0: the anchor's")->check(at_least(0));
    sub->add_option("--preset", o.preset, "the bridges of the paper, without norms")->check(CLI::IsMember({"paper"}));
    sub->add_option("--seed", o.seed);
    sub->add_option("--out", o.out, "folder")->required();
  }
  void train() {
    auto* sub = command("train", Command::train, "trains the bridges; keeps those with the best validation loss",
                        "calm train --anchor B --augment A --adapter D --data facts.jsonl --steps 200 --out trained");
    composition(sub, true);
    sub->add_option("--data", o.data, "JSON lines of prompt and completion")->required();
    sub->add_option("--valid", o.valid, "the same, for validation");
    sub->add_option("--steps", o.steps)->check(at_least(1));
    sub->add_option("--lr", o.learning_rate, "peak learning rate")->check(number("above 0", [](double x) {
      return x > 0;
    }));
    sub->add_option("--batch-tokens", o.batch_tokens)->check(at_least(1));
    sub->add_option("--accumulate", o.accumulate, "batches a step")->check(at_least(1));
    sub->add_option("--seed", o.seed);
    sub->add_option("--out", o.out, "folder")->required();
    sub->add_flag("--resume", o.resume, "go on from the last checkpoint in the folder");
    threads(sub);
  }
  void sampling(CLI::App* sub) {
    sub->add_option("--max-new-tokens", o.max_new_tokens,
                    "fewer where the context of the model or of an augment is full before")
        ->check(at_least(0));
    sub->add_option("--temperature", o.temperature, "0: greedy")->check(number("of at least 0", [](double x) {
      return x >= 0;
    }));
    sub->add_option("--top-k", o.top_k, "0: all")->check(at_least(0));
    sub->add_option("--top-p", o.top_p)->check(number("above 0 and to 1", [](double x) { return x > 0 && x <= 1; }));
    sub->add_option("--seed", o.seed);
    sub->add_flag("--chat", o.chat, "write the prompt as the model's chat template does");
    sub->add_option("--stop", o.stop, "ends before this text; may be given several times");
  }
  void generate() {
    auto* sub = command("generate", Command::generate, "continues a prompt, streamed",
                        "calm generate --model SmolLM2 --chat --prompt 'What is the capital of France?'");
    any_model(sub);
    sub->add_option("--prompt", o.prompt)->required();
    sampling(sub);
    threads(sub);
  }
  void evaluate() {
    auto* sub = command("eval", Command::eval, "exact match, mean loss or chrF over a file of examples",
                        "calm eval --anchor B --augment A --adapter D --data test.jsonl --metric exact");
    any_model(sub);
    sub->add_option("--data", o.data, "JSON lines of prompt and completion")->required();
    sub->add_option("--metric", o.metric)->check(CLI::IsMember({"exact", "nll", "chrf"}));
    sub->add_option("--batch-tokens", o.batch_tokens)->check(at_least(1));
    sampling(sub);
    threads(sub);
  }
};

void check_usage(const Options& o) {
  const auto expect = [](bool holds, const char* message) {
    if (!holds) throw UsageError(message);
  };
  if (o.command == Command::inspect) {
    expect(o.cost || !o.composed(), "--anchor needs --cost; give the PATH of a model or of an adapter");
    expect(o.composed() || !o.model.empty(), "give the PATH of a model or of an adapter");
    if (!o.cost) return;
  }
  const bool needs_composition =
      o.command == Command::gradients || o.command == Command::init || o.command == Command::train;
  if (needs_composition) expect(o.composed(), "--anchor is required");
  expect(o.composed() != !o.model.empty(), "give either --model or --anchor with --augment");
  if (!o.composed()) expect(o.augments.empty() && o.adapter.empty(), "--augment and --adapter need --anchor");
  else expect(!o.augments.empty(), "--anchor needs at least one --augment");
  if (o.composed() && o.command != Command::init) expect(!o.adapter.empty(), "--adapter is required with --anchor");
  if (o.command == Command::init) expect(!o.links.empty() || o.links_count > 0, "give --links or --links-count");
  if (o.command == Command::logits || o.command == Command::gradients)
    expect(o.has_ids || o.has_text, "give --ids or --text");
  if (o.command == Command::tokenize) expect(!o.file.empty() || o.has_text, "give --text or --file");
  if (o.has_ids) parse_ids(o.ids);
  if (!o.links.empty()) links_of(o);
  std::error_code error;  // a path that cannot be looked at fails where it is opened
  const auto folder = [&](const std::string& path) { return std::filesystem::weakly_canonical(path, error); };
  if (o.command == Command::train)
    expect(folder(o.out) != folder(o.adapter) || error,
           "--out: a run begins from the bridges in the folder of --adapter and leaves them as they are; give another");
}

void tokenize(const Options& o) {
  const calm::Tokenizer tokenizer = calm::open_tokenizer(o.model);
  calm::Tokenizer::Scratch scratch;
  auto all = nlohmann::json::array();
  const auto print = [&](const std::string& text) {
    std::vector<TokenId> ids;
    for (const auto& token : tokenizer.encode(text, {.add_special = !o.no_special}, scratch)) ids.push_back(token.id);
    if (o.json) {
      all.push_back(ids);
      return;
    }
    for (std::size_t i = 0; i < ids.size(); ++i) std::cout << (i > 0 ? " " : "") << ids[i];
    std::cout << '\n';
  };
  if (o.file.empty()) {
    print(o.text);
  } else {
    std::ifstream file(o.file);
    calm::require<calm::IoError>(file.good(), o.file, ": cannot be read");
    Index number = 0;
    for (std::string line; std::getline(file, line);) {
      const std::string where = calm::message(o.file, ": line ", ++number);
      const calm::Json json = calm::parse_json(line, where);
      calm::require<calm::FormatError>(json.is_string(), where, ": expected a string, found ", calm::kind_of(json));
      print(json.get<std::string>());
    }
  }
  if (o.json) std::cout << (o.file.empty() ? all[0] : all) << '\n';
}

void print(const Options& o, const nlohmann::ordered_json& result) {
  if (o.json) {
    std::cout << result << '\n';
    return;
  }
  const auto line = [](const std::string& key, const nlohmann::ordered_json& value) {
    std::cout << key << std::string(key.size() < 22 ? 22 - key.size() : 1, ' ')
              << (value.is_string() ? value.get<std::string>() : value.dump()) << '\n';
  };
  for (const auto& [key, value] : result.items()) {
    if (!value.is_array()) line(key, value);
    else
      for (const auto& item : value) line(key, item);
  }
}

void inspect(const Options& o) {
  if (calm::is_there(std::filesystem::path(o.model) / "adapter_config.json")) {
    const calm::AdapterConfig config = calm::read_adapter_config(o.model);
    auto augments = nlohmann::ordered_json::array();
    for (const calm::BaseDescription& base : config.bases) augments.push_back(base.architecture + ", " + base.sizes);
    nlohmann::ordered_json result{{"kind", "adapter"}, {"links", config.links.size()}, {"heads", config.options.heads}};
    if (!augments.empty()) {
      result["anchor"] = augments.front();
      augments.erase(augments.begin());
    }
    result["augments"] = std::move(augments);
    return print(o, result);
  }
  const calm::Pretrained files(o.model);
  const calm::ModelSpec& spec = files.spec();
  nlohmann::ordered_json result{{"architecture", files.model_type()},
                                {"vocabulary", spec.vocabulary},
                                {"width", spec.width},
                                {"hidden", spec.hidden},
                                {"blocks", spec.blocks},
                                {"heads", spec.heads.query_heads},
                                {"kv_heads", spec.heads.kv_heads},
                                {"head_width", spec.heads.width},
                                {"context", spec.context},
                                {"window", spec.window},
                                {"tied_embeddings", spec.tied_embeddings}};
  const StoredWeights weights = calm::zoo::All::visit(
      files.model_type(), [&](auto architecture) { return stored_weights_of<decltype(architecture)>(files); });
  const Index packed = o.compute == "bf16" ? weights.packed_bf16 : weights.packed_f32;
  result["parameters"] = weights.parameters;
  result["stored_types"] = weights.types;
  result["stored_bytes"] = weights.bytes;
  result["packed_bytes"] = packed;  // for training, and in bf16; each weight's part is made when it is first multiplied
  result["cache_bytes_a_token"] = 2 * spec.blocks * spec.heads.kv_heads * spec.heads.width * Index{sizeof(float)};
  const ModelTokenizer tokenizer(o.model);
  if (!tokenizer.identity().empty()) result["tokenizer"] = tokenizer.identity();
  if (!tokenizer.fault().empty()) result["tokenizer"] = "cannot be read: " + tokenizer.fault();
  print(o, result);
}

}  // namespace

int main(int argc, char** argv) {
  CommandLine line;
  try {
    if (argc > 1) line.expect_command(argv[1]);
    line.app.parse(argc, argv);
    check_usage(line.o);
  } catch (const CLI::ParseError& error) {
    return line.app.exit(error) == 0 ? 0 : 2;
  } catch (const UsageError& error) {
    std::cerr << "calm: " << error.what() << "\n";
    return 2;
  } catch (const calm::ConfigError& error) {  // a value that does not read as what its option takes
    std::cerr << "calm: " << error.what() << "\n";
    return 2;
  }
  const Options& o = line.o;
  try {
    if (o.command == Command::inspect && !o.cost) {
      inspect(o);
    } else if (o.command == Command::tokenize) {
      tokenize(o);
    } else {
      Ctx ctx(o.threads, products_of(o.command, o));
      const calm::Pretrained files(o.main_model());
      calm::zoo::All::visit(files.model_type(),
                            [&](auto architecture) { run_with<decltype(architecture)>(ctx, o, files); });
    }
    calm::require<calm::IoError>(std::cout.flush().good(), "the result could not be written to the standard output");
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "calm: " << error.what() << '\n';
    return 1;
  }
}
