// What each model is trained on, as random examples that keep clear of the evaluation split.
#pragma once

#include "expressions.hpp"

#include <functional>

namespace key_value {

/// A random example; the same random numbers give the same one.
using Task = std::function<calm::Example(calm::Random&)>;

inline calm::Example example(std::string_view prompt, std::string_view completion, bool ends = true) {
  calm::Example result{encode("^" + std::string(prompt)), encode(completion)};
  if (ends) result.completion.push_back(end_token);
  return result;
}

inline Index pick(calm::Random& random, const std::vector<double>& weights) {
  double total = 0;
  for (const double w : weights) total += w;
  double point = random.uniform() * total;
  std::size_t i = 0;
  while (i + 1 < weights.size() && point >= weights[i]) point -= weights[i++];
  return static_cast<Index>(i);
}

/// An expression of `operands` terms that term() draws.
template <class Term>
Expression random_expression(calm::Random& random, Index operands, const Term& term) {
  Expression e;
  for (Index i = 0; i < operands; ++i) {
    e.terms.push_back(term());
    if (i > 0) e.operators += random.below(2) == 0 ? '+' : '-';
  }
  return e;
}

inline Expression random_keys(calm::Random& random, Index operands, const std::vector<std::string>& keys) {
  return random_expression(
      random, operands, [&] { return keys[static_cast<std::size_t>(random.below(static_cast<Index>(keys.size())))]; });
}

/// Numbers from 1 to `largest`; a part `by_length` of them drawn by their number of digits, so that short ones occur.
inline Expression random_numbers(calm::Random& random, Index operands, Index largest, double by_length = 0) {
  const bool vary = random.uniform() < by_length;
  return random_expression(random, operands, [&] {
    Index limit = largest;
    if (vary)
      for (Index digits = random.below(3), power = 10; digits < 3; ++digits)
        limit = std::min(largest, limit / power + 1);
    return std::to_string(1 + random.below(limit));
  });
}

/// Draws again until the expression is for training.
template <class Draw, class Kept>
Expression for_training(const Draw& draw, const Kept& kept) {
  while (true) {
    Expression e = draw();
    if (!kept(e)) return e;
  }
}

/// Whether an expression on keys, or its image on numbers, is kept for evaluation.
inline bool keys_touch_evaluation(const Expression& e, const Dictionary& dictionary) {
  return kept_for_evaluation(e) || touches_evaluation(substitute(e, dictionary));
}

/// A word that is no key, nor a word of the reworded forms.
inline std::string unknown_word(calm::Random& random, const Dictionary& dictionary) {
  while (true) {
    std::string word = random_word(random);
    if (!dictionary.contains(word) && !reserved_words.contains(word)) return word;
  }
}

/// Unknown words in the shape of an expression, none of them a key.
inline std::string unknown_words(calm::Random& random, const Dictionary& dictionary, const Expression& like,
                                 Form form) {
  Expression words{{}, like.operators};
  while (words.terms.size() < like.terms.size()) words.terms.push_back(unknown_word(random, dictionary));
  return write(words, form);
}

/// The terms of an expression among unknown words: qzx abc vb ew de for abc+de.
inline std::string among_unknown_words(calm::Random& random, const Dictionary& dictionary, const Expression& e) {
  const auto words = [&](Index count) {
    std::string text;
    while (count-- > 0) text += unknown_word(random, dictionary) + " ";
    return text;
  };
  std::string text = words(random.below(2)) + e.terms[0];
  for (std::size_t i = 1; i < e.terms.size(); ++i) text += " " + words(1 + random.below(2)) + e.terms[i];
  return text;
}

/// Scores the characters of a completion for which known() holds, where the rest cannot be known from the prompt.
template <class Known>
void score_only(calm::Example& example, std::string_view completion, const Known& known) {
  for (std::size_t i = 0; i < completion.size(); ++i) example.scored[i] = known(completion[i]);
}

/// m_A's task: abc+de-fgh= -> 17+203-45=, over the given keys. In a part `among_words` of it unknown words stand where
/// the operators were: the values are to be written in their order, and what stands between them is not scored.
inline Task substitution(const Dictionary& dictionary, std::vector<std::string> keys,
                         std::vector<double> operand_weights, double among_words = 0) {
  return [&dictionary, keys = std::move(keys), operand_weights = std::move(operand_weights),
          among_words](calm::Random& random) {
    const Index operands = 1 + pick(random, operand_weights);
    const Expression e = for_training([&] { return random_keys(random, operands, keys); },
                                      [&](const Expression& x) { return keys_touch_evaluation(x, dictionary); });
    const std::string values = write(substitute(e, dictionary)) + "=";
    if (random.uniform() >= among_words) return example(write(e) + "=", values);
    calm::Example result = example(among_unknown_words(random, dictionary, e) + "=", values);
    result.scored.assign(result.completion.size(), true);
    score_only(result, values, [](char c) { return c != '+' && c != '-'; });
    return result;
  };
}

/// The parts of m_B's mixture.
struct ArithmeticMix {
  std::vector<double> operands;    // weights of 1, 2, ... operands
  double reworded = 0, words = 0;  // parts in other forms, and after unknown words
  double by_length = 0.3;          // part whose numbers are drawn by length
  double half_solved = 0.3;        // part whose first number is the result of earlier steps: negative, or large
  Index largest = 1000;
};

inline Form random_form(calm::Random& random) { return random.below(2) == 0 ? Form::infix : Form::own_order; }

/// m_B's tasks: 17+203-45= -> 220-45=175; reworded, the expression is written first: 17 plus 203= -> 17+203=220; and
/// after unknown words, qzx+ab=17+203= -> 220, so that it calculates wherever an expression stands.
inline Task arithmetic(const Dictionary& dictionary, const ArithmeticMix& mix) {
  return [&dictionary, mix](calm::Random& random) {
    const Index operands = 1 + pick(random, mix.operands);
    const Expression e = for_training(
        [&] {
          const bool half_solved = operands > 1 && random.uniform() < mix.half_solved;
          const Index solved = half_solved ? 1 + random.below(2) : 0;
          Expression drawn = random_numbers(random, operands + solved, mix.largest, mix.by_length);
          for (Index i = 0; i < solved; ++i) drawn = step(drawn);
          return drawn;
        },
        touches_evaluation);
    const double kind = random.uniform();
    if (operands > 1 && kind < mix.reworded)
      return example(write(e, random_form(random)) + "=", write(e) + "=" + solve(e));
    if (kind > 1 - mix.words) {
      const Form form = operands > 1 && random.below(2) == 0 ? random_form(random) : Form::plain;
      const std::string words = unknown_words(random, dictionary, e, form) + "=";
      calm::Example result = example(words, write(e) + "=" + solve(e));
      // The numbers of the expression cannot be known from the words: only the operators between them count.
      result.scored.assign(result.completion.size(), true);
      score_only(result, write(e) + "=", [](char c) { return c < '0' || c > '9'; });
      return result;
    }
    return example(write(e) + "=", solve(e));
  };
}

/// The examples of a training step: a function of seed and step alone.
inline std::vector<calm::Example> examples_of(const Task& task, std::uint64_t seed, Index step, Index count) {
  calm::Random random(seed, calm::stream_of("training") + static_cast<std::uint64_t>(step));
  std::vector<calm::Example> examples;
  for (Index i = 0; i < count; ++i) examples.push_back(task(random));
  return examples;
}

}  // namespace key_value
