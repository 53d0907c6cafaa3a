// cost_curves: what composition costs against size, as measured curves: tokens per second against the context, the
// number of links, of augments and of threads, for training, for reading a prompt and for decoding. Writes cost.csv and
// a picture of each curve. Models of random weights: speed does not depend on what they know.
#include <calm/calm.hpp>
#include <calm/compose/any_augment.hpp>
#include <calm/evaluate/line_chart.hpp>
#include <calm/evaluate/progress.hpp>

#include <CLI/CLI.hpp>

#include <chrono>
#include <filesystem>
#include <functional>
#include <iostream>
#include <thread>

namespace {

using calm::Index;
using calm::TokenId;
using Ctx = calm::Context<calm::CpuBackend>;
using Model = calm::Transformer<calm::zoo::Llama>;
using Augment = calm::AnyAugment<Ctx>;
using Composed = calm::ComposedModel<Model, calm::AnyAugments<Ctx>>;
using Clock = std::chrono::steady_clock;

constexpr Index vocabulary = 4096, blocks = 16;

/// A point of a curve: what is composed, and the tokens in the context.
struct Setting {
  Index context = 512, links = 4, augments = 1;
  int threads = 1;
};

struct Options {
  std::filesystem::path out = "cost_curves";
  Index longest = 8192, repetitions = 3;
  int threads = 0;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Tokens per second of work() that handles so many.
template <class Work>
double rate(Index repetitions, Index tokens, const Work& work) {
  work();  // packs weights, grows arenas
  std::vector<double> all;
  for (Index i = 0; i < repetitions; ++i) {
    const auto start = Clock::now();
    work();
    all.push_back(static_cast<double>(tokens) / std::chrono::duration<double>(Clock::now() - start).count());
  }
  return median(std::move(all));
}

std::vector<TokenId> random_tokens(Index count, std::uint64_t seed) {
  calm::Random random(seed);
  std::vector<TokenId> ids;
  for (Index i = 0; i < count; ++i) ids.push_back(static_cast<TokenId>(random.below(vocabulary)));
  return ids;
}

/// The frozen models that all points share.
class Models {
 public:
  explicit Models(Index context) {
    const calm::ModelSpec large{.vocabulary = vocabulary,
                                .width = 256,
                                .hidden = 688,
                                .blocks = blocks,
                                .heads = {4, 4, 64},
                                .context = context + 1024};
    const calm::ModelSpec small{.vocabulary = vocabulary,
                                .width = 128,
                                .hidden = 344,
                                .blocks = blocks,
                                .heads = {4, 4, 32},
                                .context = context + 1024};
    anchor = std::make_shared<const Model>(large, calm::RandomWeights{.seed = 1});
    for (std::uint64_t seed = 2; seed < 6; ++seed)
      augments.push_back(
          std::make_shared<const Augment>(std::make_shared<const Model>(small, calm::RandomWeights{.seed = seed})));
  }

  /// `links` of each augment, evenly spaced.
  Composed compose(const Setting& setting) const {
    std::vector<calm::Link> links;
    for (Index a = 0; a < setting.augments; ++a)
      for (Index i = 1; i <= setting.links; ++i) {
        const Index block = i * blocks / setting.links - 1;
        links.push_back({a, block, block});
      }
    return Composed(anchor, {augments.begin(), augments.begin() + setting.augments}, calm::Links(std::move(links)));
  }

