// The table's columns and rows: every row is scored on the same questions.
#pragma once

#include "composition.hpp"

#include <calm/evaluate/interval.hpp>
#include <calm/evaluate/table.hpp>

#include <fstream>

namespace knowledge {

/// A column: questions whose answers must come out as written, and the same with the fact put before the question.
struct Column {
  std::string name;
  std::vector<TextExample> questions, looked_up;
};

struct EvaluationPlan {
  Index items = 200, derived_items = 50, worked = 2;
  std::uint64_t seed = 1;
};

/// Entities that the bridges saw in the first two columns only; strangers in the last. Derived questions stand behind
/// worked ones in every row; the others do where the fact is looked up, which shows the anchor to answer by the fact
/// alone.
inline std::vector<Column> columns_of(const Directory& directory, const EvaluationPlan& plan) {
  std::vector<Column> columns;
  const auto strangers = directory.new_strangers();
  const auto add = [&](const std::string& name, Index count, const auto& draw) {
    Column column{name, {}, {}};
    calm::Random random(plan.seed, calm::stream_of(name));
    for (Index i = 0; i < count; ++i) draw(column, i, random);
    columns.push_back(std::move(column));
  };
  const auto put_direct = [&](Column& column, const Entity& e, Attribute a, const auto& phrasings,
                              calm::Random& random) {
    const auto ask = [&](const Entity& about, Index) { return direct(about, a, any_of(phrasings, random)); };
    const TextExample question = ask(e, 0);
    column.questions.push_back(question);
    column.looked_up.push_back(behind(worked(plan.worked, strangers, a, random, ask), after_fact(e, a, question)));
  };
  for (const bool seen : {true, false})
    for (const Attribute a : attributes)
      add((seen ? "seen, " : "unseen, ") + name_of(a), plan.items, [&](Column& column, Index, calm::Random& random) {
        put_direct(column, any_of(seen ? directory.seen_entities() : directory.unseen_entities(), random), a,
                   trained_phrasings, random);
      });
  add("new phrasings", plan.items, [&](Column& column, Index i, calm::Random& random) {
    put_direct(column, any_of(directory.unseen_entities(), random), attributes[static_cast<std::size_t>(i) % 2],
               new_phrasings, random);
  });
  for (const Skill skill : skills)
    add(name_of(skill), plan.derived_items, [&](Column& column, Index i, calm::Random& random) {
      const Entity& e = any_of(directory.unseen_entities(), random);
      const auto ask = [&](const Entity& about, Index n) { return derived(about, skill, n % 2 == 0, random); };
      const TextExample question = ask(e, i);
      const std::string before = worked(plan.worked, strangers, Attribute::code, random, ask);
      column.questions.push_back(behind(before, question));
      column.looked_up.push_back(behind(before, after_fact(e, Attribute::code, question)));
    });
  add("strangers", plan.items, [&](Column& column, Index i, calm::Random& random) {
    const TextExample question = in_context(any_of(strangers, random), attributes[static_cast<std::size_t>(i) % 2],
                                            any_of(new_phrasings, random), random);
    column.questions.push_back(question);
    column.looked_up.push_back(question);
  });
  return columns;
}

/// English of the system: the beginnings of the licences that Debian keeps.
inline std::string english_text(std::size_t bytes_each) {
  std::string all;
  for (const char* name : {"Apache-2.0", "Artistic", "GPL-3", "MPL-2.0"}) {
    std::ifstream file(std::filesystem::path("/usr/share/common-licenses") / name, std::ios::binary);
    std::string text(bytes_each, ' ');
    file.read(text.data(), static_cast<std::streamsize>(bytes_each));
    text.resize(static_cast<std::size_t>(file.gcount()));
    all += text;
  }
  return all;
}

struct Row {
  std::string name;
  std::vector<std::vector<bool>> right;  // [columns]; empty: not measured
  double nats_per_byte = std::numeric_limits<double>::quiet_NaN();
  TrainingCost cost;
  double peak_megabytes = 0;  // of the program while the row was made
};

/// Resident memory at its highest since forget_peak(), as Linux counts it.
inline double peak_megabytes() {
  std::ifstream file("/proc/self/status");
  for (std::string word; file >> word;)
    if (double kilobytes = 0; word == "VmHWM:" && file >> kilobytes) return kilobytes / 1024;
  return std::nan("");
}
inline void forget_peak() { std::ofstream("/proc/self/clear_refs") << "5"; }

inline Index count_right(const std::vector<bool>& right) {
  return static_cast<Index>(std::count(right.begin(), right.end(), true));
}
/// "93.5": the percentage of right answers.
inline std::string percent_right(const std::vector<bool>& right) {
  return calm::fixed(100.0 * static_cast<double>(count_right(right)) / static_cast<double>(right.size()), 1);
}

/// What a model answers in every column, by greedy decoding; an answer counts that begins as it should.
template <class Model>
std::vector<std::vector<bool>> answers_of(Ctx& ctx, const Model& model, const calm::Tokenizer& tokenizer,
                                          std::span<const Column> columns, bool look_up, const std::string& name,
                                          const std::function<calm::Example(calm::Example)>& convert = {}) {
  std::vector<std::vector<bool>> right;
  calm::Progress progress(name + ", questions", static_cast<Index>(columns.size()));
  for (const Column& column : columns) {
    auto examples = examples_of(tokenizer, look_up ? column.looked_up : column.questions, false);
    if (convert)
      for (calm::Example& example : examples) example = convert(std::move(example));
    right.push_back(calm::greedy_matches(ctx, model, std::span<const calm::Example>(examples)));
    progress.update(static_cast<Index>(right.size()));
  }
  return right;
}

template <class Model>
double nats_per_byte(Ctx& ctx, const Model& model, const calm::Tokenizer& tokenizer, const std::string& text) {
  const std::vector<TokenId> ids = encode(tokenizer, text, false);
  std::vector<calm::PackedBatch> batches;
  constexpr std::size_t piece = 256;
  double tokens = 0;
  for (std::size_t i = 0; i + 1 < ids.size(); i += piece) {
    const auto first = ids.begin() + static_cast<std::ptrdiff_t>(i);
    const auto last = ids.begin() + static_cast<std::ptrdiff_t>(std::min(ids.size(), i + piece));
    if (last - first < 2) break;
    calm::Example example{{*first}, {first + 1, last}};
    tokens += static_cast<double>(example.completion.size());
    batches.emplace_back(std::span(&example, 1));
  }
  if (batches.empty()) return std::numeric_limits<double>::quiet_NaN();
  return calm::mean_loss(ctx, model, std::span<const calm::PackedBatch>(batches)) * tokens /
         static_cast<double>(text.size());
}

inline calm::Table table_of(std::span<const Column> columns, const std::vector<Row>& rows) {
  std::vector<std::string> titles{""};
  for (const Column& column : columns) titles.push_back(column.name);
  for (const char* title : {"nats/byte, English", "trained parameters", "seconds", "tokens/s", "MB"})
    titles.emplace_back(title);
  calm::Table table(titles);
  for (const Row& row : rows) {
    std::vector<std::string> cells{row.name};
    for (std::size_t c = 0; c < columns.size(); ++c) {
      if (row.right.size() <= c || row.right[c].empty()) {
        cells.emplace_back("-");
        continue;
      }
      const auto& right = row.right[c];
      const auto interval = calm::wilson_interval(count_right(right), static_cast<Index>(right.size()));
      cells.push_back(calm::message(percent_right(right), " [", calm::fixed(100 * interval.low, 0), ", ",
                                    calm::fixed(100 * interval.high, 0), "]"));
    }
    cells.push_back(std::isnan(row.nats_per_byte) ? "-" : calm::fixed(row.nats_per_byte, 4));
    const bool trained = row.cost.seconds > 0;
    cells.push_back(trained ? std::to_string(row.cost.parameters) : "-");
    cells.push_back(trained ? calm::fixed(row.cost.seconds, 0) : "-");
    cells.push_back(trained ? calm::fixed(row.cost.tokens / row.cost.seconds, 0) : "-");
    cells.push_back(std::isnan(row.peak_megabytes) ? "-" : calm::fixed(row.peak_megabytes, 0));
    table.add_row(cells);
  }
  return table;
}

}  // namespace knowledge
