// AlignedText: a text that was changed (normalised, prefixed), and for each of its bytes the range of the raw text that
// it stands for.
//
// A byte that was not changed stands for itself; all bytes of a replacement stand for all of what they replace; an
// inserted byte stands for the empty range where it was put.
#pragma once

#include <calm/io/tokenizer/regex.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace calm::inline CALM_ABI {

class AlignedText {
 public:
  AlignedText() = default;
  /// The raw text from byte `base` on, unchanged.
  AlignedText(std::string_view raw, std::size_t base) : text_(raw), base_(base) {}

  const std::string& text() const { return text_; }
  std::string_view text(ByteRange range) const {
    return std::string_view(text_).substr(range.begin, range.end - range.begin);
  }
  bool empty() const { return text_.empty(); }
  std::size_t size() const { return text_.size(); }

  /// The range of the raw text that the bytes of `range` stand for.
  ByteRange raw(ByteRange range) const {
    if (range.begin >= range.end) {
      const std::size_t place = range.begin < size() ? raw_begin(range.begin)
                                : size() > 0         ? raw_end(size() - 1)
                                                     : base_;
      return {place, place};
    }
    return {raw_begin(range.begin), raw_end(range.end - 1)};
  }

  /// A copy of a part.
  AlignedText slice(ByteRange range) const {
    AlignedText part;
    part.base_ = base_ + (is_raw() ? range.begin : 0);
    part.append(*this, range);
    return part;
  }

  /// Appends a part of another text. Where the result is no longer a stretch of the raw text, it keeps ranges.
  void append(const AlignedText& other, ByteRange range) {
    if (range.begin >= range.end) return;
    if (is_raw() && other.is_raw()) {
      if (text_.empty()) base_ = other.base_ + range.begin;
      if (base_ + text_.size() == other.base_ + range.begin) {
        text_ += other.text(range);
        return;
      }
    }
    keep_ranges();
    for (std::size_t i = range.begin; i < range.end; ++i) ranges_.push_back(other.range_of(i));
    text_ += other.text(range);
  }

  /// Appends bytes that all stand for the range `raw`.
  void append_changed(std::string_view bytes, ByteRange raw) {
    if (bytes.empty()) return;
    keep_ranges();
    ranges_.insert(ranges_.end(), bytes.size(),
                   Range{static_cast<std::uint32_t>(raw.begin), static_cast<std::uint32_t>(raw.end)});
    text_ += bytes;
  }

  /// Room for this many bytes.
  void reserve(std::size_t bytes) { text_.reserve(bytes); }

 private:
  struct Range {
    std::uint32_t begin, end;  // a text has less than 2^31 bytes (Tokenizer::encode)
  };

  bool is_raw() const { return ranges_.empty(); }
  std::size_t raw_begin(std::size_t i) const { return is_raw() ? base_ + i : ranges_[i].begin; }
  std::size_t raw_end(std::size_t i) const { return is_raw() ? base_ + i + 1 : ranges_[i].end; }
  Range range_of(std::size_t i) const {
    return {static_cast<std::uint32_t>(raw_begin(i)), static_cast<std::uint32_t>(raw_end(i))};
  }

  void keep_ranges() {
    if (!is_raw()) return;
    std::vector<Range> ranges;
    ranges.reserve(text_.size() + 8);
    for (std::size_t i = 0; i < text_.size(); ++i) ranges.push_back(range_of(i));
    ranges_ = std::move(ranges);
  }

  std::string text_;
  std::size_t base_ = 0;
  std::vector<Range> ranges_;  // one a byte; empty: byte i is byte base_ + i of the raw text
};

}  // namespace calm::inline CALM_ABI
