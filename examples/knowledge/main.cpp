// Knowledge that a frozen language model gets without being touched: a small specialist learns a directory by heart,
// and bridges that see a fifth of it let the anchor answer from all of it. README.md says what comes out.
#include "rows.hpp"

#include <calm/backend/cpu_bf16.hpp>
#include <calm/backend/cpu_stored.hpp>
#include <calm/io/adapter.hpp>
#include <calm/io/pretrained.hpp>

#include <CLI/CLI.hpp>

#include <ctime>
#include <iostream>

using namespace knowledge;
namespace fs = std::filesystem;

namespace {

struct Options {
  fs::path anchor = "models/SmolLM2-135M-Instruct.Q4_1.gguf", out = "results/knowledge",
           names = "/usr/share/iso-codes/json", facts;
  SpecialistPlan specialist;
  std::string tokenizer = "anchor", links = "0:2>22,0:3>26,0:3>29", compute = "bf16";
  bool quick = false, full = false, tuned = false, real = false;
  Index entities = 0, letters = 0, variants = 0, epochs = 3, own_words = 0, items = 0, changes = 500, threads = 0;
  std::uint64_t seed = 1;
};

Options parse_arguments(int argc, char** argv) {
  Options o;
  CLI::App app{
      "Knowledge: a frozen language model answers from a small specialist.\n\n"
      "  knowledge                              a directory of 5,000 entities: the main rows\n"
      "  knowledge --quick                      of 800 entities\n"
      "  knowledge --full                       all rows\n"
      "  knowledge --real                       countries, currencies and scripts with the numbers and codes they "
      "have\n"
      "  knowledge --tokenizer bytes            a specialist that reads bytes\n"
      "  knowledge --facts facts.jsonl          facts of your own: {\"prompt\": ..., \"completion\": ...} a line\n"};
  app.add_option("--anchor", o.anchor, "a Llama: folder or .gguf file; see examples/fetch_models.sh")
      ->capture_default_str();
  app.add_option("--out", o.out, "folder for the specialist, the adapter and the table")
      ->capture_default_str()
      ->take_last();  // knowledge.sh gives its own before the user's
  app.add_option("--names", o.names, "folder of iso-codes")->capture_default_str();
  app.add_option("--facts", o.facts, "learn these facts instead of the directory, and write specialist and adapter");
  app.add_option("--tokenizer", o.tokenizer, "of the specialist: the anchor's, or bytes")
      ->capture_default_str()
      ->check(CLI::IsMember({"anchor", "bytes"}));
  app.add_option("--links", o.links, "augment:tap block>write block")->capture_default_str();
  app.add_flag("--quick", o.quick, "fewer entities, lessons and questions");
  app.add_flag("--full", o.full, "all rows");
  app.add_flag("--tuned", o.tuned, "rows of the anchor tuned, by LoRA and in full; part of --full");
  app.add_flag("--real", o.real, "facts of iso-codes, which the anchor may know or guess");
  app.add_option("--entities", o.entities, "in the directory; 0: 5,000, 800 with --quick");
  app.add_option("--letters", o.letters, "that codes are made of; 0: 26, 10 with --quick")->check(CLI::Range(0, 26));
  app.add_option("--lessons", o.specialist.epochs, "of the specialist about each fact")->capture_default_str();
  app.add_option("--width", o.specialist.width, "of the specialist")->capture_default_str();
  app.add_option("--hidden", o.specialist.hidden, "of the specialist's MLP")->capture_default_str();
  app.add_option("--blocks", o.specialist.blocks, "of the specialist")->capture_default_str();
  app.add_option("--variants", o.variants,
                 "questions of each kind about each seen entity for the bridges; 0: fewer where more are seen");
  app.add_option("--epochs", o.epochs, "how often the bridges go through them")->capture_default_str();
  app.add_option("--own-words", o.own_words, "texts that the anchor writes for the bridges; 0: 512, 256 with --quick");
  app.add_option("--changes", o.changes, "entities whose facts change for the swap")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--items", o.items, "questions a column; 0: 200, 100 with --quick");
  app.add_option("--seed", o.seed, "of the directory, the specialist, the bridges and the questions")
      ->capture_default_str();
  app.add_option("--compute", o.compute, "arithmetic of products; f32 is quicker on processors without AVX512-BF16")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "bf16"}));
  app.add_option("--threads", o.threads, "0: one a core; results do not depend on it")->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int status = app.exit(error);
    std::exit(status == 0 ? 0 : 2);
  }
  if (o.entities == 0) o.entities = o.quick ? 800 : 5000;
  if (o.letters == 0) o.letters = o.quick ? 10 : 26;
  if (o.items == 0) o.items = o.quick ? 100 : 200;
  if (o.variants == 0) o.variants = std::clamp<Index>(4000 / o.entities, 1, 3);
  if (o.own_words == 0) o.own_words = o.quick ? 256 : 512;
  return o;
}

