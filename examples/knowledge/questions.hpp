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

/// The answer stands in the text before the question: what the anchor can do by itself, for any name.
inline TextExample in_context(const std::string& name, Attribute a, std::string_view pattern, calm::Random& random) {
  const std::string value = a == Attribute::number ? random_number(random) : random_code(random);
  return {"The " + name_of(a) + " of " + name + " is " + value + ".\n" + asked(fill(pattern, name, name_of(a))),
          " " + value};
}

/// Answers that need a skill of the anchor on a fact of the specialist; two examples show the form.
enum class Skill : std::uint8_t { capitals, hyphens, json, begins };
inline constexpr std::array skills{Skill::capitals, Skill::hyphens, Skill::json, Skill::begins};

inline std::string name_of(Skill skill) {
  switch (skill) {
    case Skill::capitals: return "capitals";
    case Skill::hyphens: return "hyphens";
    case Skill::json: return "JSON";
    case Skill::begins: return "begins with?";
  }
  return "";
}

inline TextExample derived(const Entity& e, Skill skill, bool yes, calm::Random& random) {
  switch (skill) {
    case Skill::capitals:
      return {asked("What is the code of " + e.name + " in capital letters?"), " " + in_capitals(e.code)};
    case Skill::hyphens:
      return {asked("What is the code of " + e.name + " with hyphens?"),
              std::string(" ") + e.code[0] + "-" + e.code[1] + "-" + e.code[2]};
    case Skill::json: return {asked("What is the code of " + e.name + " as JSON?"), " {\"code\": \"" + e.code + "\"}"};
    case Skill::begins: break;
  }
  char letter = e.code[0];
  while (!yes && letter == e.code[0]) letter = static_cast<char>('a' + random.below(26));
  return {asked("Does the code of " + e.name + " begin with the letter " + letter + "?"), yes ? " Yes" : " No"};
}

/// A derived question behind two answered ones about names that are in no directory; every second answer is yes.
inline TextExample derived_after_examples(const Directory& directory, std::size_t entity, Skill skill,
                                          calm::Random& random) {
  std::string before;
  for (int i = 0; i < 2; ++i) {
    const Entity shown{any_of(directory.new_strangers(), random), random_number(random), random_code(random)};
    const TextExample example = derived(shown, skill, (i == 0) == (random.below(2) == 0), random);
    before += example.prompt + example.completion + "\n\n";
  }
  TextExample last = derived(directory.entities[entity], skill, entity % 2 == 0, random);
  return {before + last.prompt, last.completion};
}

/// The same question with the fact put before it, as a program would that looks it up.
inline TextExample looked_up(const Entity& e, TextExample question) {
  const std::size_t last = question.prompt.rfind("Question:");
  question.prompt.insert(
      last, "The number of " + e.name + " is " + e.number + ". The code of " + e.name + " is " + e.code + ".\n");
  return question;
}

}  // namespace knowledge
