// Normalizer: what is done to a text before it is cut, as a list of steps (Hugging Face tokenizers, "normalizers").
//
// The Unicode forms are those of utf8proc's version of Unicode; a character that is newer than it stays as it is.
#pragma once

#include <calm/io/tokenizer/aligned_text.hpp>
#include <calm/io/tokenizer/text_growth.hpp>

#include <utf8proc.h>

#include <algorithm>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace calm::inline CALM_ABI {

/// NFC, NFD, NFKC, NFKD.
struct UnicodeForm {
  bool compose = true, compatible = false;
};

/// Every match of a pattern becomes `content`.
struct ReplaceMatches {
  Regex pattern;
  std::string content;
};

/// Puts `content` before a text that is not empty.
struct PrependContent {
  std::string content;
};

struct Lowercase {};

/// Takes white space off the ends.
struct StripEnds {
  bool left = true, right = true;
};

using NormalizerStep = std::variant<UnicodeForm, ReplaceMatches, PrependContent, Lowercase, StripEnds>;

/// Puts a text into a Unicode form, piece by piece: a piece is what can interact under normalisation.
class UnicodeNormalization {
 public:
  /// `where` names the step in an error.
  UnicodeNormalization(UnicodeForm form, TextGrowth& growth, const std::string& where)
      : form_(form), growth_(growth), where_(where) {}

  AlignedText operator()(const AlignedText& source) {
    const std::string& text = source.text();
    if (std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; }))
      return source;
    AlignedText result;
    result.reserve(text.size());
    std::size_t begin = 0, place = 0;
    while (place < text.size()) {
      const CodePoint c = code_point_at(std::string_view(text).substr(place, 4));
      if (place > begin && begins_piece(c.value)) {
        flush(source, {begin, place}, result);
        begin = place;
      }
      codes_.push_back(static_cast<utf8proc_int32_t>(c.value));
      place += c.bytes;
    }
    flush(source, {begin, place}, result);
    return result;
  }

 private:
  /// False for every character that can move before or join with the one before it.
  bool begins_piece(std::uint32_t c) const {
    if (c < 0x300) return true;
    if ((c >= 0x1160 && c <= 0x11FF) || (c >= 0xD7B0 && c <= 0xD7FF)) return false;  // Hangul vowels and finals
    if (form_.compatible && ((c >= 0x3130 && c <= 0x318F) || (c >= 0xFF9E && c <= 0xFFDF))) return false;
    const auto* property = utf8proc_get_property(static_cast<utf8proc_int32_t>(c));
    return property->combining_class == 0 && property->category != UTF8PROC_CATEGORY_MN &&
           property->category != UTF8PROC_CATEGORY_MC && property->category != UTF8PROC_CATEGORY_ME;
  }

  void flush(const AlignedText& source, ByteRange range, AlignedText& result) {
    if (range.end - range.begin == 1) {  // one character of ASCII
      codes_.clear();
      return result.append(source, range);
    }
    decompose();
    if (form_.compose) {
      const auto length =
          utf8proc_normalize_utf32(decomposed_.data(), static_cast<utf8proc_ssize_t>(decomposed_.size()),
                                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
      if (length >= 0) decomposed_.resize(static_cast<std::size_t>(length));
    }
    if (decomposed_ == codes_) {
      result.append(source, range);
    } else {
      std::string bytes;
      for (const utf8proc_int32_t c : decomposed_) append_utf8(bytes, static_cast<std::uint32_t>(c));
      growth_.check(result.size() + bytes.size(), where_);
      result.append_changed(bytes, source.raw(range));
    }
    codes_.clear();
  }

  // utf8proc's own function for texts orders combining marks in quadratic time.
  void decompose() {
    const auto options =
        static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (form_.compatible ? UTF8PROC_COMPAT : 0));
    decomposed_.clear();
    for (const utf8proc_int32_t c : codes_) {
      utf8proc_int32_t parts[32];  // the longest decomposition (U+FDFA) has 18
      int boundary = 0;
      const auto count = utf8proc_decompose_char(c, parts, 32, options, &boundary);
      if (count < 0 || count > 32) decomposed_.push_back(c);
      else decomposed_.insert(decomposed_.end(), parts, parts + count);
    }
    const auto order = [](utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; };
    for (auto begin = decomposed_.begin(); begin != decomposed_.end();) {
      if (order(*begin) == 0) {
        ++begin;
        continue;
      }
      const auto end = std::find_if(begin, decomposed_.end(), [&](auto c) { return order(c) == 0; });
      std::stable_sort(begin, end, [&](auto a, auto b) { return order(a) < order(b); });
      begin = end;
    }
  }

  UnicodeForm form_;
  TextGrowth& growth_;
  const std::string& where_;
  std::vector<utf8proc_int32_t> codes_, decomposed_;  // of the piece
};

