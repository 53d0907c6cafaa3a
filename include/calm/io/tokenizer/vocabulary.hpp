// Vocabulary: the bytes of every token id, and the id of given bytes.
//
// The hash of the index is seeded with a hash of all tokens, so that no file can be written whose tokens all collide.
#pragma once

#include <calm/core/text.hpp>
#include <calm/io/content_hash.hpp>
#include <calm/io/tokenizer/utf8.hpp>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace calm::inline CALM_ABI {

/// The alphabet of byte-level tokenizers (GPT-2, encoder.py, bytes_to_unicode): a printable character for every byte.
class ByteAlphabet {
 public:
  ByteAlphabet() {
    byte_of_.fill(-1);
    std::uint32_t next = 0x100;
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      const bool is_printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      byte_of_[is_printable ? byte : next++] = static_cast<std::int16_t>(byte);
    }
  }

  /// Replaces characters by their bytes; false, and `bytes` unspecified, where one is not of the alphabet.
  bool decode(std::string_view text, std::string& bytes) const {
    bytes.clear();
    for (std::size_t place = 0; place < text.size();) {
      const CodePoint c = code_point_at(text.substr(place, 4));
      if (c.bytes == 0 || c.value >= byte_of_.size() || byte_of_[c.value] < 0) return false;
      bytes += static_cast<char>(byte_of_[c.value]);
      place += c.bytes;
    }
    return true;
  }

 private:
  std::array<std::int16_t, 0x144> byte_of_{};
};

class Vocabulary {
 public:
  static constexpr TokenId none = -1;
  /// Ids above any vocabulary of today; a table has a row for each up to the highest.
  static constexpr Index most_ids = Index{1} << 21;

  /// Room for tokens of this number and length in all.
  void reserve(std::size_t tokens, std::size_t bytes) {
    entries_.reserve(tokens);
    bytes_.reserve(bytes);
  }

  /// Gives `id` its bytes. `is_searchable`: find() knows it. Throws FormatError where the id has bytes already.
  void set(TokenId id, std::string_view bytes, bool is_searchable, const std::string& where) {
    // Messages are made where they are needed alone: a vocabulary has some hundred thousand tokens.
    if (id < 0 || id >= most_ids)
      fail<FormatError>({where, ": the id ", id, " of ", in_quotes(bytes), " is not in [0, ", most_ids, ")"});
    const auto place = static_cast<std::size_t>(id);
    if (place >= entries_.size()) entries_.resize(place + 1);
    Entry& entry = entries_[place];
    if (entry.is_set)
      fail<FormatError>(
          {where, ": two tokens have the id ", id, ": ", in_quotes(this->bytes(id)), " and ", in_quotes(bytes)});
    require<FormatError>(bytes_.size() + bytes.size() < (std::size_t{1} << 30), where,
                         ": more than 2^30 bytes of tokens");
    entry = {static_cast<std::uint32_t>(bytes_.size()), static_cast<std::uint32_t>(bytes.size()), true, is_searchable};
    bytes_ += bytes;
  }

  /// Makes find() know the tokens that were set. Throws FormatError where two have the same bytes.
  void build_index(const std::string& where) {
    std::size_t slots = 16;
    while (slots < 2 * entries_.size()) slots *= 2;
    slots_.assign(slots, none);
    seed_ = XXH3_64bits(bytes_.data(), bytes_.size());
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (!entries_[i].is_searchable || entries_[i].size == 0) continue;
      const auto id = static_cast<TokenId>(i);
      TokenId& slot = slots_[slot_of(bytes(id))];
      if (slot != none) fail<FormatError>({where, ": the ids ", slot, " and ", id, " are both ", in_quotes(bytes(id))});
      slot = id;
    }
  }

  /// One more than the highest id.
  Index size() const { return static_cast<Index>(entries_.size()); }
  bool contains(TokenId id) const {
    return id >= 0 && static_cast<std::size_t>(id) < entries_.size() && entries_[static_cast<std::size_t>(id)].is_set;
  }
  /// Empty for an id that no token has.
  std::string_view bytes(TokenId id) const {
    if (!contains(id)) return {};
    const Entry& entry = entries_[static_cast<std::size_t>(id)];
    return std::string_view(bytes_).substr(entry.begin, entry.size);
  }
  /// The token with these bytes, or `none`.
  TokenId find(std::string_view text) const { return slots_.empty() ? none : slots_[slot_of(text)]; }

  /// A hash of all ids and bytes.
  std::string identity() const {
    ContentHasher ends;
    for (const Entry& entry : entries_) ends.add(message(entry.is_set ? "" : "-", entry.begin + entry.size, ' '));
    return content_hash(bytes_) + ends.digits();
  }

 private:
  struct Entry {
    std::uint32_t begin = 0, size = 0;
    bool is_set = false, is_searchable = false;
  };

  std::size_t slot_of(std::string_view text) const {
    std::size_t slot = XXH3_64bits_withSeed(text.data(), text.size(), seed_) & (slots_.size() - 1);
    while (slots_[slot] != none && bytes(slots_[slot]) != text) slot = (slot + 1) & (slots_.size() - 1);
    return slot;
  }

  std::string bytes_;
  std::vector<Entry> entries_;
  std::vector<TokenId> slots_;
  std::uint64_t seed_ = 0;
};

}  // namespace calm::inline CALM_ABI
