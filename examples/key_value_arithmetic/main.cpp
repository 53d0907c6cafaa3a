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
  app.add_option("--effort", o.effort,
                 "part of the steps of base models that are trained: by --from-scratch, and, of another dictionary, by "
                 "--full")
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

std::string without_equals(const std::string& text) { return text.substr(0, text.size() - 1); }

/// The canonical forms of what any of the seeds evaluates, as numbers and as keys.
std::set<std::string> evaluated_forms(const std::vector<EvaluationSets>& seeds) {
  std::set<std::string> evaluated;
  for (const EvaluationSets& sets : seeds) {
    for (std::size_t c = 0; c < columns; ++c) {
      for (const Item& item : sets[c]) {
        evaluated.insert(canonical(parse(without_equals(item.values))));
        if (c != reworded && c != reworded_longer) evaluated.insert(canonical(parse(without_equals(item.prompt))));
      }
    }
  }
  return evaluated;
}

/// Fails where a training set holds what is evaluated, in any order, or one of the forbidden words. The generators are
/// built so that none does; this looks at every example that they make.
void check_training(const std::string& name, const TrainingPlan& plan, const TaskOfStep& task,
                    const std::set<std::string>& evaluated, const std::set<std::string>& forbidden) {
  for (Index step = 0; step < plan.steps; ++step) {
    for (const calm::Example& e : examples_of(task(step), plan.seed, step, plan.batch)) {
      const std::string prompt = decode(e.prompt), text = prompt + decode(e.completion);
      std::string word;
      for (const char c : prompt + "=") {
        if ('a' <= c && c <= 'z') {
          word += c;
        } else {
          calm::require<calm::Error>(!forbidden.contains(word), "the training of ", name, " holds the unseen key ",
                                     word, ": ", text);
          word.clear();
        }
      }
      for (std::size_t begin = 1; begin < text.size();) {
        const std::size_t end = std::min(text.find_first_of("=$", begin), text.size());
        const Expression piece = parse(std::string_view(text).substr(begin, end - begin));
        calm::require<calm::Error>(piece.operators.empty() || !evaluated.contains(canonical(piece)), "the training of ",
                                   name, " holds an order of the evaluated ", write(piece), ": ", text);
        begin = end + 1;
      }
    }
  }
}

/// The base models, read or trained; both end in the folder of results.
struct Bases {
  BasePointer a, b;
};

Bases base_models(Ctx& ctx, const Options& o, const Dictionary& dictionary, const std::set<std::string>& evaluated) {
  Bases bases;
  if (o.from_scratch) {
    const Course a = key_value_course(dictionary, 1, o.effort), b = arithmetic_course(dictionary, 2, o.effort);
    for (const Course* course : {&a, &b}) check_training(course->name, course->plan, course->task, evaluated, {});
    bases = {train_base(ctx, a), train_base(ctx, b)};
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

void run(const Options& o) {
  calm::make_folder(o.out);
  Ctx ctx(o.threads);
  const Dictionary dictionary(o.keys, 1, 1), other(o.keys, 1, 2);
  const Index seeds = o.seeds > 0 ? o.seeds : o.full ? 3 : 1;
  std::vector<EvaluationSets> evaluation;
  for (Index s = 0; s < seeds; ++s)
    evaluation.emplace_back(dictionary, o.seed + static_cast<std::uint64_t>(s), o.items);
  const std::set<std::string> evaluated = evaluated_forms(evaluation),
                              unseen(dictionary.unseen().begin(), dictionary.unseen().end());
  const Bases bases = base_models(ctx, o, dictionary, evaluated);
  const BasePointer random_a = std::make_shared<const BaseModel>(bases.a->spec(), calm::RandomWeights{99, 0.05});
  const BasePointer other_a = o.full ? train_base(ctx, key_value_course(other, 1, o.effort)) : nullptr;
  const Lesson lesson = o.direct ? Lesson::direct : Lesson::chain;
  const std::string kind = o.direct ? " (direct)" : " (chain)";

  std::vector<RowOverSeeds> rows;
  std::vector<std::unique_ptr<RowResult>> base_rows;  // of m_B, one a seed
  for (Index s = 0; s < seeds; ++s) {
    const TrainingPlan plan{.steps = o.steps,
                            .batch = o.batch,
                            .learning_rate = o.learning_rate,
                            .warmup = 50,
                            .seed = o.seed + static_cast<std::uint64_t>(s)};
    std::vector<Lesson> lessons{lesson};
    if (o.full && !o.direct) lessons.push_back(Lesson::substitution);
    for (const Lesson each : lessons) {
      const Task task = bridge_task(dictionary, each);
      check_training(
          "the bridges", plan, [&](Index) { return task; }, evaluated, unseen);
    }
    const Experiment x{ctx,     dictionary, evaluation[static_cast<std::size_t>(s)],      bases.a,
                       bases.b, plan,       s == 0 ? std::max<Index>(1, o.steps / 7) : 0, lesson};
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
