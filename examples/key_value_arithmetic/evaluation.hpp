// The evaluation sets of the table, one a column, and what a row scores on them: exact match, greedy decoding.
#pragma once

#include "tasks.hpp"

#include <calm/generate/generate.hpp>

#include <array>

namespace key_value {

struct Item {
  std::string prompt;
  std::string values;  // the expression on numbers, with its = sign
  std::string result;  // the final value
};

enum Column : std::uint8_t { key_value_column, numeric, seen_keys, unseen_keys, reworded, reworded_longer };
inline constexpr std::size_t columns = 6;
inline constexpr std::array<const char*, columns> column_names = {
    "Key-Value",   "Numeric Arithmetic",         "Keys Arithmetic, seen keys",
    "unseen keys", "OOD: unseen keys, reworded", "OOD-Hard: reworded, one operand more"};

/// `count` expressions a column, all from the evaluation split: 2 or 3 operands, in the last column 4.
class EvaluationSets {
 public:
  EvaluationSets(const Dictionary& dictionary, std::uint64_t seed, Index count) {
    for (std::size_t c = 0; c < columns; ++c) {
      calm::Random random(seed, calm::stream_of("evaluation") + c);
      while (static_cast<Index>(sets_[c].size()) < count)
        sets_[c].push_back(draw(dictionary, static_cast<Column>(c), random));
    }
  }

  const std::vector<Item>& operator[](std::size_t column) const { return sets_[column]; }

 private:
  static Item draw(const Dictionary& dictionary, Column column, calm::Random& random) {
    const Index operands = column == reworded_longer ? 4 : 2 + random.below(2);
    if (column == numeric) {
      while (true) {
        const Expression e = random_numbers(random, operands, dictionary.size());
        if (kept_for_evaluation(e)) return item(e, e, Form::plain);
      }
    }
    const auto& keys = column == key_value_column ? dictionary.keys()
                       : column == seen_keys      ? dictionary.seen()
                                                  : dictionary.unseen();
    const Form form = column == reworded || column == reworded_longer ? random_form(random) : Form::plain;
    while (true) {
      const Expression e = random_keys(random, operands, keys);
      if (kept_for_evaluation(e) && kept_for_evaluation(substitute(e, dictionary)))
        return item(e, substitute(e, dictionary), form);
    }
  }

  static Item item(const Expression& written, const Expression& numbers, Form form) {
    const std::string steps = solve(numbers);
    return {write(written, form) + "=", write(numbers) + "=", steps.substr(steps.rfind('=') + 1)};
  }

  std::array<std::vector<Item>, columns> sets_;
};

/// For each column and item whether the row got it right.
struct Score {
  std::array<std::vector<bool>, columns> right;

  double percent(std::size_t column) const {
    const auto& all = right[column];
    return all.empty() ? 0
                       : 100.0 * static_cast<double>(std::count(all.begin(), all.end(), true)) /
                             static_cast<double>(all.size());
  }
};

/// Whether an answer counts: in the first column the values that it writes first, else the value that it ends with.
inline bool is_right(const Item& item, std::size_t column, const std::string& answer, bool ended) {
  if (column == key_value_column) return answer.substr(0, answer.find('=') + 1) == item.values;
  return ended && answer.substr(answer.rfind('=') + 1) == item.result;
}

/// Greedy answers to prompts, without begin and end, and whether each ended by itself.
struct Answers {
  std::vector<std::string> texts;
  std::vector<bool> ended;
};

template <class Model, class Ctx>
Answers answer(Ctx& ctx, const Model& model, const std::vector<std::string>& prompts) {
  std::vector<std::vector<calm::TokenId>> tokens;
  for (const std::string& prompt : prompts) tokens.push_back(encode("^" + prompt));
  calm::GenerateOptions options;
  options.max_new_tokens = 72;
  options.end_tokens = {end_token};
  options.batch = 512;
  Answers answers;
  for (const calm::Generation& g :
       calm::generate(ctx, model, std::span<const std::vector<calm::TokenId>>(tokens), options)) {
    answers.texts.push_back(decode(g.ids));
    answers.ended.push_back(g.reason == calm::FinishReason::end_token);
  }
  return answers;
}

/// Scores answers(prompts) on every column.
template <class Answer>
Score score(const EvaluationSets& sets, const Answer& answers) {
  Score result;
  for (std::size_t c = 0; c < columns; ++c) {
    std::vector<std::string> prompts;
    for (const Item& item : sets[c]) prompts.push_back(item.prompt);
    const Answers given = answers(prompts);
    for (std::size_t i = 0; i < prompts.size(); ++i)
      result.right[c].push_back(is_right(sets[c][i], c, given.texts[i], given.ended[i]));
  }
  return result;
}

}  // namespace key_value
