// train_composed: calm's side of the training benchmark beside peers/train_composed.py: the same composed model, the
// same batches, the same optimizer. Prints one JSON line; tokens_per_second is the median over the steps after the
// warm-up.
//
// Unless --keep-states is given, nothing is kept from step to step: the frozen models run anew for every batch, as they
// do in the peer. With --anchor-file and --augment-file real models are composed, as peers/train_real.py does.
#include "measuring.hpp"

#include <calm/calm.hpp>
#include <calm/compose/any_augment.hpp>
#include <calm/io/pretrained.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <chrono>
#include <fstream>
#include <iostream>

namespace {

using Ctx = calm::Context<calm::CpuBackend>;
using Model = calm::Transformer<calm::zoo::Llama>;
using RealModels = calm::zoo::List<calm::zoo::Llama, calm::zoo::Gemma3>;
using Batch = std::vector<calm::Example>;

struct Sizes {
  calm::Index width, blocks, heads, kv_heads, hidden;
};

void add_options(CLI::App& app, const std::string& name, Sizes& sizes) {
  app.add_option("--" + name + "-width", sizes.width, "of the stream");
  app.add_option("--" + name + "-blocks", sizes.blocks);
  app.add_option("--" + name + "-heads", sizes.heads);
  app.add_option("--" + name + "-kv-heads", sizes.kv_heads, "as many as heads unless given");
  app.add_option("--" + name + "-hidden", sizes.hidden, "width of the MLP");
}

std::shared_ptr<const Model> random_model(const Sizes& sizes, calm::Index vocabulary, std::uint64_t seed) {
  const calm::Index kv_heads = sizes.kv_heads > 0 ? sizes.kv_heads : sizes.heads;
  const calm::ModelSpec spec{.vocabulary = vocabulary,
                             .width = sizes.width,
                             .hidden = sizes.hidden,
                             .blocks = sizes.blocks,
                             .heads = {sizes.heads, kv_heads, sizes.width / sizes.heads}};
  return std::make_shared<const Model>(spec, calm::RandomWeights{.seed = seed});
}

struct BatchShape {
  calm::Index count = 8, sequences = 128, shortest = 20, longest = 48, prompt = 6, longest_prompt = 16;
};

/// Random sequences with random prompts; unless asked otherwise as long as those of the key-value task.
std::vector<Batch> random_batches(const BatchShape& shape, calm::Index vocabulary, std::uint64_t seed) {
  calm::Random random(seed, calm::stream_of("batches"));
  std::vector<Batch> batches(static_cast<std::size_t>(shape.count));
  const auto draw = [&](calm::Index n) {
    std::vector<calm::TokenId> ids;
    for (calm::Index i = 0; i < n; ++i) ids.push_back(static_cast<calm::TokenId>(random.below(vocabulary)));
    return ids;
  };
  for (Batch& batch : batches)
    for (calm::Index i = 0; i < shape.sequences; ++i) {
      const calm::Index length = shape.shortest + random.below(shape.longest - shape.shortest + 1);
      const calm::Index prompt = shape.prompt + random.below(shape.longest_prompt - shape.prompt + 1);
      batch.push_back({draw(prompt), draw(length - prompt)});
    }
  return batches;
}

void write_batches(const std::string& path, const std::vector<Batch>& batches) {
  std::ofstream file(path);
  for (const Batch& batch : batches) {
    auto line = nlohmann::json::array();
    for (const calm::Example& example : batch) {
      std::vector<calm::TokenId> ids = example.prompt;
      ids.insert(ids.end(), example.completion.begin(), example.completion.end());
      line.push_back({{"ids", ids}, {"completion", example.prompt.size()}});
    }
    file << line.dump() << '\n';
  }
  calm::require<calm::IoError>(file.flush().good(), path, ": cannot be written");
}

std::vector<Batch> read_batches(const std::string& path) {
  std::ifstream file(path);
  calm::require<calm::IoError>(file.good(), path, ": cannot be read");
  std::vector<Batch> batches;
  for (std::string line; std::getline(file, line);) {
    Batch batch;
    for (const auto& entry : nlohmann::json::parse(line)) {
      const auto ids = entry.at("ids").get<std::vector<calm::TokenId>>();
      const auto first = ids.begin() + std::min(entry.at("completion").get<std::ptrdiff_t>(), std::ssize(ids));
      batch.push_back({{ids.begin(), first}, {first, ids.end()}});
    }
    batches.push_back(std::move(batch));
  }
  return batches;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

struct Options {
  calm::Index heads = 0, warm_up = 5, steps = 30;
  std::string links = "0:1>2,0:2>3";
  bool keep_states = false;
  std::uint64_t seed = 0;

  calm::Links parsed_links() const { return calm::parse_links(links, "--links"); }
  calm::BridgeOptions bridges() const { return {.heads = heads, .rotary = true, .seed = seed}; }
};

/// Trains and prints the line of figures.
template <class Composed>
void measure(const Options& o, Ctx& ctx, Composed model, const std::vector<Batch>& batches) {
  calm::Trainer trainer(ctx, model, calm::CosineSchedule{.peak = 1e-4, .warmup = 0, .final_fraction = 1},
                        {.beta1 = 0.9, .beta2 = 0.98, .weight_decay = 0.01, .clip_norm = 1});
  const std::vector<calm::PackedBatch> packed(batches.begin(), batches.end());
  std::vector<calm::KeptStates<Composed>> kept(packed.size());
  std::vector<double> rates, seconds;
  double loss = 0, tokens = 0;
  for (calm::Index step = 0; step < o.warm_up + o.steps; ++step) {
    const std::size_t i = static_cast<std::size_t>(step) % packed.size();
    const calm::TrainingBatch<Composed> batch{&packed[i], o.keep_states ? &kept[i] : nullptr};
    const auto start = std::chrono::steady_clock::now();
    const calm::StepResult result = trainer.step(std::span(&batch, 1));
    const double taken = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    loss = result.loss;
    if (step < o.warm_up) continue;
    seconds.push_back(taken);
    rates.push_back(static_cast<double>(result.tokens) / taken);
  }
  for (const auto& batch : packed)
    tokens += static_cast<double>(batch.tokens().tokens()) / static_cast<double>(packed.size());
  std::cout << nlohmann::json{{"tokens_per_second", std::lround(median(rates))},
                              {"loss", loss},
                              {"median_step_seconds", median(seconds)},
                              {"tokens_per_step", static_cast<calm::Index>(std::nearbyint(tokens))},
                              {"trained_parameters", calm::count_parameters(model)},
                              {"keep_states", o.keep_states},
                              {"peak_resident_mb", peak_resident_mb()},
                              {"threads", ctx.backend.pool().size()}}
            << '\n';
}

/// The models of two files; the augment is chosen at run time, so that two anchors are all that is compiled.
void measure_files(const Options& o, Ctx& ctx, const std::string& anchor_file, const std::string& augment_file,
                   const std::vector<Batch>& batches) {
  const calm::Pretrained anchor(anchor_file), augment(augment_file);
  const auto opened = RealModels::visit(augment.model_type(), [&](auto architecture) {
    return std::make_shared<const calm::AnyAugment<Ctx>>(augment.open_as<calm::Transformer<decltype(architecture)>>());
  });
  RealModels::visit(anchor.model_type(), [&](auto architecture) {
    using Anchor = calm::Transformer<decltype(architecture)>;
    using Composed = calm::ComposedModel<Anchor, calm::AnyAugments<Ctx>>;
    measure(o, ctx, Composed(anchor.open_as<Anchor>(), {opened}, o.parsed_links(), o.bridges()), batches);
  });
}

}  // namespace

int main(int argc, char** argv) try {
  CLI::App app("Trains the bridges of a composed model and prints the tokens per second.");
  app.option_defaults()->always_capture_default()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  Sizes augment{.width = 128, .blocks = 3, .heads = 4, .kv_heads = 0, .hidden = 344};
  Sizes anchor{.width = 128, .blocks = 4, .heads = 8, .kv_heads = 0, .hidden = 344};
  add_options(app, "augment", augment);
  add_options(app, "anchor", anchor);
  Options o;
  BatchShape shape;
  calm::Index vocabulary = 41;
  std::string anchor_file, augment_file, batches_file, write_file, products = "packed";
  int threads = 2;
  auto* from_file = app.add_option("--anchor-file", anchor_file, "a Llama or Gemma 3 in place of random weights");
  from_file->needs(app.add_option("--augment-file", augment_file, "and its augment"));
  app.add_option("--vocabulary", vocabulary, "ids of random batches are below it");
  app.add_option("--links", o.links, "augment:tap block>write block; the only augment is 0");
  app.add_option("--heads", o.heads, "of the bridges; the anchor's unless given");
  app.add_option("--batches", batches_file,
                 "JSON lines, one step a line: [{\"ids\": [5, 9, 2], \"completion\": 1}, ...]");
  app.add_option("--batch-count", shape.count, "random batches, where no file is given");
  app.add_option("--sequences", shape.sequences, "of a random batch");
  app.add_option("--shortest", shape.shortest, "tokens of a random sequence");
  app.add_option("--longest", shape.longest);
  app.add_option("--prompt", shape.prompt, "tokens of a random prompt");
  app.add_option("--longest-prompt", shape.longest_prompt);
  app.add_option("--write-batches", write_file, "writes the batches to this file, for the peer, and trains nothing");
  app.add_option("--products", products,
                 "frozen weights packed in f32, as they are stored, the same interleaved, or in bf16")
      ->check(CLI::IsMember(names_of_products));
  app.add_option("--threads", threads);
  app.add_option("--warm-up", o.warm_up, "steps that are not measured");
  app.add_option("--steps", o.steps, "that are measured");
  app.add_option("--seed", o.seed);
  app.add_flag("--keep-states", o.keep_states, "computes the states of the frozen models once for each batch");
  CLI11_PARSE(app, argc, argv);

  calm::require<calm::ConfigError>(shape.prompt > 0 && shape.longest_prompt >= shape.prompt &&
                                       shape.shortest > shape.longest_prompt && shape.longest >= shape.shortest,
                                   "a sequence must be longer than the longest prompt");
  const auto batches = batches_file.empty() ? random_batches(shape, vocabulary, o.seed) : read_batches(batches_file);
  calm::require<calm::ConfigError>(!batches.empty(), "there are no batches");
  if (!write_file.empty()) {
    write_batches(write_file, batches);
    return 0;
  }
  calm::require<calm::ConfigError>(o.steps > 0, "--steps must be positive, found ", o.steps);

  Ctx ctx(threads, products_named(products));
  if (!anchor_file.empty()) {
    measure_files(o, ctx, anchor_file, augment_file, batches);
    return 0;
  }
  measure(o, ctx,
          calm::compose(random_model(anchor, vocabulary, o.seed), o.parsed_links(), o.bridges(),
                        random_model(augment, vocabulary, o.seed + 1)),
          batches);
} catch (const std::exception& error) {
  std::cerr << "train_composed: " << error.what() << '\n';
  return 1;
}
