// The keys and values at the beginning of a .gguf file, and getters that name the file and the key where something is
// wrong. Values stay in the mapped file: a list of 250,000 tokens costs nothing until it is asked for.
//
//   a string    u64 length, then as many bytes
//   an array    u32 type, u64 count, then the elements
//   a key       a string, u32 type, then the value
// All little endian. Not here: arrays of arrays, which the format allows and no model uses; they are refused.
#pragma once

#include <calm/core/text.hpp>
#include <calm/io/file_map.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace calm::inline CALM_ABI {

/// The types of values, numbered as in the file.
enum class GgufType : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

/// "an integer", "a string", ...: what a message calls a value of this type.
constexpr std::string_view kind_of(GgufType type) {
  switch (type) {
    case GgufType::f32:
    case GgufType::f64: return "a number with a fraction";
    case GgufType::boolean: return "a boolean";
    case GgufType::string: return "a string";
    case GgufType::array: return "an array";
    default: return "an integer";
  }
}

/// Reads a mapped file from its beginning on and refuses to read beyond its end.
class GgufCursor {
 public:
  explicit GgufCursor(const FileMap& file) : file_(file) {}

  Index position() const { return position_; }
  Index left() const { return file_.size() - position_; }

  /// "FILE: byte 12: ".
  std::string place() const { return message(file_.path(), ": byte ", position_, ": "); }

  const std::byte* take(Index bytes, std::string_view what) {
    require<FormatError>(bytes <= left(), place_if(bytes > left()), what, " takes ", bytes, " bytes, ", left(),
                         " are left; the file was cut off or is damaged");
    const std::byte* data = file_.data() + position_;
    position_ += bytes;
    return data;
  }

  template <class T>
  T read(std::string_view what) {
    T value;
    std::memcpy(&value, take(sizeof(T), what), sizeof(T));
    return value;
  }

  /// A number of things of which each takes at least `least_bytes`.
  Index read_count(std::string_view what, Index least_bytes) {
    const auto count = read<std::uint64_t>(what);
    const bool fits = count <= static_cast<std::uint64_t>(left() / least_bytes);
    require<FormatError>(fits, place_if(!fits), what, ": ", count, " do not fit into the ", left(),
                         " bytes that are left; the file was cut off or is damaged");
    return static_cast<Index>(count);
  }

  std::string_view read_string(std::string_view what) {
    const Index length = read_count(what, 1);
    return {reinterpret_cast<const char*>(take(length, what)), static_cast<std::size_t>(length)};
  }

 private:
  /// The place for a message that will be needed; reading a string builds none.
  std::string place_if(bool needed) const { return needed ? place() : std::string(); }

  const FileMap& file_;
  Index position_ = 0;
};

/// A value as it lies in the file.
struct GgufValue {
  GgufType type = GgufType::u8;  // of the value; of the elements where it is an array
  bool is_array = false;
  Index count = 1;                  // elements
  const std::byte* data = nullptr;  // the first element; a string begins with its length
};

class GgufMetadata {
 public:
  struct Entry {
    std::string_view key;
    GgufValue value;
  };

  GgufMetadata() = default;

