// JSON that was written by others: parse_json, and getters that name the file and the key where something is wrong.
//
// nlohmann/json reads; this adds what hostile input asks for (a cap on depth, memory and strings, no key twice, no byte
// 0) and turns every failure into a FormatError. `where` names the file, or the file and the part of it.
#pragma once

#include <calm/core/text.hpp>
#include <calm/io/file_map.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

using Json = nlohmann::json;

struct JsonLimits {
  Index depth = 64;
  Index text_bytes = Index{128} << 20;
  Index token_bytes = Index{4} << 20;  // of one string or number, as written
  Index memory_bytes = 0;              // of the parsed values; 0: twice the text and 64 MB
};

/// The values of one long object or array, the one that the root has under parent/key, taken one by one as they are
/// read. Of the parsed document it is a part without values; who takes them looks after their memory, and whether a key
/// occurs twice.
struct JsonStream {
  std::string parent, key;
  bool is_object = true;  // else an array; anything else that lies there is parsed as usual
  std::function<void(const std::string& name, std::size_t place, const Json& value)> take;  // no name in an array
};

/// Builds a Json from the events of nlohmann's parser, within limits.
class JsonBuilder {
 public:
  /// `reserved`: bytes of the memory limit that are not for values.
  JsonBuilder(const std::string& where, const JsonLimits& limits, Index reserved, std::span<const JsonStream> streams)
      : where_(where), limits_(limits), memory_(reserved), streams_(streams) {}

  Json take() { return std::move(root_); }

  // The interface that nlohmann::json::sax_parse asks for.
  bool null() { return put_literal(Json()); }
  bool boolean(bool value) { return put_literal(Json(value)); }
  bool number_integer(Json::number_integer_t value) { return put(Json(value)); }
  bool number_unsigned(Json::number_unsigned_t value) { return put(Json(value)); }
  bool number_float(Json::number_float_t value, const std::string&) { return put(Json(value)); }
  bool binary(Json::binary_t&) { return false; }  // no JSON text has one
  bool string(std::string& value) {
    spend(small_block + heap_bytes(value));
    return put(Json(value));  // a copy: the parser's own string has room for more than its size
  }
  bool start_object(std::size_t) { return open(Json::object()); }
  bool start_array(std::size_t) { return open(Json::array()); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }

  bool key(std::string& name) {
    spend(2 * small_block + heap_bytes(name));
    Level& level = levels_.back();
    const auto [entry, is_new] = level.value->get_ref<Json::object_t&>().emplace(name, Json());
    if (!is_new) fail("the key " + in_quotes(entry->first) + " occurs twice");
    level.entry = &*entry;
    return true;
  }

  template <class Exception>
  bool parse_error(std::size_t position, const std::string&, const Exception& error) {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: reason; last read: 'any bytes at all'"
    std::string_view reason = error.what();
    reason = reason.substr(0, reason.find("; last read"));
    const std::size_t end_of_tag = reason.find("] ");
    if (end_of_tag != reason.npos) reason.remove_prefix(end_of_tag + 2);
    throw FormatError(message(where_, ": byte ", position, ": not valid JSON: ", printable(reason, 200)));
  }

 private:
  static constexpr Index small_block = 48;  // what the allocator takes for a string or a node's half

  struct Level {
    Json* value;
    std::pair<const std::string, Json>* entry = nullptr;  // the entry of an object whose value comes next
    const JsonStream* stream = nullptr;                   // takes the values
    std::size_t taken = 0;                                // by it
    Index memory = 0;                                     // spent before the value that comes next, with a stream
  };

  static Index heap_bytes(const std::string& text) {
    return text.size() < 16 ? 0 : static_cast<Index>(text.size()) + 16;
  }

  bool put(Json&& value) {
    place(std::move(value));
    hand_over();
    return true;
  }

  bool put_literal(Json&& value) {
    spend(12);  // the parser keeps the text of literals until the next string or number
    return put(std::move(value));
  }

  bool open(Json&& container) {
    if (static_cast<Index>(levels_.size()) >= limits_.depth)
      fail(message("more than ", limits_.depth, " levels of nesting"));
    spend(2 * small_block);
    const bool is_object = container.is_object();
    Level level{place(std::move(container))};
    level.memory = memory_;
    if (levels_.size() == 2 && levels_[0].entry != nullptr && levels_[1].entry != nullptr)
      for (const JsonStream& stream : streams_)
        if (stream.is_object == is_object && stream.parent == levels_[0].entry->first &&
            stream.key == levels_[1].entry->first)
          level.stream = &stream;
    levels_.push_back(level);
    return true;
  }