inline AlignedText replace_matches(const AlignedText& source, const ReplaceMatches& step, TextGrowth& growth,
                                   Regex::Scratch& scratch) {
  AlignedText result;
  result.reserve(source.size());
  std::size_t done = 0;
  step.pattern.for_each_match(source.text(), scratch, [&](ByteRange match) {
    growth.check(result.size() + (match.begin - done) + step.content.size(), step.pattern.where());
    result.append(source, {done, match.begin});
    result.append_changed(step.content, source.raw(match));
    done = match.end;
  });
  if (done == 0 && result.empty()) return source;
  growth.check(result.size() + (source.size() - done), step.pattern.where());
  result.append(source, {done, source.size()});
  return result;
}

inline AlignedText lowercase(const AlignedText& source, TextGrowth& growth, const std::string& where) {
  AlignedText result;
  result.reserve(source.size());
  const std::string_view text = source.text();
  for (std::size_t place = 0; place < text.size();) {
    const CodePoint c = code_point_at(text.substr(place, 4));
    const ByteRange range{place, place + c.bytes};
    const auto lower = static_cast<std::uint32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c.value)));
    if (c.value == 0x130) {  // the only character whose lower case is two
      result.append_changed("i\u0307", source.raw(range));
    } else if (lower == c.value) {
      result.append(source, range);
    } else {
      std::string bytes;
      append_utf8(bytes, lower);
      result.append_changed(bytes, source.raw(range));
    }
    growth.check(result.size(), where);
    place += c.bytes;
  }
  return result;
}

inline AlignedText strip_ends(const AlignedText& source, const StripEnds& step) {
  const std::string_view text = source.text();
  std::size_t begin = text.size(), end = 0;  // of what is no white space
  for (std::size_t place = 0; place < text.size();) {
    const CodePoint c = code_point_at(text.substr(place, 4));
    if (!is_white_space(c.value)) {
      begin = std::min(begin, place);
      end = place + c.bytes;
    }
    place += c.bytes;
  }
  return source.slice({step.left ? begin : 0, step.right ? (end == 0 && !step.left ? 0 : end) : text.size()});
}

class Normalizer {
 public:
  struct Entry {
    NormalizerStep step;
    std::string where;
  };

  /// `where` names the step in an error.
  void add(NormalizerStep step, std::string where) { steps_.push_back({std::move(step), std::move(where)}); }
  bool empty() const { return steps_.empty(); }
  const std::vector<Entry>& steps() const { return steps_; }

  /// Applies every step. `with_prefix` false leaves out what is put before the text. Throws FormatError (Regex,
  /// TextGrowth).
  AlignedText operator()(AlignedText text, bool with_prefix, TextGrowth& growth, Regex::Scratch& scratch) const {
    for (const auto& [step, where] : steps_) {
      if (const auto* form = std::get_if<UnicodeForm>(&step)) {
        text = UnicodeNormalization(*form, growth, where)(text);
      } else if (const auto* replace = std::get_if<ReplaceMatches>(&step)) {
        text = replace_matches(text, *replace, growth, scratch);
      } else if (const auto* prepend = std::get_if<PrependContent>(&step)) {
        if (!with_prefix || text.empty()) continue;
        const std::size_t place = text.raw({0, 0}).begin;
        growth.check(prepend->content.size() + text.size(), where);
        AlignedText prefixed;
        prefixed.append_changed(prepend->content, {place, place});
        prefixed.append(text, {0, text.size()});
        text = std::move(prefixed);
      } else if (std::holds_alternative<Lowercase>(step)) {
        text = lowercase(text, growth, where);
      } else {
        text = strip_ends(text, std::get<StripEnds>(step));
      }
    }
    return text;
  }

 private:
  std::vector<Entry> steps_;
};

}  // namespace calm::inline CALM_ABI
