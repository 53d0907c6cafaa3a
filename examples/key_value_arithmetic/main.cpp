// The key-value arithmetic experiment: a model that knows a dictionary and a model that can calculate are composed by
// bridges that see a fifth of the keys. Prints the table of README.md.
#include "report.hpp"

#include <calm/io/adapter.hpp>

#include <CLI/CLI.hpp>
#include <iostream>

using namespace key_value;
namespace fs = std::filesystem;

namespace {

struct Options {
  fs::path models = "examples/key_value_arithmetic/models", out = "results/key_value";
  bool from_scratch = false, full = false, direct = false;
  Index keys = 1000, seeds = 0, items = 1000, steps = 420, batch = 64;
  double learning_rate = 3e-3, effort = 1;
  std::uint64_t seed = 1;
  int threads = 0;
};

Options parse_arguments(int argc, char** argv) {
  Options o;
  CLI::App app{
      "Key-value arithmetic: composes a model that knows a dictionary with one that can calculate.\n\n"
      "  key_value_arithmetic                   the demo: the main rows, one seed\n"
      "  key_value_arithmetic --full            all rows over 3 seeds\n"
      "  key_value_arithmetic --from-scratch    trains the two base models too\n"
      "  key_value_arithmetic --direct          answers without steps\n"};
  app.add_option("--models", o.models, "folder with the two base models")->capture_default_str();
  app.add_option("--out", o.out, "folder for the table, the picture, the models and the adapter")
      ->capture_default_str()
      ->take_last();  // demo.sh gives its own before the user's
  app.add_flag("--from-scratch", o.from_scratch,
               "train the base models instead of reading them, and compare them with --models");
  app.add_flag("--full", o.full, "all rows, three seeds");
  app.add_flag("--direct", o.direct, "train and evaluate without steps: abc+de= -> 220");
  app.add_option("--seed", o.seed, "first seed of the bridges, their data and the evaluation")->capture_default_str();
  app.add_option("--seeds", o.seeds, "how many seeds, from --seed on; 0: three with --full, else one")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  app.add_option("--steps", o.steps, "optimizer steps of each trained row")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--batch", o.batch, "examples a step")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--learning-rate", o.learning_rate, "peak learning rate of the trained rows")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--items", o.items, "evaluation expressions a column")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--threads", o.threads, "threads; 0: one a core. The results do not depend on it")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  app.add_option("--effort", o.effort, "with --from-scratch: part of the base models' training steps")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 1.0));
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int status = app.exit(error);
    std::exit(status == 0 ? 0 : 2);
  }
  return o;
}

/// The base models, read or trained; both end in the folder of results.
struct Bases {
  BasePointer a, b;
};

Bases base_models(Ctx& ctx, const Options& o, const Dictionary& dictionary) {
  Bases bases;
  if (o.from_scratch) {
    bases = {train_key_value_model(ctx, dictionary, 1, o.effort), train_arithmetic_model(ctx, dictionary, 2, o.effort)};
  } else {
    bases = {std::make_shared<const BaseModel>(calm::load_model<BaseModel>(o.models / "m_A")),
             std::make_shared<const BaseModel>(calm::load_model<BaseModel>(o.models / "m_B"))};
  }
  calm::save_model(*bases.a, o.out / "models/m_A", calm::DType::bf16);
  calm::save_model(*bases.b, o.out / "models/m_B", calm::DType::bf16);
  if (o.from_scratch) {
    for (const char* name : {"m_A", "m_B"}) {
      const fs::path shipped = o.models / name / "model.safetensors",
                     made = o.out / "models" / name / "model.safetensors";
      if (!fs::exists(shipped)) continue;
      const bool same = calm::content_hash_of_file(shipped) == calm::content_hash_of_file(made);
      std::cout << name << (same ? ": the same file as the shipped one\n" : ": differs from the shipped one\n");
    }
  }
  return bases;
}

std::string without_equals(const std::string& text) { return text.substr(0, text.size() - 1); }

/// Fails where the training set of a seed's rows holds what is evaluated; the generators are built so that none does,
/// and this looks at every example that they make.
void check_splits(const Dictionary& dictionary, const EvaluationSets& sets, const Options& o, std::uint64_t seed) {
  std::set<std::string> evaluated;  // canonical, as numbers and as keys
  for (std::size_t c = 0; c < columns; ++c) {
    for (const Item& item : sets[c]) {
      evaluated.insert(canonical(parse(without_equals(item.values))));
      if (c != reworded && c != reworded_longer) evaluated.insert(canonical(parse(without_equals(item.prompt))));
    }
  }
  std::set<std::string> unseen(dictionary.unseen().begin(), dictionary.unseen().end());
  std::vector<Lesson> lessons{o.direct ? Lesson::direct : Lesson::chain};
  if (o.full && !o.direct) lessons.push_back(Lesson::substitution);
  for (const Lesson lesson : lessons) {
    const Task task = bridge_task(dictionary, lesson);
    for (Index step = 0; step < o.steps; ++step) {
      calm::Random random(seed, calm::stream_of("training") + static_cast<std::uint64_t>(step));
      for (Index i = 0; i < o.batch; ++i) {
        const calm::Example e = task(random);
        const std::string prompt = decode(e.prompt), text = prompt + decode(e.completion);
        std::string word;
        for (const char c : prompt + "=") {
          if ('a' <= c && c <= 'z') {
            word += c;
          } else {
            calm::require<calm::Error>(!unseen.contains(word), "the bridges' training holds the unseen key ", word,
                                       ": ", text);
            word.clear();
          }
        }
        for (std::size_t begin = 1; begin < text.size();) {
          const std::size_t end = std::min(text.find_first_of("=$", begin), text.size());
          const Expression piece = parse(std::string_view(text).substr(begin, end - begin));
          calm::require<calm::Error>(piece.operators.empty() || !evaluated.contains(canonical(piece)),
                                     "the bridges' training holds an order of the evaluated ", write(piece));
          begin = end + 1;
        }
      }
    }
  }
}