  bool close() {
    levels_.pop_back();
    hand_over();
    return true;
  }

  /// Gives the value that is complete now to the stream that takes it, where there is one.
  void hand_over() {
    if (levels_.empty() || levels_.back().stream == nullptr) return;
    Level& level = levels_.back();
    if (level.entry != nullptr) level.stream->take(level.entry->first, level.taken++, level.entry->second);
    else level.stream->take({}, level.taken++, level.value->back());
    level.value->clear();
    level.entry = nullptr;
    memory_ = level.memory;
  }

  Json* place(Json&& value) {
    if (levels_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    const Level& level = levels_.back();
    if (level.entry != nullptr) {
      level.entry->second = std::move(value);
      return &level.entry->second;
    }
    auto& array = level.value->get_ref<Json::array_t&>();
    const std::size_t capacity = array.capacity();
    array.push_back(std::move(value));
    spend(static_cast<Index>((array.capacity() - capacity) * sizeof(Json)));
    return &array.back();
  }

  void spend(Index bytes) {
    memory_ += bytes;
    if (memory_ > limits_.memory_bytes)
      fail(message("its values would take more than ", limits_.memory_bytes, " bytes of memory"));
  }

  [[noreturn]] void fail(const std::string& reason) const {
    std::string place;
    for (std::size_t i = 0; i + 1 < levels_.size() && place.size() < 100; ++i) {
      if (i > 0) place += '/';
      const Level& level = levels_[i];
      place += level.entry != nullptr    ? printable(level.entry->first, 40)
               : level.stream != nullptr ? message(level.taken)
                                         : message(level.value->size() - 1);
    }
    throw FormatError(message(where_, ": ", place.empty() ? "" : "in " + in_quotes(place) + ": ", reason));
  }

  const std::string& where_;
  JsonLimits limits_;
  Json root_;
  std::vector<Level> levels_;
  Index memory_;
  std::span<const JsonStream> streams_;
};

/// Parses one JSON value. Throws FormatError: where, the byte or key, the reason.
inline Json parse_json(std::string_view text, const std::string& where, JsonLimits limits = {},
                       std::span<const JsonStream> streams = {}) {
  if (limits.memory_bytes == 0) limits.memory_bytes = 2 * static_cast<Index>(text.size()) + (Index{64} << 20);
  require<FormatError>(static_cast<Index>(text.size()) <= limits.text_bytes, where, ": ", text.size(),
                       " bytes of JSON; more than ", limits.text_bytes, " are not read");
  // The parser takes a byte 0 for the end of the text, and keeps a whole token several times while it reads it.
  Index begin = 0, longest = 0;  // of tokens
  bool in_string = false;
  for (Index i = 0; i < static_cast<Index>(text.size()); ++i) {
    const char c = text[static_cast<std::size_t>(i)];
    require<FormatError>(c != '\0', where, ": byte ", i, ": not valid JSON: a byte 0");
    if (c == '"') {
      if (!in_string) begin = i;
      in_string = !in_string;
    } else if (in_string && c == '\\') {
      ++i;
    } else if (!in_string && std::string_view(",:[]{} \t\r\n").find(c) != std::string_view::npos) {
      begin = i + 1;
    }
    longest = std::max(longest, i + 1 - begin);
    require<FormatError>(longest <= limits.token_bytes, where, ": byte ", begin, ": a string or number of more than ",
                         limits.token_bytes, " bytes");
  }
  JsonBuilder builder(where, limits, 6 * longest, streams);
  try {
    Json::sax_parse(text.begin(), text.end(), &builder);
  } catch (const nlohmann::detail::exception& error) {
    throw FormatError(message(where, ": not valid JSON: ", in_quotes(error.what())));
  }
  return builder.take();
}

/// Reads and parses a file. Throws IoError or FormatError.
inline Json read_json(const std::filesystem::path& path, JsonLimits limits = {}) {
  const auto file = FileMap::open(path);
  return parse_json(file->text(), file->path(), limits);
}

/// The text as a JSON string literal. Throws FormatError where it is not UTF-8.
inline std::string json_literal(const std::string& text) {
  try {
    return Json(text).dump();
  } catch (const nlohmann::detail::exception&) {
    throw FormatError(message(in_quotes(text), " is not valid UTF-8 and cannot be written as JSON"));
  }
}

/// "a string", "an integer", ...: what a message calls this value.
inline std::string_view kind_of(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null: return "null";
    case Json::value_t::boolean: return "a boolean";
    case Json::value_t::string: return "a string";
    case Json::value_t::array: return "an array";
    case Json::value_t::object: return "an object";
    case Json::value_t::number_float: return "a number with a fraction";
    default: return "an integer";
  }
}

