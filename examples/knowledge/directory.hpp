// The directory that nobody can know or guess: entities named after languages and places of iso-codes, each with a
// random four-digit number and a random code such as k4t, fixed by a seed.
#pragma once

#include <calm/core/random.hpp>
#include <calm/io/folder.hpp>
#include <calm/io/json.hpp>

#include <algorithm>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace knowledge {

using calm::Index;

enum class Attribute : std::uint8_t { number, code };
inline constexpr std::array attributes{Attribute::number, Attribute::code};
inline std::string name_of(Attribute a) { return a == Attribute::number ? "number" : "code"; }

struct Entity {
  std::string name, number, code;
  const std::string& value(Attribute a) const { return a == Attribute::number ? number : code; }
};

template <class T>
void shuffle(std::vector<T>& items, calm::Random& random) {
  for (std::size_t i = items.size(); i > 1; --i)
    std::swap(items[i - 1], items[static_cast<std::size_t>(random.below(static_cast<Index>(i)))]);
}

template <class Items>
const auto& any_of(const Items& items, calm::Random& random) {
  return items[static_cast<std::size_t>(random.below(static_cast<Index>(std::size(items))))];
}

inline std::string random_number(calm::Random& random) {
  std::string text;
  for (int i = 0; i < 4; ++i) text += static_cast<char>('0' + random.below(10));
  return text;
}

/// Letter, digit, letter: tokenizers that cut digits apart give each character a token of its own. Of the alphabet the
/// first `letters` of this order are used: a fifth of a small directory does not show all of them often.
inline std::string random_code(calm::Random& random, Index letters = 26) {
  static constexpr std::string_view alphabet = "bdfgkmprtzclnshvwjqxyaeiou";
  const auto letter = [&] { return alphabet[static_cast<std::size_t>(random.below(letters))]; };
  std::string text(1, letter());
  text += static_cast<char>('0' + random.below(10));
  return text + letter();
}

/// The short names of iso-codes' languages, countries and places, each once, sorted.
inline std::vector<std::string> iso_names(const std::filesystem::path& folder) {
  std::set<std::string> names;
  for (const auto& [file, key] :
       {std::pair("iso_639-3.json", "639-3"), {"iso_3166-1.json", "3166-1"}, {"iso_3166-2.json", "3166-2"}}) {
    const auto path = folder / file;
    calm::require<calm::IoError>(calm::is_there(path), path.string(),
                                 ": there is no such file; install the package iso-codes");
    const calm::Json json = calm::read_json(path);
    for (const calm::Json& entry : calm::get_array(json, key, path.string())) {
      const std::string name = calm::get_string(entry, "name", path.string());
      if (name.size() <= 18 && name.find_first_of("(\"/,") == std::string::npos) names.insert(name);
    }
  }
  return {names.begin(), names.end()};
}

/// Countries, currencies and scripts with the numbers and codes that iso-codes gives them, in small letters.
inline std::vector<Entity> real_entities(const std::filesystem::path& folder) {
  std::vector<Entity> entities;
  std::set<std::string> names;
  for (const auto& [file, key, code] : {std::tuple("iso_3166-1.json", "3166-1", "alpha_3"),
                                        {"iso_4217.json", "4217", "alpha_3"},
                                        {"iso_15924.json", "15924", "alpha_4"}}) {
    const auto path = folder / file;
    const calm::Json json = calm::read_json(path);
    for (const calm::Json& entry : calm::get_array(json, key, path.string())) {
      if (!entry.contains("numeric")) continue;
      Entity e{calm::get_string(entry, "name", path.string()), calm::get_string(entry, "numeric", path.string()),
               calm::get_string(entry, code, path.string())};
      for (char& c : e.code) c = 'A' <= c && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
      if (names.insert(e.name).second) entities.push_back(std::move(e));
    }
  }
  return entities;
}

struct Directory {
  std::vector<Entity> entities;
  std::vector<std::string> strangers;  // names that are in no directory
  Index seen = 0;                      // the first `seen` entities are those that the bridges are trained on
  Index letters = 26;                  // of codes

  Directory(std::vector<std::string> names, Index count, std::uint64_t seed, Index code_letters = 26)
      : seen(count / 5), letters(code_letters) {
    calm::require<calm::ConfigError>(count >= 50 && static_cast<Index>(names.size()) >= 2 * count, "a directory of ",
                                     count, " entities needs at least 50 and twice as many names, found ",
                                     names.size());
    calm::Random order(0, 1), values(seed, 2);
    shuffle(names, order);
    for (Index i = 0; i < count; ++i)
      entities.push_back({names[static_cast<std::size_t>(i)], random_number(values), random_code(values, letters)});
    strangers.assign(names.begin() + count, names.end());
  }

  /// Of given entities, a fifth of them seen; strangers are the names that are none of theirs.
  Directory(std::vector<Entity> given, const std::vector<std::string>& names, std::uint64_t seed)
      : entities(std::move(given)), seen(size() / 5) {
    calm::Random order(seed, 2);
    shuffle(entities, order);
    std::set<std::string> taken;
    for (const Entity& e : entities) taken.insert(e.name);
    for (const std::string& name : names)
      if (!taken.contains(name)) strangers.push_back(name);
    shuffle(strangers, order);
  }

  Index size() const { return static_cast<Index>(entities.size()); }

  /// Strangers for lessons, and others for the evaluation.
  std::span<const std::string> training_strangers() const { return std::span(strangers).first(strangers.size() / 2); }
  std::span<const std::string> new_strangers() const { return std::span(strangers).subspan(strangers.size() / 2); }

  std::span<const Entity> seen_entities() const { return std::span(entities).first(static_cast<std::size_t>(seen)); }
  std::span<const Entity> unseen_entities() const {
    return std::span(entities).subspan(static_cast<std::size_t>(seen));
  }

  /// The same with other values for `count` entities that the bridges never saw.
  Directory with_changes(Index count, std::uint64_t seed) const {
    return with_random_values(seen, std::min(seen + count, size()), calm::Random(seed, 3));
  }

  /// The same names with other values for all.
  Directory with_other_values(std::uint64_t seed) const { return with_random_values(0, size(), calm::Random(seed, 2)); }

 private:
  Directory with_random_values(Index first, Index last, calm::Random values) const {
    Directory changed = *this;
    for (Index i = first; i < last; ++i) {
      Entity& entity = changed.entities[static_cast<std::size_t>(i)];
      entity.number = random_number(values);
      entity.code = random_code(values, letters);
    }
    return changed;
  }
};

}  // namespace knowledge