void run(const Options& o) {
  fs::create_directories(o.out);
  Ctx ctx(o.threads);
  const Dictionary dictionary(o.keys, 1, 1), other(o.keys, 1, 2);
  const Bases bases = base_models(ctx, o, dictionary);
  const BasePointer random_a = std::make_shared<const BaseModel>(bases.a->spec(), calm::RandomWeights{99, 0.05});
  const BasePointer other_a = o.full ? train_key_value_model(ctx, other, 1, o.effort) : nullptr;
  const Lesson lesson = o.direct ? Lesson::direct : Lesson::chain;
  const std::string kind = o.direct ? " (direct)" : " (chain)";

  std::vector<RowOverSeeds> rows;
  std::vector<std::unique_ptr<RowResult>> base_rows;  // of m_B, one a seed
  const Index seeds = o.seeds > 0 ? o.seeds : o.full ? 3 : 1;
  for (Index s = 0; s < seeds; ++s) {
    const std::uint64_t seed = o.seed + static_cast<std::uint64_t>(s);
    const EvaluationSets sets(dictionary, seed, o.items);
    check_splits(dictionary, sets, o, seed);
    const Experiment x{
        ctx,
        dictionary,
        sets,
        bases.a,
        bases.b,
        {.steps = o.steps, .batch = o.batch, .learning_rate = o.learning_rate, .warmup = 50, .seed = seed},
        s == 0 ? std::max<Index>(1, o.steps / 7) : 0,
        lesson};
    std::size_t next = 0;
    const auto add = [&](RowResult row) {
      std::cerr << row.name << ":";
      for (std::size_t c = 0; c < columns; ++c) std::cerr << ' ' << calm::fixed(row.score.percent(c), 1);
      std::cerr << '\n';
      if (next == rows.size()) rows.emplace_back();
      rows[next].runs.push_back(std::move(row));
      rows[next].base.push_back(base_rows.size() > static_cast<std::size_t>(s) ? &base_rows.back()->score : nullptr);
      ++next;
    };
    base_rows.push_back(std::make_unique<RowResult>(x.model_alone("Model-2 (m_B)", bases.b)));
    add(x.model_alone("Model-1 (m_A)", bases.a));
    add(*base_rows.back());
    Composed composed = x.compose_with(bases.a);
    add(x.trained("Composed" + kind, composed, lesson));
    if (s == 0) calm::save_adapter(composed, o.out / "adapter");
    if (o.full && !o.direct) add(x.composed("Composed (substitution only)", bases.a, Lesson::substitution));
    add(x.composed("Composed with a random m_A" + kind, random_a, lesson));
    if (o.full) add(x.composed("Composed with an m_A of another dictionary" + kind, other_a, lesson));
    add(x.cascade("Cascade"));
    if (o.full) add(x.gate("Gate" + kind));
    add(x.lora("m_B + LoRA" + kind));
    if (o.full) add(x.fully_tuned("m_B fully fine-tuned" + kind));
  }

  const calm::Table table = table_of(rows);
  calm::write_file_atomically(o.out / "table.txt", table.text());
  calm::write_file_atomically(o.out / "table.csv", table.csv());
  calm::write_file_atomically(o.out / "table.md", table.markdown());
  calm::write_file_atomically(o.out / "learning_curves.svg", curves_of(rows));
  std::cout << "\nKey-value arithmetic: " << o.keys << " keys (a reduction of the paper's 25,000), the bridges see "
            << dictionary.seen().size() << " of them.\nExact match in percent, greedy decoding, " << o.items
            << " expressions a cell, "
            << (seeds == 1 ? "[95 % interval]" : calm::message("mean +- standard deviation over ", seeds, " seeds"))
            << ".\n\n"
            << table.text() << "\nIn " << o.out.string()
            << ": table.txt, table.csv, table.md, learning_curves.svg, models/, adapter/\n";
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse_arguments(argc, argv);
  try {
    run(options);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "key_value_arithmetic: " << error.what() << '\n';
    return 1;
  }
}