/// The value of a key, or null where the key is absent or its value is JSON's null.
inline const Json* find_value(const Json& object, const std::string& key, const std::string& where) {
  require<FormatError>(object.is_object(), where, ": expected an object with the key ", in_quotes(key), ", found ",
                       kind_of(object));
  const auto entry = object.find(key);
  return entry == object.end() || entry->is_null() ? nullptr : &*entry;
}

/// The value of a key that must be there.
inline const Json& get_value(const Json& object, const std::string& key, const std::string& where) {
  const Json* value = find_value(object, key, where);
  require<FormatError>(value != nullptr, where, ": the key ", in_quotes(key), " is missing");
  return *value;
}

/// `value` as an integer of [least, most]; `what` names it in the message.
inline Index to_integer(const Json& value, const std::string& what, Index least = 0,
                        Index most = std::numeric_limits<Index>::max()) {
  require<FormatError>(value.is_number_integer(), what, ": expected an integer, found ", kind_of(value));
  const bool fits = !value.is_number_unsigned() ||
                    value.get<std::uint64_t>() <= static_cast<std::uint64_t>(std::numeric_limits<Index>::max());
  require<FormatError>(fits && value.get<Index>() >= least && value.get<Index>() <= most, what,
                       ": expected an integer ",
                       most == std::numeric_limits<Index>::max() ? message("of at least ", least)
                                                                 : message("from ", least, " to ", most),
                       ", found ", value.dump());
  return value.get<Index>();
}

inline Index get_integer(const Json& object, const std::string& key, const std::string& where, Index least = 0,
                         Index most = std::numeric_limits<Index>::max()) {
  return to_integer(get_value(object, key, where), message(where, ": ", in_quotes(key)), least, most);
}

/// A finite number; integers count.
inline double get_number(const Json& object, const std::string& key, const std::string& where) {
  const Json& value = get_value(object, key, where);
  require<FormatError>(value.is_number(), where, ": ", in_quotes(key), ": expected a number, found ", kind_of(value));
  return value.get<double>();
}

inline bool get_boolean(const Json& object, const std::string& key, const std::string& where) {
  const Json& value = get_value(object, key, where);
  require<FormatError>(value.is_boolean(), where, ": ", in_quotes(key), ": expected true or false, found ",
                       kind_of(value));
  return value.get<bool>();
}

inline const std::string& get_string(const Json& object, const std::string& key, const std::string& where) {
  const Json& value = get_value(object, key, where);
  require<FormatError>(value.is_string(), where, ": ", in_quotes(key), ": expected a string, found ", kind_of(value));
  return value.get_ref<const std::string&>();
}

inline const Json& get_array(const Json& object, const std::string& key, const std::string& where) {
  const Json& value = get_value(object, key, where);
  require<FormatError>(value.is_array(), where, ": ", in_quotes(key), ": expected an array, found ", kind_of(value));
  return value;
}

inline const Json& get_object(const Json& object, const std::string& key, const std::string& where) {
  const Json& value = get_value(object, key, where);
  require<FormatError>(value.is_object(), where, ": ", in_quotes(key), ": expected an object, found ", kind_of(value));
  return value;
}

/// The same, or `fallback` where the key is absent or null; a value of another kind is still an error.
inline Index get_integer_or(const Json& object, const std::string& key, Index fallback, const std::string& where,
                            Index least = 0, Index most = std::numeric_limits<Index>::max()) {
  return find_value(object, key, where) ? get_integer(object, key, where, least, most) : fallback;
}
inline double get_number_or(const Json& object, const std::string& key, double fallback, const std::string& where) {
  return find_value(object, key, where) ? get_number(object, key, where) : fallback;
}
inline bool get_boolean_or(const Json& object, const std::string& key, bool fallback, const std::string& where) {
  return find_value(object, key, where) ? get_boolean(object, key, where) : fallback;
}
inline std::string get_string_or(const Json& object, const std::string& key, const std::string& fallback,
                                 const std::string& where) {
  return find_value(object, key, where) ? get_string(object, key, where) : fallback;
}

}  // namespace calm::inline CALM_ABI
