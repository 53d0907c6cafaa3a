// TextGrowth: how much longer the steps of a tokenizer's file may make a text than it was given.
//
// Normalisation makes at most 11 bytes of one (NFKC of U+FDFA), a mark for a space 3; what is put before a text is a
// mark or two. The limit is far beyond, and far below what a file of some kilobytes whose steps multiply a text would
// take.
#pragma once

#include <calm/core/error.hpp>

#include <algorithm>
#include <string>

namespace calm::inline CALM_ABI {

class TextGrowth {
 public:
  /// A list of steps has at most this many; together they may make `times` the bytes of a text and `more`.
  static constexpr std::size_t most_steps = 256, times = 64, more = 4096;

  /// For what becomes of a text of this many bytes, or of all its parts one after the other.
  explicit TextGrowth(std::size_t bytes) : left_(times * bytes + more) {}

  /// To be called before a step makes a text of this many bytes. `where` names the step. Throws FormatError.
  void check(std::size_t bytes, const std::string& where) {
    require<FormatError>(bytes <= left_, where, ": a text would become ", bytes, " bytes long here; the steps of a ",
                         "tokenizer may make at most ", times, " times its bytes and ", more, " of one");
    most_ = std::max(most_, bytes);
  }

  /// The next part of the text: the longest that was made of this one is no longer left.
  void end_part() {
    left_ -= most_;
    most_ = 0;
  }

 private:
  std::size_t left_, most_ = 0;
};

}  // namespace calm::inline CALM_ABI