Ctx context_of(const Options& o) {
  const int threads = static_cast<int>(o.threads);
  return Ctx(threads, o.compute == "bf16" ? calm::bf16_products : calm::interleaved_products);
}

Anchor open_anchor(const fs::path& path) {
  calm::require<calm::IoError>(fs::exists(path), path.string(),
                               ": there is no such model; examples/fetch_models.sh gets one");
  return {calm::Pretrained(path).open_as<Base>(), std::make_shared<const calm::Tokenizer>(calm::open_tokenizer(path))};
}

/// The tokenizer of the specialist; one of its own is written into the specialist's folder.
Specialist without_model(const Options& o, const Anchor& anchor, const fs::path& folder) {
  if (o.tokenizer == "anchor") return {nullptr, anchor.tokenizer, false};
  write_byte_tokenizer(folder);
  return {nullptr, std::make_shared<const calm::Tokenizer>(calm::open_tokenizer(folder)), true};
}

constexpr std::size_t bytes_to_keep = std::size_t{2} << 30;

/// Goes through the same batches several times: what lies below the lowest link, three quarters of the forward work, is
/// computed the first time alone.
template <class Model>
TrainingCost train_over(Ctx& ctx, Model& model, const std::string& name, const calm::PackedDataset& data,
                        calm::DatasetBatches<Model>& batches, const BridgePlan& plan, double learning_rate) {
  const Index steps = plan.epochs * data.size();
  return examples::train<Model>(ctx, model, name,
                                {.peak = learning_rate, .warmup = std::min<Index>(20, steps / 5), .steps = steps}, {},
                                std::ref(batches));
}

template <class Model>
TrainingCost train_on(Ctx& ctx, Model& model, const std::string& name, std::span<const calm::Example> examples,
                      const BridgePlan& plan, double learning_rate) {
  const calm::PackedDataset data(examples, plan.batch_tokens, plan.seed);
  calm::DatasetBatches<Model> batches(data, 1, bytes_to_keep);
  return train_over(ctx, model, name, data, batches, plan, learning_rate);
}

/// Makes what was kept for another augment over the same anchor serve this one: the anchor's part stays.
void read_anew(Ctx& ctx, const Composed& model, calm::DatasetBatches<Composed>& batches) {
  batches.for_each_kept([&](const calm::PackedBatch& batch, calm::KeptStates<Composed>& kept) {
    ctx.arena.reset();
    model.prepare_augments(ctx, batch.tokens(), kept.states);
  });
}

std::vector<calm::Example> with_own_words(const Anchor& anchor, std::span<const TextExample> questions,
                                          std::span<const calm::Example> own) {
  std::vector<calm::Example> examples = examples_of(*anchor.tokenizer, questions, true);
  examples.insert(examples.end(), own.begin(), own.end());
  return examples;
}

void save_bridges(const Options& o, const Composed& model, const Anchor& anchor, const Specialist& specialist) {
  const std::string own = specialist.own_tokenizer ? specialist.tokenizer->identity() : "";
  calm::save_adapter(
      model, o.out / "adapter",
      {calm::describe(*anchor.model, anchor.tokenizer->identity()), calm::describe(*specialist.model, own)},
      specialist.own_tokenizer ? "bytes" : "identity");
}

BridgePlan bridge_plan(const Options& o) {
  return {.links = calm::parse_links(o.links, "--links"), .epochs = o.epochs, .seed = o.seed};
}

/// As a shell reads it back.
std::string quoted(const std::string& text) {
  std::string result = "'";
  for (const char c : text) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return result + "'";
}

