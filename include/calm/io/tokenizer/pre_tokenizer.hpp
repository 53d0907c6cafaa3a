// PreTokenizer: cuts a normalised text into the pieces that the model encodes one by one, as a list of steps (Hugging
// Face tokenizers, "pre_tokenizers"). Everything there that cuts is a pattern and a behaviour here.
#pragma once

#include <calm/io/tokenizer/aligned_text.hpp>
#include <calm/io/tokenizer/text_growth.hpp>

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace calm::inline CALM_ABI {

/// What becomes of the matches of a pattern: Hugging Face's SplitDelimiterBehavior.
enum class SplitBehavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

/// Cuts every piece at the matches of a pattern; `invert`: at what lies between them.
struct SplitAtMatches {
  Regex pattern;
  SplitBehavior behavior = SplitBehavior::isolated;
  bool invert = false;
};

/// Puts `prefix` before pieces that do not begin with it: all, or only the one at the beginning of the text.
struct PrefixPieces {
  std::string prefix;
  bool first_only = false;
  std::string where;  // names the step in an error
};

/// Every match becomes `content`; pieces stay pieces.
struct ReplaceInPieces {
  Regex pattern;
  std::string content;
};

using PreTokenizerStep = std::variant<SplitAtMatches, PrefixPieces, ReplaceInPieces>;

/// The pattern of GPT-2, and of ByteLevel where use_regex is set.
inline constexpr std::string_view gpt2_pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// A text and the pieces it was cut into, from left to right; what is in no piece is dropped.
struct CutText {
  AlignedText text;
  std::vector<ByteRange> pieces;
};

class PreTokenizer {
 public:
  void add(PreTokenizerStep step) { steps_.push_back(std::move(step)); }
  const std::vector<PreTokenizerStep>& steps() const { return steps_; }

  /// `with_prefix` false leaves out PrefixPieces. Throws FormatError (Regex, TextGrowth).
  CutText operator()(AlignedText text, bool with_prefix, TextGrowth& growth, Regex::Scratch& scratch) const {
    CutText cut{std::move(text), {}};
    if (!cut.text.empty()) cut.pieces.push_back({0, cut.text.size()});
    for (const PreTokenizerStep& step : steps_) {
      if (const auto* split = std::get_if<SplitAtMatches>(&step)) apply(*split, cut, scratch);
      else if (const auto* replace = std::get_if<ReplaceInPieces>(&step)) apply(*replace, cut, growth, scratch);
      else if (with_prefix) apply(std::get<PrefixPieces>(step), cut, growth);
    }
    return cut;
  }

 private:
  struct Part {
    ByteRange range;
    bool is_match;
  };

  static void apply(const SplitAtMatches& step, CutText& cut, Regex::Scratch& scratch) {
    std::vector<ByteRange> pieces;
    pieces.reserve(cut.pieces.size());
    std::vector<Part> parts;
    for (const ByteRange piece : cut.pieces) {
      parts.clear();
      std::size_t done = piece.begin;
      step.pattern.for_each_match(cut.text.text(piece), scratch, [&](ByteRange match) {
        const ByteRange range{piece.begin + match.begin, piece.begin + match.end};
        if (done < range.begin) parts.push_back({{done, range.begin}, step.invert});
        parts.push_back({range, !step.invert});
        done = range.end;
      });
      if (done < piece.end) parts.push_back({{done, piece.end}, step.invert});
      append_pieces(parts, step.behavior, pieces);
    }
    cut.pieces = std::move(pieces);
  }

  // The folds of NormalizedString::split: a part joins the one before it (or after it) under the behaviour's condition.
  static void append_pieces(const std::vector<Part>& parts, SplitBehavior behavior, std::vector<ByteRange>& pieces) {
    const std::size_t first = pieces.size();
    bool previous = false;
    const auto put = [&](const Part& part, bool joins) {
      if (!joins || pieces.size() == first) pieces.push_back(part.range);
      else if (behavior == SplitBehavior::merged_with_next) pieces.back().begin = part.range.begin;
      else pieces.back().end = part.range.end;
      previous = part.is_match;
    };
    switch (behavior) {
      case SplitBehavior::removed:
        for (const Part& part : parts)
          if (!part.is_match) put(part, false);
        break;
      case SplitBehavior::isolated:
        for (const Part& part : parts) put(part, false);
        break;
      case SplitBehavior::contiguous:
        for (const Part& part : parts) put(part, part.is_match == previous);
        break;
      case SplitBehavior::merged_with_previous:
        for (const Part& part : parts) put(part, part.is_match && !previous);
        break;
      case SplitBehavior::merged_with_next:
        for (auto part = parts.rbegin(); part != parts.rend(); ++part) put(*part, part->is_match && !previous);
        std::reverse(pieces.begin() + static_cast<std::ptrdiff_t>(first), pieces.end());
        break;
    }
    const auto is_empty = [](const ByteRange& range) { return range.begin == range.end; };
    pieces.erase(std::remove_if(pieces.begin() + static_cast<std::ptrdiff_t>(first), pieces.end(), is_empty),
                 pieces.end());
  }

  static void apply(const PrefixPieces& step, CutText& cut, TextGrowth& growth) {
    const auto wanted = [&](ByteRange piece) {
      return !cut.text.text(piece).starts_with(step.prefix) && (!step.first_only || cut.text.raw(piece).begin == 0);
    };
    if (std::none_of(cut.pieces.begin(), cut.pieces.end(), wanted)) return;
    rebuild(cut, [&](ByteRange piece, AlignedText& text) {
      const bool is_wanted = wanted(piece);
      growth.check(text.size() + (is_wanted ? step.prefix.size() : 0) + (piece.end - piece.begin), step.where);
      if (is_wanted) {
        const std::size_t place = cut.text.raw(piece).begin;
        text.append_changed(step.prefix, {place, place});
      }
      text.append(cut.text, piece);
    });
  }

  static void apply(const ReplaceInPieces& step, CutText& cut, TextGrowth& growth, Regex::Scratch& scratch) {
    rebuild(cut, [&](ByteRange piece, AlignedText& text) {
      std::size_t done = piece.begin;
      step.pattern.for_each_match(cut.text.text(piece), scratch, [&](ByteRange match) {
        const ByteRange range{piece.begin + match.begin, piece.begin + match.end};
        growth.check(text.size() + (range.begin - done) + step.content.size(), step.pattern.where());
        text.append(cut.text, {done, range.begin});
        text.append_changed(step.content, cut.text.raw(range));
        done = range.end;
      });
      growth.check(text.size() + (piece.end - done), step.pattern.where());
      text.append(cut.text, {done, piece.end});
    });
  }

  /// Makes the text again, piece by piece.
  template <class Append>
  static void rebuild(CutText& cut, const Append& append) {
    CutText changed;
    changed.text.reserve(cut.text.size() + cut.pieces.size());
    changed.pieces.reserve(cut.pieces.size());
    for (const ByteRange piece : cut.pieces) {
      const std::size_t begin = changed.text.size();
      append(piece, changed.text);
      if (changed.text.size() > begin) changed.pieces.push_back({begin, changed.text.size()});
    }
    cut = std::move(changed);
  }

  std::vector<PreTokenizerStep> steps_;
};

}  // namespace calm::inline CALM_ABI