  std::shared_ptr<const Model> anchor;
  std::vector<std::shared_ptr<const Augment>> augments;
};

/// The three rates of a point; the anchor alone does not train.
struct Rates {
  double training, prompt, decoding;
};

template <class M>
void measure_inference(const Options& o, const M& model, const Setting& setting, Rates& rates) {
  Ctx ctx(setting.threads);
  constexpr Index new_tokens = 16;
  auto session = model.make_session(ctx, 1, setting.context + new_tokens * (o.repetitions + 2));
  const auto ids = random_tokens(setting.context, 7);
  const Index slots[] = {0};
  const auto advance = [&](std::span<const TokenId> tokens, Index prompt) {
    ctx.arena.reset();
    const Index offsets[] = {0, static_cast<Index>(tokens.size())}, lengths[] = {prompt};
    calm::next_logits(ctx, model, session, {tokens, offsets, lengths, slots});
  };
  rates.prompt = rate(o.repetitions, setting.context, [&] {
    session.clear(0);
    advance(ids, setting.context);
  });
  rates.decoding = rate(o.repetitions, new_tokens, [&] {
    for (Index t = 0; t < new_tokens; ++t) advance(std::span(ids).subspan(static_cast<std::size_t>(t), 1), 0);
  });
}

Rates measure(const Options& o, const Models& models, const Setting& setting) {
  Rates rates{};
  Composed model = models.compose(setting);
  measure_inference(o, model, setting, rates);
  Ctx ctx(setting.threads);
  calm::Trainer trainer(ctx, model, calm::CosineSchedule{.peak = 1e-4, .warmup = 0, .final_fraction = 1});
  std::vector<calm::Example> examples;
  const Index sequences = std::max<Index>(1, 2048 / setting.context), half = setting.context / 2;
  for (Index i = 0; i < sequences; ++i) {
    const auto seed = static_cast<std::uint64_t>(i);
    examples.push_back({random_tokens(half, seed), random_tokens(setting.context - half, 1000 + seed)});
  }
  const calm::PackedBatch packed(examples);
  const calm::TrainingBatch<Composed> batch{&packed, nullptr};
  rates.training = rate(o.repetitions, sequences * setting.context, [&] { trainer.step(std::span(&batch, 1)); });
  return rates;
}

/// One axis: its name in files, what it counts, and the settings along it.
struct Axis {
  std::string name, label;
  std::vector<std::pair<Index, Setting>> points;
};

std::vector<Axis> axes_of(const Options& o) {
  const Setting usual{.threads = o.threads};
  std::vector<Axis> axes{{"context", "tokens in the context", {}},
                         {"links", "links", {}},
                         {"augments", "augments, with 4 links each", {}},
                         {"threads", "threads", {}}};
  const auto add = [&](std::size_t axis, Index value, auto member) {
    Setting setting = usual;
    setting.*member = static_cast<std::remove_reference_t<decltype(setting.*member)>>(value);
    axes[axis].points.emplace_back(value, setting);
  };
  for (Index context = 128; context <= o.longest; context *= 2) add(0, context, &Setting::context);
  for (Index links = 1; links <= blocks; links *= 2) add(1, links, &Setting::links);
  for (Index augments = 1; augments <= 4; ++augments) add(2, augments, &Setting::augments);
  for (Index threads = 1; threads <= o.threads; ++threads) add(3, threads, &Setting::threads);
  return axes;
}

void run(const Options& o) {
  const Models models(o.longest);
  const auto axes = axes_of(o);
  calm::Table table({"axis", "value", "model", "training, tokens/s", "prompt, tokens/s", "decoding, tokens/s"});
  Index points = 0, done = 0;
  for (const Axis& axis : axes) points += std::ssize(axis.points);
  calm::Progress progress("cost curves", points + std::ssize(axes[0].points));
  std::filesystem::create_directories(o.out);
  for (const Axis& axis : axes) {
    std::vector<calm::LineChart::Point> training, prompt, decoding, prompt_alone, decoding_alone;
    for (const auto& [value, setting] : axis.points) {
      const Rates rates = measure(o, models, setting);
      const auto x = static_cast<double>(value);
      training.push_back({x, rates.training});
      prompt.push_back({x, rates.prompt});
      decoding.push_back({x, rates.decoding});
      table.add_row({axis.name, std::to_string(value), "composed", calm::fixed(rates.training, 0),
                     calm::fixed(rates.prompt, 0), calm::fixed(rates.decoding, 1)});
      progress.update(++done);
      if (axis.name != "context") continue;
      Rates alone{};
      measure_inference(o, *models.anchor, setting, alone);
      prompt_alone.push_back({x, alone.prompt});
      decoding_alone.push_back({x, alone.decoding});
      table.add_row({axis.name, std::to_string(value), "anchor alone", "", calm::fixed(alone.prompt, 0),
                     calm::fixed(alone.decoding, 1)});
      progress.update(++done);
    }
    const auto draw = [&](const std::string& what, const std::string& title, auto&&... series) {
      calm::LineChart chart(title, axis.label, "tokens per second");
      chart.include_y(0, 1);
      (chart.add_series(series.first, series.second), ...);
      calm::write_file_atomically(o.out / (axis.name + "_" + what + ".svg"), chart.svg());
    };
    using Series = std::pair<std::string, std::vector<calm::LineChart::Point>>;
    draw("prompt", "Training and reading a prompt", Series("training", training), Series("prompt", prompt),
         Series("prompt, anchor alone", prompt_alone));
    draw("decoding", "Decoding", Series("decoding", decoding), Series("decoding, anchor alone", decoding_alone));
  }
  progress.finish();
  calm::write_file_atomically(o.out / "cost.csv", table.csv());
  std::cout << table.text() << "written: " << (o.out / "cost.csv").string() << " and a picture of each curve\n";
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app(
      "Measures what composition costs against context, links, augments and threads.\n"
      "Example: cost_curves --out curves");
  app.option_defaults()->always_capture_default();
  app.add_option("--out", o.out, "folder of cost.csv and the pictures");
  app.add_option("--longest", o.longest, "context")->check(CLI::Range(128, 1 << 17));
  app.add_option("--repetitions", o.repetitions, "the median counts")->check(CLI::PositiveNumber);
  app.add_option("--threads", o.threads, "at most; 0: one a core");
  CLI11_PARSE(app, argc, argv);
  if (o.threads == 0) o.threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  try {
    run(o);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "cost_curves: " << error.what() << '\n';
    return 1;
  }
}