std::string how_to_ask(const Options& o, const std::string& prompt) {
  return "Ask it:\n  calm generate --anchor " + quoted(o.anchor.string()) + " --augment " +
         quoted((o.out / "specialist").string()) + " --adapter " + quoted((o.out / "adapter").string()) + " --prompt " +
         quoted(prompt) + "\n";
}

/// The fact, one time in three behind a line of random words.
TextExample among_words(TextExample fact, const std::vector<std::string>& words, calm::Random& random) {
  if (random.below(3) == 0)
    for (Index n = random.below(10); n >= 0; --n) fact.prompt.insert(0, any_of(words, random) + (n == 0 ? "\n" : " "));
  return fact;
}

/// Facts of the user's own. All of them teach the specialist; a fifth, at least a thousand, the bridges.
void learn_facts(const Options& o) {
  Ctx ctx = context_of(o);
  const Anchor anchor = open_anchor(o.anchor);
  std::vector<TextExample> facts = calm::read_text_examples(o.facts);
  for (TextExample& fact : facts)
    if (!fact.completion.starts_with(' ') && !fact.prompt.ends_with('\n') && !fact.prompt.ends_with(' '))
      fact.completion.insert(0, " ");
  const std::vector<std::string> words = words_of(*anchor.tokenizer);
  Specialist specialist = without_model(o, anchor, o.out / "specialist");
  const Curriculum curriculum{static_cast<Index>(facts.size()),
                              [&](Index i, double, calm::Random& random) {
                                return example_of(*specialist.tokenizer,
                                                  among_words(facts[static_cast<std::size_t>(i)], words, random));
                              },
                              {}};
  SpecialistPlan plan = o.specialist;
  plan.epochs = std::max<Index>(plan.epochs, 60000 / static_cast<Index>(facts.size()));
  plan.seed = o.seed;
  TrainingCost cost;
  specialist.model =
      teach(ctx, "specialist", fresh_specialist(anchor, *specialist.tokenizer, specialist.own_tokenizer, plan),
            specialist.own_tokenizer, curriculum, plan, cost);
  calm::save_model(*specialist.model, o.out / "specialist");
  std::vector<TextExample> questions;
  calm::Random random(o.seed, calm::stream_of("bridges"));
  std::vector<TextExample> order = facts;
  shuffle(order, random);
  order.resize(std::min(order.size(), std::max<std::size_t>(1000, order.size() / 5)));
  for (std::size_t i = 0; i < std::max<std::size_t>(1000, order.size()); ++i) {
    questions.push_back(among_words(order[i % order.size()], words, random));
    if (random.below(5) == 0)
      questions.push_back(in_context(any_of(words, random) + " " + any_of(words, random), any_of(attributes, random),
                                     any_of(trained_phrasings, random), random));
  }
  const BridgePlan bridges = bridge_plan(o);
  const auto own = own_words(ctx, anchor, words, o.own_words, o.seed);
  Composed model = compose(anchor, specialist, bridges);
  train_on(ctx, model, "bridges", with_own_words(anchor, questions, own), bridges, bridges.learning_rate);
  save_bridges(o, model, anchor, specialist);
  const auto asked_of = std::span(facts).first(std::min<std::size_t>(200, facts.size()));
  const auto answers = examples_of(*anchor.tokenizer, asked_of, true);
  std::cout << facts.size() << " facts; right, of the first " << answers.size() << ": "
            << percent_right(calm::greedy_matches(ctx, model, std::span<const calm::Example>(answers))) << " percent\n"
            << how_to_ask(o, facts[0].prompt);
}

