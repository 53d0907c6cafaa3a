// How the directory is asked for: phrasings, what stands around them, and answers that need more than the fact.
#pragma once

#include "directory.hpp"

#include <calm/io/text_data.hpp>

#include <array>
#include <string_view>

namespace knowledge {

using calm::TextExample;

/// {a}: number or code, {n}: the name.
inline constexpr std::array trained_phrasings{"What is the {a} of {n}?", "Give the {a} of {n}.",
                                              "Which {a} does {n} have?", "Tell me the {a} of {n}.",
                                              "{n}: what is its {a}?"};

/// Neither the specialist nor the bridges ever meet these.
inline constexpr std::array new_phrasings{"I need the {a} that we keep for {n}, please.",
                                          "Could you look up {n} and say its {a}?",
                                          "Someone asked me today for the {a} belonging to {n}."};

inline std::string fill(std::string_view pattern, const std::string& name, const std::string& attribute) {
  std::string text(pattern);
  for (const auto& [mark, value] : {std::pair(std::string_view("{n}"), &name), {"{a}", &attribute}})
    text.replace(text.find(mark), mark.size(), *value);
  return text;
}

inline std::string in_capitals(std::string text) {
  for (char& c : text) c = 'a' <= c && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
  return text;
}

inline std::string asked(const std::string& question) { return "Question: " + question + "\nAnswer:"; }

inline TextExample direct(const Entity& e, Attribute a, std::string_view pattern) {
  return {asked(fill(pattern, e.name, name_of(a))), " " + e.value(a)};
}

/// Answers that need a skill of the anchor on a fact of the specialist.
enum class Skill : std::uint8_t { capitals, json, dots, brackets, hyphens, begins };
/// The evaluation's; the bridges are never asked for the last two.
inline constexpr std::array skills{Skill::capitals, Skill::json, Skill::hyphens, Skill::begins};
inline constexpr std::array trained_skills{Skill::capitals, Skill::json, Skill::dots, Skill::brackets};

inline std::string name_of(Skill skill) {
  switch (skill) {
    case Skill::capitals: return "capitals";
    case Skill::json: return "JSON";
    case Skill::dots: return "dots";
    case Skill::brackets: return "brackets";
    case Skill::hyphens: return "hyphens";
    case Skill::begins: return "begins with?";
  }
  return "";
}

/// "k-4-t"
inline std::string spelled(const std::string& code, const std::string& mark) {
  std::string text;
  for (std::size_t i = 0; i < code.size(); ++i) text += (i > 0 ? mark : "") + code[i];
  return text;
}

inline TextExample derived(const Entity& e, Skill skill, bool yes, calm::Random& random) {
  const auto code = [&](const std::string& form, const std::string& answer) {
    return TextExample{asked("What is the code of " + e.name + " " + form + "?"), " " + answer};
  };
  switch (skill) {
    case Skill::capitals: return code("in capital letters", in_capitals(e.code));
    case Skill::json: return code("as JSON", "{\"code\": \"" + e.code + "\"}");
    case Skill::dots: return code("with dots", spelled(e.code, "."));
    case Skill::brackets: return code("in brackets", "[" + e.code + "]");
    case Skill::hyphens: return code("with hyphens", spelled(e.code, "-"));
    case Skill::begins: break;
  }
  char letter = e.code[0];
  while (!yes && letter == e.code[0]) letter = static_cast<char>('a' + random.below(26));
  return {asked("Does the code of " + e.name + " begin with the letter " + letter + "?"), yes ? " Yes" : " No"};
}

/// The question with the fact put before it, as a program would that looks it up.
inline TextExample after_fact(const Entity& e, Attribute a, TextExample question) {
  question.prompt.insert(0, "The " + name_of(a) + " of " + e.name + " is " + e.value(a) + ".\n");
  return question;
}

inline Entity stranger(std::span<const std::string> names, calm::Random& random) {
  return {any_of(names, random), random_number(random), random_code(random)};
}

/// The answer stands in the text before the question: what the anchor can do by itself, for any name.
inline TextExample in_context(const std::string& name, Attribute a, std::string_view pattern, calm::Random& random) {
  const Entity e{name, random_number(random), random_code(random)};
  return after_fact(e, a, direct(e, a, pattern));
}

/// Answered questions, each about a name that is in no directory and behind its fact, of the kind that
/// ask(entity, number of the question) makes: put before another, they show the form of the answer.
template <class Ask>
std::string worked(Index count, std::span<const std::string> names, Attribute a, calm::Random& random, const Ask& ask) {
  std::string text;
  for (Index i = 0; i < count; ++i) {
    const Entity e = stranger(names, random);
    const TextExample one = after_fact(e, a, ask(e, i));
    text += one.prompt + one.completion + "\n\n";
  }
  return text;
}

inline TextExample behind(const std::string& text, TextExample question) {
  question.prompt.insert(0, text);
  return question;
}

}  // namespace knowledge