  /// Reads `count` keys. Throws FormatError with the place and the reason.
  GgufMetadata(std::shared_ptr<const FileMap> file, GgufCursor& cursor, Index count) : file_(std::move(file)) {
    require<FormatError>(count <= most_keys, cursor.place(), count, " metadata keys; at most ", most_keys, " are read");
    entries_.reserve(static_cast<std::size_t>(count));
    for (Index i = 0; i < count; ++i) {
      const std::string_view key = cursor.read_string("the name of a metadata key");
      entries_.push_back({key, read_value(cursor, key)});
    }
    std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.key < b.key; });
    const auto twice = std::adjacent_find(entries_.begin(), entries_.end(),
                                          [](const Entry& a, const Entry& b) { return a.key == b.key; });
    if (twice != entries_.end())
      fail<FormatError>({file_->path(), ": the key ", in_quotes(twice->key), " occurs twice"});
  }

  /// All keys, in alphabetical order.
  const std::vector<Entry>& entries() const { return entries_; }

  /// Null where the key is absent.
  const GgufValue* find(std::string_view key) const {
    const auto entry = std::lower_bound(entries_.begin(), entries_.end(), key,
                                        [](const Entry& e, std::string_view k) { return e.key < k; });
    return entry != entries_.end() && entry->key == key ? &entry->value : nullptr;
  }
  bool contains(std::string_view key) const { return find(key) != nullptr; }

  Index get_integer(std::string_view key, Index least = 0, Index most = std::numeric_limits<Index>::max()) const {
    return integer_at(single(key), 0, key, least, most);
  }
  /// A finite number; integers count.
  double get_number(std::string_view key) const { return number_at(single(key), 0, key); }
  bool get_boolean(std::string_view key) const {
    const GgufValue& value = single(key);
    expect(value.type == GgufType::boolean, key, "true or false", value);
    return read<std::uint8_t>(value.data) != 0;
  }
  /// The bytes of the file, which stay where they are as long as this object or the GgufFile lives. Not always UTF-8.
  std::string_view get_string(std::string_view key) const {
    const GgufValue& value = single(key);
    expect(value.type == GgufType::string, key, "a string", value);
    return string_at(value.data);
  }

  /// Arrays, of at most four million elements. An integer of an array is of [least, most] too.
  template <std::integral Integer = Index>
  std::vector<Integer> get_integers(std::string_view key, std::type_identity_t<Integer> least = 0,
                                    std::type_identity_t<Integer> most = std::numeric_limits<Integer>::max()) const {
    const GgufValue& value = array(key);
    std::vector<Integer> result(static_cast<std::size_t>(value.count));
    for (std::size_t i = 0; i < result.size(); ++i)
      result[i] = static_cast<Integer>(integer_at(value, static_cast<Index>(i), key, least, most));
    return result;
  }
  template <std::floating_point Number = double>
  std::vector<Number> get_numbers(std::string_view key) const {
    const GgufValue& value = array(key);
    std::vector<Number> result(static_cast<std::size_t>(value.count));
    for (std::size_t i = 0; i < result.size(); ++i)
      result[i] = static_cast<Number>(number_at(value, static_cast<Index>(i), key));
    return result;
  }
  /// As for get_string, the bytes of the file.
  std::vector<std::string_view> get_strings(std::string_view key) const {
    std::vector<std::string_view> result;
    result.reserve(static_cast<std::size_t>(array(key).count));
    for_each_string(key, [&](std::string_view text) { result.push_back(text); });
    return result;
  }
  /// fn(text) for each string of an array.
  template <class Fn>
  void for_each_string(std::string_view key, Fn&& fn) const {
    const GgufValue& value = array(key);
    expect(value.type == GgufType::string, key, "an array of strings", value);
    const std::byte* place = value.data;
    for (Index i = 0; i < value.count; ++i) {
      const std::string_view text = string_at(place);
      fn(text);
      place += 8 + text.size();
    }
  }

  /// The same, or `fallback` where the key is absent; a value of another kind is still an error.
  Index get_integer_or(std::string_view key, Index fallback, Index least = 0,
                       Index most = std::numeric_limits<Index>::max()) const {
    return contains(key) ? get_integer(key, least, most) : fallback;
  }
  double get_number_or(std::string_view key, double fallback) const {
    return contains(key) ? get_number(key) : fallback;
  }
  bool get_boolean_or(std::string_view key, bool fallback) const { return contains(key) ? get_boolean(key) : fallback; }
  std::string_view get_string_or(std::string_view key, std::string_view fallback) const {
    return contains(key) ? get_string(key) : fallback;
  }

 private:
  // Together with the tables of tensors these bound the memory; models have some dozens of keys, and the largest
  // vocabularies some hundred thousands of tokens and merges.
  static constexpr Index most_keys = 1 << 16, most_elements = 1 << 22;

  /// 0 for types whose values differ in size.
  static constexpr Index bytes_of_type(GgufType type) {
    switch (type) {
      case GgufType::u8:
      case GgufType::i8:
      case GgufType::boolean: return 1;
      case GgufType::u16:
      case GgufType::i16: return 2;
      case GgufType::u32:
      case GgufType::i32:
      case GgufType::f32: return 4;
      case GgufType::u64:
      case GgufType::i64:
      case GgufType::f64: return 8;
      default: return 0;
    }
  }

  static GgufType read_type(GgufCursor& cursor, std::string_view key) {
    const std::string place = cursor.place();
    const auto type = cursor.read<std::uint32_t>("the type of a metadata value");
    require<FormatError>(type <= static_cast<std::uint32_t>(GgufType::f64), place, "key ", in_quotes(key),
                         ": unknown type ", type);
    return static_cast<GgufType>(type);
  }

  static GgufValue read_value(GgufCursor& cursor, std::string_view key) {
    GgufValue value{read_type(cursor, key)};
    if (value.type == GgufType::array) {
      value.is_array = true;
      value.type = read_type(cursor, key);
      require<FormatError>(value.type != GgufType::array, cursor.place(), "key ", in_quotes(key),
                           ": an array of arrays, which is not read");
      value.count =
          cursor.read_count("the number of elements of an array", std::max<Index>(1, bytes_of_type(value.type)));
    }
    value.data = cursor.take(0, "");
    if (value.type == GgufType::string) {
      for (Index i = 0; i < value.count; ++i) cursor.read_string("a string");
    } else {
      // No overflow: an array's count is at most the bytes that are left, divided by those of an element.
      cursor.take(value.count * bytes_of_type(value.type), "a metadata value");
    }
    if (value.type == GgufType::boolean)
      for (Index i = 0; i < value.count; ++i)
        if (read<std::uint8_t>(value.data + i) > 1) [[unlikely]]
          fail<FormatError>({cursor.place(), "key ", in_quotes(key), ": a boolean that is neither 0 nor 1"});
    return value;
  }

  template <class T>
  static T read(const std::byte* data) {
    T value;
    std::memcpy(&value, data, sizeof(T));
    return value;
  }
  static std::string_view string_at(const std::byte* data) {
    return {reinterpret_cast<const char*>(data + 8), static_cast<std::size_t>(read<std::uint64_t>(data))};
  }

  void expect(bool condition, std::string_view key, std::string_view expected, const GgufValue& found) const {
    if (!condition)
      fail<FormatError>({file_->path(), ": key ", in_quotes(key), ": expected ", expected, ", found ",
                         found.is_array ? "an array of values, each " : "", kind_of(found.type)});
  }
  const GgufValue& get(std::string_view key) const {
    const GgufValue* value = find(key);
    if (value == nullptr) fail<FormatError>({file_->path(), ": the metadata key ", in_quotes(key), " is missing"});
    return *value;
  }
  const GgufValue& single(std::string_view key) const {
    const GgufValue& value = get(key);
    expect(!value.is_array, key, "a single value", value);
    return value;
  }
  const GgufValue& array(std::string_view key) const {
    const GgufValue& value = get(key);
    expect(value.is_array, key, "an array", value);
    if (value.count > most_elements)
      fail<FormatError>({file_->path(), ": key ", in_quotes(key), ": an array of ", value.count, " elements; at most ",
                         most_elements, " are read"});
    return value;
  }

  Index integer_at(const GgufValue& value, Index i, std::string_view key, Index least, Index most) const {
    const std::byte* data = value.data + i * bytes_of_type(value.type);
    Index result = 0;
    bool fits = true;
    switch (value.type) {
      case GgufType::u8: result = read<std::uint8_t>(data); break;
      case GgufType::i8: result = read<std::int8_t>(data); break;
      case GgufType::u16: result = read<std::uint16_t>(data); break;
      case GgufType::i16: result = read<std::int16_t>(data); break;
      case GgufType::u32: result = read<std::uint32_t>(data); break;
      case GgufType::i32: result = read<std::int32_t>(data); break;
      case GgufType::i64: result = read<std::int64_t>(data); break;
      case GgufType::u64:
        result = read<std::int64_t>(data);
        fits = result >= 0;
        break;
      default: expect(false, key, value.is_array ? "an array of integers" : "an integer", value);
    }
    if (!fits || result < least || result > most)
      fail<FormatError>({file_->path(), ": key ", in_quotes(key), ": expected an integer ",
                         most == std::numeric_limits<Index>::max() ? message("of at least ", least)
                                                                   : message("from ", least, " to ", most),
                         ", found ", fits ? message(result) : message(static_cast<std::uint64_t>(result))});
    return result;
  }

  double number_at(const GgufValue& value, Index i, std::string_view key) const {
    double result = 0;
    if (value.type == GgufType::f32) {
      result = static_cast<double>(read<float>(value.data + i * 4));
    } else if (value.type == GgufType::f64) {
      result = read<double>(value.data + i * 8);
    } else {
      expect(kind_of(value.type) == "an integer", key, value.is_array ? "an array of numbers" : "a number", value);
      return static_cast<double>(
          integer_at(value, i, key, std::numeric_limits<Index>::min(), std::numeric_limits<Index>::max()));
    }
    if (!std::isfinite(result))
      fail<FormatError>({file_->path(), ": key ", in_quotes(key), ": ", result, " is not a finite number"});
    return result;
  }

  std::shared_ptr<const FileMap> file_;
  std::vector<Entry> entries_;
};

}  // namespace calm::inline CALM_ABI