void run_experiment(const Options& o) {
  const auto start = std::chrono::steady_clock::now();
  Ctx ctx = context_of(o);
  const Anchor anchor = open_anchor(o.anchor);
  const std::vector<std::string> names = iso_names(o.names);
  const Directory directory =
      o.real ? Directory(real_entities(o.names), names, o.seed) : Directory(names, o.entities, o.seed, o.letters);
  const auto columns =
      columns_of(directory, {.items = o.items, .derived_items = std::max<Index>(20, o.items / 4), .seed = o.seed});
  const std::string english = english_text(o.quick ? 3000 : 6000);
  const std::vector<std::string> words = words_of(*anchor.tokenizer);
  const Surroundings around(directory, words);
  std::vector<Row> rows;
  const auto save = [&](Row row) {
    row.peak_megabytes = peak_megabytes();
    forget_peak();
    rows.push_back(std::move(row));
    const calm::Table table = table_of(columns, rows);
    calm::write_file_atomically(o.out / "table.txt", table.text());
    calm::write_file_atomically(o.out / "table.csv", table.csv());
    calm::write_file_atomically(o.out / "table.md", table.markdown());
  };
  const auto add = [&](const std::string& name, const auto& model, bool look_up, const TrainingCost& cost) {
    save({name, answers_of(ctx, model, *anchor.tokenizer, columns, look_up, name),
          look_up ? std::nan("") : nats_per_byte(ctx, model, *anchor.tokenizer, english), cost});
  };
  calm::make_folder(o.out);

  SpecialistPlan plan = o.specialist;
  plan.seed = o.seed;
  Specialist specialist = without_model(o, anchor, o.out / "specialist");
  const SpecialistStart fresh = fresh_specialist(anchor, *specialist.tokenizer, specialist.own_tokenizer, plan);
  const auto taught = [&](const std::string& name, const SpecialistStart& from, const Curriculum& curriculum,
                          const SpecialistPlan& how, TrainingCost& cost) {
    return teach(ctx, name, from, specialist.own_tokenizer, curriculum, how, cost);
  };
  const auto specialist_row = [&](const std::string& name, const BasePointer& model, const TrainingCost& cost) {
    const std::span direct_columns = std::span(columns).first(5);
    if (specialist.own_tokenizer) {
      save({name, answers_of(ctx, *model, *specialist.tokenizer, direct_columns, false, name), std::nan(""), cost});
      return;
    }
    std::set<TokenId> tokens;  // among the tokens that answers are made of, as it was taught
    for (const Entity& e : directory.entities)
      for (const Attribute a : attributes)
        for (const TokenId id : encode(*specialist.tokenizer, " " + e.value(a), false)) tokens.insert(id);
    const Student student(Student::Model(model->spec(), calm::weights_of(*model)), {tokens.begin(), tokens.end()});
    save({name,
          answers_of(ctx, student, *specialist.tokenizer, direct_columns, false, name,
                     [&](calm::Example e) { return student.with_candidates(std::move(e)); }),
          std::nan(""), cost});
  };

  forget_peak();
  TrainingCost cost;
  specialist.model = taught("specialist", fresh, curriculum_of(directory, around, specialist.tokenizer), plan, cost);
  calm::save_model(*specialist.model, o.out / "specialist");
  specialist_row("Specialist", specialist.model, cost);

  const auto own = own_words(ctx, anchor, words, o.own_words, o.seed);
  const auto examples = with_own_words(anchor, bridge_questions(directory, o.variants, o.seed), own);
  const BridgePlan bridges = bridge_plan(o);
  Composed model = compose(anchor, specialist, bridges);
  {
    const calm::PackedDataset data(examples, bridges.batch_tokens, bridges.seed);
    calm::DatasetBatches<Composed> batches(data, 1, bytes_to_keep);
    cost = train_over(ctx, model, "bridges", data, batches, bridges, bridges.learning_rate);
    save_bridges(o, model, anchor, specialist);
    add("Composed", model, false, cost);
    const auto control = [&](const std::string& name, const BasePointer& augment) {
      Specialist other = specialist;
      other.model = augment;
      Composed composed = compose(anchor, other, bridges);
      read_anew(ctx, composed, batches);
      cost = train_over(ctx, composed, name, data, batches, bridges, bridges.learning_rate);
      add("Composed with " + name, composed, false, cost);
    };
    control("a random augment",
            std::make_shared<const Base>(fresh.spec, [&](const std::string& name, Index rows_, Index cols) {
              return name == embedding_name ? fresh.weights(name, rows_, cols)
                                            : calm::RandomWeights{o.seed + 77}(name, rows_, cols);
            }));
    if (o.full) {
      const Directory elsewhere = directory.with_other_values(o.seed + 1);
      const Surroundings around_other(elsewhere, words);
      control("a specialist of another directory",
              taught("specialist of another directory", fresh,
                     curriculum_of(elsewhere, around_other, specialist.tokenizer), plan, cost));
    }
  }
  add("Anchor", *anchor.model, false, {});
  add("Anchor, the fact looked up and put into the prompt", *anchor.model, true, {});

  if (!o.real) {  // the specialist is taught changed facts; the bridges stay as they are
    const Index changes = std::min(o.changes, directory.size() / 5);
    const Directory changed = directory.with_changes(changes, o.seed);
    Curriculum again = curriculum_of(changed, around, specialist.tokenizer);
    const Index first = changed.seen * 2, count = changes * 2;
    for (Index i = first; i < first + count; ++i) again.changed.push_back(i);
    const auto lesson = again.lesson;
    again.lesson = [lesson](Index fact, double, calm::Random& random) { return lesson(fact, 0.8, random); };
    SpecialistPlan short_plan = plan;
    short_plan.growing = 0;
    short_plan.epochs = std::max<Index>(1, plan.epochs * 2 / 5);
    short_plan.learning_rate = plan.learning_rate / 2;
    Specialist swapped = specialist;
    swapped.model = taught("changed facts", {fresh.spec, calm::weights_of(*specialist.model)}, again, short_plan, cost);
    Composed with_swapped = compose(anchor, swapped, bridges);
    calm::load_adapter_weights(with_swapped, o.out / "adapter", calm::read_adapter_config(o.out / "adapter"));
    const auto score = [&](const Composed& which, const std::string& name, std::span<const Entity> entities) {
      std::vector<Column> some{{name, {}, {}}};
      calm::Random random(o.seed, calm::stream_of(name));
      for (Index i = 0; i < o.items; ++i)
        some[0].questions.push_back(direct(any_of(entities, random), attributes[static_cast<std::size_t>(i) % 2],
                                           any_of(trained_phrasings, random)));
      return percent_right(answers_of(ctx, which, *anchor.tokenizer, some, false, name)[0]);
    };
    const auto unseen = changed.unseen_entities();
    const auto half = static_cast<std::size_t>(changes);
    const std::string text =
        calm::message("Swap: the specialist was taught ", changes, " entities with changed facts in ",
                      calm::fixed(cost.seconds, 0), " seconds; the bridges stayed. Right, percent: changed ",
                      score(with_swapped, "changed facts", unseen.first(half)), ", unchanged ",
                      score(with_swapped, "unchanged facts", unseen.subspan(half)), " (before the swap ",
                      score(model, "unchanged facts", unseen.subspan(half)), ").\n");
    calm::write_file_atomically(o.out / "swap.txt", text);
    std::cout << text;
    forget_peak();
  }

  if (o.full || o.tuned) {
    Directory all = directory;
    all.seen = all.size();
    const auto all_examples = with_own_words(anchor, bridge_questions(all, o.variants, o.seed), own);
    for (const bool everything : {false, true}) {
      const std::string what = everything ? ", all facts" : ", the bridges' questions";
      const auto& lessons = everything ? all_examples : examples;
      {
        auto lora = with_lora(anchor, calm::count_parameters(model), o.seed);
        cost = train_on(ctx, lora, "LoRA" + what, lessons, bridges, lora_learning_rate);
        add("LoRA" + what, lora, false, cost);
      }
      TrainedBase tuned(anchor.model->spec(), calm::weights_of(*anchor.model));
      cost = train_on(ctx, tuned, "full tuning" + what, lessons, bridges, full_learning_rate);
      add("Full tuning" + what, tuned, false, cost);
    }
  }
  std::cout << "\nA directory of " << directory.size() << " entities; the bridges saw " << directory.seen
            << ". Percent right [95 % interval], greedy.\n\n"
            << table_of(columns, rows).text() << "\n"
            << calm::fixed(examples::seconds_since(start) / 60, 1) << " minutes, of the processor "
            << calm::fixed(static_cast<double>(std::clock()) / CLOCKS_PER_SEC / 60, 1) << ". In " << o.out.string()
            << ": table.txt, table.csv, table.md, swap.txt, specialist/, adapter/\n"
            << how_to_ask(o, asked("What is the number of " + directory.entities.back().name + "?"));
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse_arguments(argc, argv);
  try {
    if (options.facts.empty()) run_experiment(options);
    else learn_facts(options);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "knowledge: " << error.what() << '\n';
    return 1;
  }
}
