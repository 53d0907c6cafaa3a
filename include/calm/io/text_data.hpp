// Training data as JSON lines: {"prompt": "...", "completion": "..."}, an object a line.
#pragma once

#include <calm/io/json.hpp>

#include <string>
#include <vector>

namespace calm::inline CALM_ABI {

struct TextExample {
  std::string prompt, completion;
  Index line = 0;  // of the file, counted from 1
};

/// Reads a file whole; empty lines are skipped. Throws FormatError, which names the line, for anything else.
inline std::vector<TextExample> read_text_examples(const std::filesystem::path& path) {
  const auto file = FileMap::open(path);
  std::vector<TextExample> examples;
  std::string_view text = file->text();
  for (Index line = 1; !text.empty(); ++line) {
    const std::size_t end = text.find('\n');
    const std::string_view one = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    if (one.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string where = message(file->path(), ": line ", line);
    const Json json = parse_json(one, where);
    examples.push_back({get_string(json, "prompt", where), get_string(json, "completion", where), line});
  }
  require<FormatError>(!examples.empty(), file->path(), ": holds no example");
  return examples;
}

}  // namespace calm::inline CALM_ABI
