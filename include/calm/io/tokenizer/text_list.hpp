// TextList: many texts behind each other in one piece of memory, as a vocabulary has them.
#pragma once

#include <calm/core/config.hpp>

#include <cstddef>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

namespace calm::inline CALM_ABI {

class TextList {
 public:
  TextList() = default;
  TextList(std::initializer_list<std::string_view> texts) { add(texts); }
  explicit TextList(const std::vector<std::string>& texts) { add(texts); }

  void reserve(std::size_t count, std::size_t bytes) {
    ends_.reserve(count);
    bytes_.reserve(bytes);
  }
  /// Gives back what was reserved and not needed.
  void shrink() {
    ends_.shrink_to_fit();
    bytes_.shrink_to_fit();
  }
  void push_back(std::string_view text) {
    bytes_ += text;
    ends_.push_back(bytes_.size());
  }

  std::size_t size() const { return ends_.size(); }
  std::size_t bytes() const { return bytes_.size(); }
  std::string_view operator[](std::size_t i) const {
    const std::size_t begin = i == 0 ? 0 : ends_[i - 1];
    return std::string_view(bytes_).substr(begin, ends_[i] - begin);
  }

 private:
  void add(const auto& texts) {
    for (const std::string_view text : texts) push_back(text);
  }

  std::string bytes_;
  std::vector<std::size_t> ends_;
};

}  // namespace calm::inline CALM_ABI
