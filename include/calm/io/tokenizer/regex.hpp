// Regex: the regular expressions of tokenizer files, run by PCRE2 over UTF-8.
//
// The files are written for Oniguruma (syntax of Ruby). Where PCRE2 would read the same text otherwise, the pattern is
// translated (\s, \S, \w, \W, \b, \B, \uHHHH) or refused (\h, nested classes, &&, {n,m}+, the options m and s), never
// run with another meaning. What a pattern may cost in one match is limited; beyond that it is an error, not a hang.
#pragma once

#include <calm/core/text.hpp>
#include <calm/io/tokenizer/utf8.hpp>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

/// Bytes [begin, end) of a text.
struct ByteRange {
  std::size_t begin = 0, end = 0;
  friend bool operator==(const ByteRange&, const ByteRange&) = default;
};

class Regex {
 public:
  /// Compiles a pattern. Throws FormatError: where, the place in the pattern, the reason.
  Regex(std::string_view pattern, const std::string& where) : pattern_(pattern), where_(where) {
    require<FormatError>(pattern.size() <= longest_pattern, where, ": a pattern of ", pattern.size(),
                         " bytes; more than ", longest_pattern, " are not read");
    const std::string translated = translate();
    const std::unique_ptr<pcre2_compile_context, Free> context(pcre2_compile_context_create(nullptr));
    pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
    int code = 0;
    PCRE2_SIZE place = 0;
    code_.reset(
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &code, &place, context.get()),
        Free());
    require<FormatError>(code_ != nullptr, where_, ": the pattern ", in_quotes(pattern_), ": ", reason_of(code));
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // without it the interpreter runs: slower, same matches
  }

  /// A pattern that matches this text and nothing else.
  static Regex literal(std::string_view text, const std::string& where) {
    std::string pattern;
    for (const char c : text) {
      if (c == '\0') {
        pattern += "\\x00";
        continue;
      }
      if (std::string_view("\\^$.|?*+()[]{}# -&").find(c) != std::string_view::npos) pattern += '\\';
      pattern += c;
    }
    return {pattern, where};
  }

  const std::string& pattern() const { return pattern_; }
  const std::string& where() const { return where_; }

  /// What one thread needs to match: made once, used with any Regex.
  class Scratch {
   public:
    Scratch()
        : context_(pcre2_match_context_create(nullptr)), data_(pcre2_match_data_create(1, nullptr)),
          stack_(pcre2_jit_stack_create(32 << 10, 1 << 20, nullptr)) {
      require<Error>(context_ != nullptr && data_ != nullptr, "no memory for a regular expression");
      pcre2_set_match_limit(context_.get(), 1'000'000);
      pcre2_set_depth_limit(context_.get(), 100'000);
      pcre2_set_heap_limit(context_.get(), 32 << 10);  // KiB
      if (stack_) pcre2_jit_stack_assign(context_.get(), nullptr, stack_.get());
    }

   private:
    friend class Regex;
    struct FreeScratch {
      void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
      void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
      void operator()(pcre2_jit_stack* stack) const { pcre2_jit_stack_free(stack); }
    };
    std::unique_ptr<pcre2_match_context, FreeScratch> context_;
    std::unique_ptr<pcre2_match_data, FreeScratch> data_;
    std::unique_ptr<pcre2_jit_stack, FreeScratch> stack_;
  };

  /// Calls visit(ByteRange) for every match, from left to right, none overlapping. `text` is valid UTF-8.
  /// Throws FormatError where a match would cost more than the limits.
  template <class Visit>
  void for_each_match(std::string_view text, Scratch& scratch, const Visit& visit) const {
    const char* const data = text.empty() ? "" : text.data();
    std::size_t place = 0, last_end = 0;
    bool is_first = true;
    while (place <= text.size()) {
      if (!search(data, text.size(), place, scratch)) return;
      const PCRE2_SIZE* found = pcre2_get_ovector_pointer(scratch.data_.get());
      const ByteRange range{std::max(found[0], place), found[1]};  // \K may begin before or after
      const bool is_empty = range.end <= range.begin;
      // As in Oniguruma's and Rust's iterators: nothing empty directly after a match.
      if (!is_empty) visit(range);
      else if (is_first || range.begin != last_end) visit(ByteRange{range.begin, range.begin});
      is_first = false;
      last_end = is_empty ? range.begin : range.end;
      place = last_end;
      if (is_empty) place += place < text.size() ? code_point_at(text.substr(place, 4)).bytes : 1;
    }
  }

 private:
  static constexpr std::size_t longest_pattern = 16 << 10;

  struct Free {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
    void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
  };

  static std::string reason_of(int code) {
    PCRE2_UCHAR buffer[256] = {};
    pcre2_get_error_message(code, buffer, sizeof(buffer));
    return reinterpret_cast<const char*>(buffer);
  }

  bool search(const char* data, std::size_t size, std::size_t place, Scratch& scratch) const {
    const auto attempt = [&](std::uint32_t options) {
      return pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(data), size, place, PCRE2_NO_UTF_CHECK | options,
                         scratch.data_.get(), scratch.context_.get());
    };
    int status = attempt(0);
    if (status == PCRE2_ERROR_JIT_STACKLIMIT) status = attempt(PCRE2_NO_JIT);  // has a heap of its own
    if (status == PCRE2_ERROR_NOMATCH) return false;
    require<FormatError>(status >= 0, where_, ": the pattern ", in_quotes(pattern_), " gives up at byte ", place,
                         " of a text of ", size, ": ", reason_of(status));
    return true;
  }

  [[noreturn]] void refuse(std::size_t place, std::string_view what) const {
    throw FormatError(message(where_, ": the pattern ", in_quotes(pattern_), ": byte ", place, ": ", what,
                              " means something else here than in the library that the file was written for, and is "
                              "not supported"));
  }

  // White_Space without U+180E, which PCRE2 counts to \s, and the word characters of Oniguruma, which has the marks,
  // connectors and circled letters that PCRE2 lacks, and outside of classes also the superscripts and fractions of
  // Latin-1.
  static constexpr std::string_view spaces =
      R"(\x{09}-\x{0D}\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";
  static constexpr std::string_view word_in_class =
      R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{24B6}-\x{24E9}\x{1F130}-\x{1F149}\x{1F150}-\x{1F169}\x{1F170}-\x{1F189})";
  static std::string word() { return std::string(word_in_class) + R"(\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE})"; }

  std::string translate() const {
    const std::string_view text = pattern_;
    std::string result;
    bool in_class = false;
    std::size_t class_begin = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const char c = text[i];
      const std::string_view rest = text.substr(i);
      if (c == '\\') {
        require<FormatError>(i + 1 < text.size(), where_, ": the pattern ", in_quotes(pattern_),
                             " ends in a backslash");
        i += translate_escape(i, in_class, result);
      } else if (in_class) {
        if (c == ']' && i > class_begin) in_class = false;
        if (c == '[' && !rest.starts_with("[:")) refuse(i, "'[' in a class");
        if (rest.starts_with("&&")) refuse(i, "'&&' in a class");
        if (rest.starts_with("[:")) {
          const std::size_t end = rest.find(":]");
          if (end == rest.npos) refuse(i, "'[:' without ':]'");
          result += rest.substr(0, end + 2);
          i += end + 1;
        } else {
          result += c;
        }
      } else {
        if (c == '[') {
          in_class = true;
          class_begin = i + 1 + (rest.starts_with("[^") ? 1 : 0);
          if (class_begin < text.size() && text[class_begin] == ']') refuse(i, "a class that begins with ']'");
          result += text.substr(i, class_begin - i);
          i = class_begin - 1;
          continue;
        }
        if (rest.starts_with("}+")) refuse(i, "a quantifier {n,m} and '+'");
        if (rest.starts_with("(?")) check_options(i);
        if (rest.starts_with("(*")) refuse(i, "'(*'");
        result += c;
      }
    }
    return result;
  }

  /// Translates the escape at `place` and returns how many bytes beyond the backslash it takes.
  std::size_t translate_escape(std::size_t place, bool in_class, std::string& result) const {
    const std::string_view text = std::string_view(pattern_).substr(place);
    const auto put_set = [&](std::string_view set, bool negated) {
      if (in_class) result += set;
      else result.append(negated ? "[^" : "[").append(set).append("]");
    };
    switch (text[1]) {
      case 's': put_set(spaces, false); return 1;
      case 'S':
        if (in_class) result += R"(\S\x{180E})";
        else put_set(spaces, true);
        return 1;
      case 'w': put_set(in_class ? word_in_class : word(), false); return 1;
      case 'W':
        if (in_class) refuse(place, "'\\W' in a class");
        put_set(word(), true);
        return 1;
      case 'b':
      case 'B':
        if (in_class) break;  // a backspace
        result.append("(?:(?<=[").append(word()).append(text[1] == 'b' ? "])(?![" : "])(?=[").append(word());
        result.append("])|(?<![")
            .append(word())
            .append(text[1] == 'b' ? "])(?=[" : "])(?![")
            .append(word())
            .append("]))");
        return 1;
      case 'u': {
        const std::string_view digits = text.substr(2, 4);
        if (digits.size() < 4 || digits.find_first_not_of("0123456789abcdefABCDEF") != digits.npos)
          refuse(place, "'\\u' without four digits");
        result.append("\\x{").append(digits).append("}");
        return 5;
      }
      case 'h':
      case 'H':
      case 'K':
      case 'C':
      case 'y':
      case 'Y':
      case 'O':
      case 'Q':
      case 'E': refuse(place, message("'\\", text[1], "'"));
      default: break;
    }
    // \p{L}, \x{2581} and the like whole, so that their '}' is no end of a quantifier.
    const std::size_t close = text.size() > 2 && text[2] == '{' && text[1] != '{' ? text.find('}') : text.npos;
    const std::size_t length =
        close == text.npos || std::string_view("pPxogk").find(text[1]) == text.npos ? 2 : close + 1;
    result += text.substr(0, length);
    return length - 1;
  }

  void check_options(std::size_t place) const {
    for (std::size_t i = place + 2; i < pattern_.size(); ++i) {
      const char c = pattern_[i];
      if (c == 'm' || c == 's') refuse(place, message("the option '", c, "'"));
      if (c != 'i' && c != 'x' && c != '-') return;
    }
  }

  std::string pattern_, where_;
  std::shared_ptr<pcre2_code> code_;
};

}  // namespace calm::inline CALM_ABI
