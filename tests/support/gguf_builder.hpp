// Puts .gguf files together for tests, also wrong ones.
#pragma once

#include <calm/io/gguf.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

struct GgufBuilder {
  std::uint32_t version = 3;
  std::size_t alignment = 32;  // of the values; set_number("general.alignment", ...) must say so too
  std::uint64_t extra_keys = 0, extra_tensors = 0;

  template <class T>
  static std::string raw(T value) {
    return {reinterpret_cast<const char*>(&value), sizeof(T)};
  }
  static std::string text(std::string_view value) { return raw<std::uint64_t>(value.size()) + std::string(value); }
  static std::string type(calm::GgufType value) { return raw(static_cast<std::uint32_t>(value)); }

  /// A key whose type and value are these bytes.
  void set_raw(std::string_view key, const std::string& type_and_value) {
    ++keys_;
    metadata_ += text(key) + type_and_value;
  }
  template <class T>
  void set_number(std::string_view key, calm::GgufType t, T value) {
    set_raw(key, type(t) + raw(value));
  }
  void set_integer(std::string_view key, std::uint32_t value) { set_number(key, calm::GgufType::u32, value); }
  void set_string(std::string_view key, std::string_view value) {
    set_raw(key, type(calm::GgufType::string) + text(value));
  }
  template <class T>
  void set_numbers(std::string_view key, calm::GgufType t, const std::vector<T>& values) {
    std::string bytes = type(calm::GgufType::array) + type(t) + raw<std::uint64_t>(values.size());
    for (const T value : values) bytes += raw(value);
    set_raw(key, bytes);
  }
  void set_strings(std::string_view key, const std::vector<std::string>& values) {
    std::string bytes = type(calm::GgufType::array) + type(calm::GgufType::string) + raw<std::uint64_t>(values.size());
    for (const std::string& value : values) bytes += text(value);
    set_raw(key, bytes);
  }

  /// A tensor at any offset.
  void add_entry(std::string_view name, const std::vector<std::uint64_t>& dimensions, std::uint32_t type_number,
                 std::uint64_t offset) {
    ++tensors_;
    table_ += text(name) + raw(static_cast<std::uint32_t>(dimensions.size()));
    for (const std::uint64_t dimension : dimensions) table_ += raw(dimension);
    table_ += raw(type_number) + raw(offset);
  }
  /// A tensor after the ones before it; dimensions in the file's order, a row's length first.
  void add_tensor(std::string_view name, const std::vector<std::uint64_t>& dimensions, std::uint32_t type_number,
                  const std::string& values) {
    values_.resize((values_.size() + alignment - 1) / alignment * alignment);
    add_entry(name, dimensions, type_number, values_.size());
    values_ += values;
  }
  void add_matrix(std::string_view name, const calm::StoredMatrix& matrix) {
    const auto* t = std::find_if(calm::gguf_tensor_types.begin(), calm::gguf_tensor_types.end(),
                                 [&](const calm::GgufTensorType& known) { return known.dtype == matrix.dtype(); });
    add_tensor(name, {static_cast<std::uint64_t>(matrix.cols()), static_cast<std::uint64_t>(matrix.rows())}, t->number,
               {reinterpret_cast<const char*>(matrix.data()), static_cast<std::size_t>(matrix.stored_bytes())});
  }

  std::string bytes() const {
    std::string result =
        "GGUF" + raw(version) + raw(tensors_ + extra_tensors) + raw(keys_ + extra_keys) + metadata_ + table_;
    if (tensors_ > 0) result.resize((result.size() + alignment - 1) / alignment * alignment);
    return result + values_;
  }

 private:
  std::uint64_t keys_ = 0, tensors_ = 0;
  std::string metadata_, table_, values_;
};
