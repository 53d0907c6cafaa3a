// Expressions over keys or numbers, their written forms, their solution in steps, and the split that keeps evaluation
// apart from training.
#pragma once

#include "dictionary.hpp"
#include "text.hpp"

#include <calm/nn/parameter.hpp>
#include <calm/train/dataset.hpp>

namespace key_value {

using calm::Index;

/// term operators[0] term operators[1] ...; a term is a key or a number.
struct Expression {
  std::vector<std::string> terms;
  std::string operators;  // '+' and '-'
};

enum class Form : std::uint8_t {
  plain,      // 17+203-45
  infix,      // 17 plus 203 minus 45
  own_order,  // to 17 add 203 then take 45;  from 17 take 45
};

inline std::string write(const Expression& e, Form form = Form::plain) {
  const bool first_plus = e.operators.empty() || e.operators[0] == '+';
  std::string text = form == Form::own_order ? (first_plus ? "to " : "from ") + e.terms[0] : e.terms[0];
  for (std::size_t i = 0; i < e.operators.size(); ++i) {
    const bool plus = e.operators[i] == '+';
    if (form == Form::plain) text += e.operators[i];
    else if (form == Form::infix) text += plus ? " plus " : " minus ";
    else text += (i == 0 ? (plus ? " add " : " take ") : (plus ? " then add " : " then take "));
    text += e.terms[i + 1];
  }
  return text;
}

/// The first two operands replaced by their result: 17+203-45 -> 220-45.
inline Expression step(Expression e) {
  const Index a = std::stoll(e.terms[0]), b = std::stoll(e.terms[1]);
  e.terms.erase(e.terms.begin());
  e.terms[0] = std::to_string(e.operators[0] == '+' ? a + b : a - b);
  e.operators.erase(0, 1);
  return e;
}

/// All steps: 17+203-45 -> 220-45=175. One operand is its own solution.
inline std::string solve(Expression e) {
  if (e.operators.empty()) return e.terms[0];
  std::string steps;
  while (!e.operators.empty()) {
    e = step(e);
    steps += (steps.empty() ? "" : "=") + write(e);
  }
  return steps;
}

inline Expression substitute(Expression e, const Dictionary& dictionary) {
  for (std::string& term : e.terms) term = std::to_string(dictionary.value(term));
  return e;
}

/// The same for every order of the signed operands: 17-45 and -45+17 are one.
inline std::string canonical(const Expression& e) {
  std::vector<std::string> signed_terms;
  for (std::size_t i = 0; i < e.terms.size(); ++i) {
    const bool negative = e.terms[i].starts_with('-'), subtracted = i > 0 && e.operators[i - 1] == '-';
    signed_terms.push_back((negative != subtracted ? "-" : "+") + e.terms[i].substr(negative ? 1 : 0));
  }
  std::sort(signed_terms.begin(), signed_terms.end());
  std::string text;
  for (const std::string& term : signed_terms) text += term;
  return text;
}

/// The expression that a plain text such as -17+abc-45 stands for; a sign before the first term belongs to it.
inline Expression parse(std::string_view text) {
  Expression e{{""}, ""};
  for (std::size_t i = 0; i < text.size(); ++i) {
    if ((text[i] == '+' || text[i] == '-') && i > 0) {
      e.operators += text[i];
      e.terms.emplace_back();
    } else {
      e.terms.back() += text[i];
    }
  }
  return e;
}

/// Whether an expression of several operands is kept for evaluation: one in sixteen, by the hash of its canonical form,
/// so that every seed and every training set agree about it.
inline bool kept_for_evaluation(const Expression& e) {
  return !e.operators.empty() &&
         calm::philox4x32({static_cast<std::uint32_t>(calm::stream_of(canonical(e))), 0, 0, 0}, {1, 2})[0] % 16 == 0;
}

/// Whether an expression on numbers, or one that its solution passes through, is kept for evaluation.
inline bool touches_evaluation(Expression e) {
  for (; !e.operators.empty(); e = step(e))
    if (kept_for_evaluation(e)) return true;
  return false;
}

}  // namespace key_value
