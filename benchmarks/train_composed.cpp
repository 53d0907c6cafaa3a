// train_composed: calm's side of the training benchmark beside peers/train_composed.py: the same composed model, the
// same batches, the same optimizer. Prints one JSON line; tokens_per_second is the median over the steps after the
// warm-up.
//
// Unless --keep-states is given, nothing is kept from step to step: the frozen models run anew for every batch, as they
// do in the peer.
#include <calm/calm.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <chrono>
#include <fstream>
#include <iostream>

namespace {

using Model = calm::Transformer<calm::zoo::Llama>;
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

/// Sequences of 20 to 48 tokens with prompts of 6 to 16, as long as those of the key-value task.
std::vector<Batch> random_batches(calm::Index count, calm::Index sequences, calm::Index vocabulary,
                                  std::uint64_t seed) {
  calm::Random random(seed, calm::stream_of("batches"));
  std::vector<Batch> batches(static_cast<std::size_t>(count));
  const auto draw = [&](calm::Index n) {
    std::vector<calm::TokenId> ids;
    for (calm::Index i = 0; i < n; ++i) ids.push_back(static_cast<calm::TokenId>(random.below(vocabulary)));
    return ids;
  };
  for (Batch& batch : batches)
    for (calm::Index i = 0; i < sequences; ++i) {
      const calm::Index length = 20 + random.below(29), prompt = 6 + random.below(11);
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

}  // namespace

int main(int argc, char** argv) try {
  CLI::App app("Trains the bridges of a composed model of random weights and prints the tokens per second.");
  app.option_defaults()->always_capture_default();
  Sizes augment{.width = 128, .blocks = 3, .heads = 4, .kv_heads = 0, .hidden = 344};
  Sizes anchor{.width = 128, .blocks = 4, .heads = 8, .kv_heads = 0, .hidden = 344};
  add_options(app, "augment", augment);
  add_options(app, "anchor", anchor);
  calm::Index vocabulary = 41, heads = 0, batch_count = 8, sequences = 128, warm_up = 5, steps = 30;
  std::string links = "0:1>2,0:2>3", batches_file, write_file;
  int threads = 2;
  bool keep_states = false;
  std::uint64_t seed = 0;
  app.add_option("--vocabulary", vocabulary);
  app.add_option("--links", links, "augment:tap block>write block; the only augment is 0");
  app.add_option("--heads", heads, "of the bridges; the anchor's unless given");
  app.add_option("--batches", batches_file,
                 "JSON lines, one step a line: [{\"ids\": [5, 9, 2], \"completion\": 1}, ...]");
  app.add_option("--batch-count", batch_count, "random batches, where no file is given");
  app.add_option("--sequences", sequences, "of a random batch");
  app.add_option("--write-batches", write_file, "writes the batches to this file, for the peer, and trains nothing");
  app.add_option("--threads", threads);
  app.add_option("--warm-up", warm_up, "steps that are not measured");
  app.add_option("--steps", steps, "that are measured");
  app.add_option("--seed", seed);
  app.add_flag("--keep-states", keep_states, "computes the states of the frozen models once for each batch");
  CLI11_PARSE(app, argc, argv);

  const auto batches =
      batches_file.empty() ? random_batches(batch_count, sequences, vocabulary, seed) : read_batches(batches_file);
  calm::require<calm::ConfigError>(!batches.empty(), "there are no batches");
  if (!write_file.empty()) {
    write_batches(write_file, batches);
    return 0;
  }
  calm::require<calm::ConfigError>(steps > 0, "--steps must be positive, found ", steps);

  calm::Context<calm::CpuBackend> ctx(threads);
  auto model =
      calm::compose(random_model(anchor, vocabulary, seed), calm::parse_links(links, "--links"),
                    {.heads = heads, .rotary = true, .seed = seed}, random_model(augment, vocabulary, seed + 1));
  calm::Trainer trainer(ctx, model, calm::CosineSchedule{.peak = 1e-4, .warmup = 0, .final_fraction = 1},
                        {.beta1 = 0.9, .beta2 = 0.98, .weight_decay = 0.01, .clip_norm = 1});
  const std::vector<calm::PackedBatch> packed(batches.begin(), batches.end());
  using Composed = decltype(model);
  std::vector<calm::KeptStates<Composed>> kept(packed.size());
  std::vector<double> rates, seconds;
  double loss = 0, tokens = 0;
  for (calm::Index step = 0; step < warm_up + steps; ++step) {
    const std::size_t i = static_cast<std::size_t>(step) % packed.size();
    const calm::TrainingBatch<Composed> batch{&packed[i], keep_states ? &kept[i] : nullptr};
    const auto start = std::chrono::steady_clock::now();
    const calm::StepResult result = trainer.step(std::span(&batch, 1));
    const double taken = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    loss = result.loss;
    if (step < warm_up) continue;
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
                              {"keep_states", keep_states},
                              {"threads", ctx.backend.pool().size()}}
            << '\n';
} catch (const std::exception& error) {
  std::cerr << "train_composed: " << error.what() << '\n';
  return 1;
}
