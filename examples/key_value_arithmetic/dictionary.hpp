// The dictionary: string keys of 2 to 6 letters, each with its own integer from 1 to K, and the fifth of the keys that
// the bridges may see.
#pragma once

#include <calm/core/random.hpp>

#include <algorithm>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace key_value {

/// The words of the reworded forms, which are no keys.
inline const std::set<std::string> reserved_words = {"plus", "minus", "from", "to", "take", "add", "then"};

inline std::string random_word(calm::Random& random) {
  std::string word(static_cast<std::size_t>(2 + random.below(5)), 'a');
  for (char& c : word) c = static_cast<char>('a' + random.below(26));
  return word;
}

class Dictionary {
 public:
  /// The keys follow from `key_seed`, their values from `value_seed`: another value seed is another dictionary over the
  /// same keys.
  Dictionary(calm::Index size, std::uint64_t key_seed, std::uint64_t value_seed, double seen_part = 0.2) {
    calm::Random random(key_seed, 1);
    std::set<std::string> distinct;
    while (static_cast<calm::Index>(distinct.size()) < size) {
      const std::string word = random_word(random);
      if (!reserved_words.contains(word)) distinct.insert(word);
    }
    keys_.assign(distinct.begin(), distinct.end());
    shuffle(keys_, random);
    std::vector<calm::Index> values(static_cast<std::size_t>(size));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<calm::Index>(i) + 1;
    calm::Random value_random(value_seed, 2);
    shuffle(values, value_random);
    for (std::size_t i = 0; i < keys_.size(); ++i) value_of_[keys_[i]] = values[i];
    const auto split = static_cast<std::ptrdiff_t>(seen_part * static_cast<double>(size));
    seen_.assign(keys_.begin(), keys_.begin() + split);
    unseen_.assign(keys_.begin() + split, keys_.end());
  }

  calm::Index size() const { return static_cast<calm::Index>(keys_.size()); }
  const std::vector<std::string>& keys() const { return keys_; }
  const std::vector<std::string>& seen() const { return seen_; }
  const std::vector<std::string>& unseen() const { return unseen_; }
  bool contains(const std::string& word) const { return value_of_.contains(word); }
  calm::Index value(const std::string& key) const { return value_of_.at(key); }

 private:
  template <class T>
  static void shuffle(std::vector<T>& items, calm::Random& random) {
    for (std::size_t i = items.size(); i > 1; --i)
      std::swap(items[i - 1], items[static_cast<std::size_t>(random.below(static_cast<calm::Index>(i)))]);
  }

  std::vector<std::string> keys_, seen_, unseen_;
  std::unordered_map<std::string, calm::Index> value_of_;
};

}  // namespace key_value
