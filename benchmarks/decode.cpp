// decode: tokens per second of calm while it generates, as llama.cpp's llama-bench measures it: one sequence from an
// empty context, random tokens, a forward pass and the logits of each; nothing is sampled. Prints one JSON line.
//
// With --augment a composed model: --links fresh default bridges, evenly spaced, over one stream of ids.
#include "measuring.hpp"

#include <calm/calm.hpp>
#include <calm/io/pretrained.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <chrono>
#include <iostream>

namespace {

using calm::Index;
using calm::TokenId;
using Ctx = calm::Context<calm::CpuBackend>;
using Clock = std::chrono::steady_clock;
using Architectures = calm::zoo::List<calm::zoo::Llama, calm::zoo::Gemma3>;

struct Options {
  std::string model, augment, products = "stored";
  int threads = 0;
  Index tokens = 128, warm_up = 8, links = 4, repetitions = 1, at_once = 1;
};

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

template <class Model>
double tokens_per_second(const Options& o, Ctx& ctx, const Model& model, Index vocabulary) {
  auto session = model.make_session(ctx, 1, std::max(o.tokens, o.warm_up) * o.at_once);
  calm::Random random(1, calm::stream_of("decode"));
  const auto run = [&](Index steps) {
    session.clear(0);
    const auto start = Clock::now();
    for (Index i = 0; i < steps; ++i) {
      ctx.arena.reset();
      std::vector<TokenId> ids;
      for (Index t = 0; t < o.at_once; ++t) ids.push_back(static_cast<TokenId>(random.below(vocabulary)));
      const Index offsets[] = {0, o.at_once}, lengths[] = {0}, slots[] = {0};
      calm::next_logits(ctx, model, session, {ids, offsets, lengths, slots});
    }
    return static_cast<double>(steps * o.at_once) / seconds_since(start);
  };
  run(o.warm_up);
  std::vector<double> all;
  for (Index r = 0; r < o.repetitions; ++r) all.push_back(run(o.tokens));
  std::sort(all.begin(), all.end());
  return all[all.size() / 2];
}

template <class Architecture>
double measure(const Options& o, Ctx& ctx, const calm::Pretrained& files) {
  using Anchor = calm::Transformer<Architecture>;
  const auto anchor = files.open_as<Anchor>();
  if (o.augment.empty()) return tokens_per_second(o, ctx, *anchor, files.spec().vocabulary);
  const calm::Pretrained augment_files(o.augment);
  return Architectures::visit(augment_files.model_type(), [&](auto augment_architecture) {
    using Augment = calm::Transformer<decltype(augment_architecture)>;
    const auto augment = augment_files.open_as<Augment>();
    const calm::ComposedModel<Anchor, Augment> model(anchor, {augment}, calm::links::evenly_spaced(o.links));
    return tokens_per_second(o, ctx, model, std::min(anchor->spec().vocabulary, augment->spec().vocabulary));
  });
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app("decode: tokens per second of a model, or of a composed one");
  app.add_option("--model", o.model, "a folder or a .gguf file; the anchor, where there is an augment")->required();
  app.add_option("--augment", o.augment);
  app.add_option("--links", o.links);
  app.add_option("--tokens", o.tokens, "steps that are timed");
  app.add_option("--at-once", o.at_once, "tokens of a step: a prompt is read so many at once");
  app.add_option("--warm-up", o.warm_up, "steps before them");
  app.add_option("--repetitions", o.repetitions, "the median counts");
  app.add_option("--threads", o.threads);
  app.add_option("--products", o.products, "with frozen weights as they are stored, the same interleaved, or packed")
      ->check(CLI::IsMember(names_of_products));
  CLI11_PARSE(app, argc, argv);
  try {
    Ctx ctx(o.threads, products_named(o.products));
    const calm::Pretrained files(o.model);
    const double speed = Architectures::visit(
        files.model_type(), [&](auto architecture) { return measure<decltype(architecture)>(o, ctx, files); });
    std::cout << nlohmann::json{{"tokens_per_second", speed},
                                {"tokens", o.tokens * o.at_once},
                                {"at_once", o.at_once},
                                {"products", o.products},
                                {"peak_resident_mb", peak_resident_mb()},
                                {"threads", ctx.backend.pool().size()}}
              << '\n';
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "decode: " << error.what() << '\n';
    return 1;
  }
}
